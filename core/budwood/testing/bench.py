"""Short runs of one strategy, each executed once and shared by the checks."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from torch import Tensor

from budwood.adapters.golden import measure, threads
from budwood.adapters.use import use_adapters
from budwood.contract.discovery import installed, scan
from budwood.contract.loading import load_strategy
from budwood.contract.strategy import RUN_ADAPTER, Strategy
from budwood.contract.types import Run
from budwood.errors import BudwoodError
from budwood.recipe.schema import Recipe
from budwood.testing.files import LONGEST, Files, kind_for, make_files, session_folder
from budwood.testing.probe import Probe, named_parameters
from budwood.training import finish
from budwood.training.loop import tune
from budwood.training.report import Report

BATCH = 4
LEARNING_RATE = 1e-2
PROBE = "conformance-probe"
MODULE = "budwood_testing_strategies"
"""Module from which classes without a distribution are imported."""
FIRST_PARTY: dict[str, Callable[[Files], dict[str, Any]]] = {
    "lora": lambda files: {"rank": 2, "alpha": 4, "targets": ["v_proj", "down_proj"]},
    "adalora": lambda files: {
        "initial_rank": 3, "target_rank": 2, "alpha": 6, "initial_phase": 0, "final_phase": 1, "interval": 1,
    },
    "adversarial": lambda files: {"method": "fgm", "epsilon": 0.5},
    "distillation": lambda files: {"teacher": str(files.teacher), "weight": 0.4},
    "ema": lambda files: {"decay": 0.9},
    "swa": lambda files: {"start": 2},
}  # fmt: skip
"""Strategies included in Budwood that others are composed with, with options for a run of three steps.

Objectives and regularisers only add terms; combinations.py in the tests covers them."""


class PromiseBroken(AssertionError):
    """A strategy breaks a guarantee of every strategy; the message names it, with the measured values."""


class NotApplicable(Exception):
    """A check does not apply to a strategy; the message gives the reason."""


@dataclass(frozen=True)
class Spec:
    """The settings of a bench.

    Attributes:
        strategy: the class under test.
        options: its options.
        companions: the other strategies of the recipe, as listed there; None: LoRA, if nothing else trains.
        task: task of the recipe.
        steps: optimizer steps of each run.
    """

    strategy: type[Strategy]
    options: dict[str, Any] = field(default_factory=dict)
    companions: Sequence[Any] | None = None
    task: str = "causal-lm"
    steps: int = 3


@dataclass
class Result:
    """A finished run."""

    run: Run
    probe: Probe
    parameters: dict[str, Tensor]
    """The trained parameters, by group and name."""

    @functools.cached_property
    def logits(self) -> Tensor:
        """[prompts, vocabulary or classes] after the last step."""
        return self._measure()

    @functools.cached_property
    def off(self) -> Tensor | None:
        """The logits with the run's adapter disabled; None if no strategy owns one."""
        owner: Any = adapter_owner(self.run)
        if owner is None:
            return None
        use_adapters(owner, self.run.model)
        try:
            return self._measure()
        finally:
            use_adapters(owner, self.run.model, [RUN_ADAPTER])

    def _measure(self) -> Tensor:
        run = self.run
        with threads(1):
            return measure(run.task, run.model, run.tokenizer, self.probe.prompts, run.dtype)

    @property
    def adapter(self) -> Path:
        """Folder of the saved adapter."""
        return self.run.directory / "adapter"


class Bench:
    """Runs of one strategy on the kit's base and data: fp32, 4 examples per optimizer step, on the CPU."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        kind = kind_for(spec.strategy.trains_on)
        self.files = make_files(spec.task, kind)
        self.group = 2 if kind else 1
        """Largest number of examples in a group of the data."""
        self.name = register(spec.strategy)
        register(Probe, PROBE)
        self._results: dict[tuple[Any, ...], Result | Exception] = {}
        self._failed: dict[int, tuple[Probe, Run, Exception | None]] = {}
        self._resumed: Result | None = None

    def micro_tokens(self, groups: int) -> int:
        """Return the limit for micro-batches of this number of groups."""
        return groups * self.group * LONGEST

    @property
    def owns_adapter(self) -> bool:
        """Whether the strategy itself owns the adapter."""
        return "adapter" in self.spec.strategy.slots

    @property
    def companions(self) -> list[Any]:
        """The other strategies of the recipe."""
        if self.spec.companions is not None:
            return list(self.spec.companions)
        trains = implements(self.spec.strategy, "trainable_parameters")
        return [] if trains else [{"lora": FIRST_PARTY["lora"](self.files)}]

    def strategies(self, other: str | None = None) -> list[Any]:
        """Return the recipe's strategies; a first-party `other` is added and replaces companions with its slots."""
        companions = self.companions
        if other is not None:
            slots = set(load_strategy(other)[0].slots)
            companions = [c for c in companions if not slots & set(load_strategy(_name(c))[0].slots)]
            companions.append({other: FIRST_PARTY[other](self.files)})
        return [{self.name: self.spec.options}, *companions]

    def recipe(self, output: str, other: str | None = None, quantization: str = "none", **train: Any) -> Recipe:
        """Return a recipe whose result depends only on its arguments; the probe is its first strategy."""
        data = {"train": str(self.files.train), "max_length": LONGEST}
        if implements(self.spec.strategy, "evaluate"):
            data["eval"] = str(self.files.eval)
        steps = {
            "steps": self.spec.steps, "batch_examples": BATCH, "micro_tokens": self.micro_tokens(BATCH),
            "learning_rate": LEARNING_RATE, "precision": "fp32", "schedule": "constant", "warmup": 0,
            "eval_generate": 0,
        }  # fmt: skip
        return Recipe.from_dict(
            {
                "base": {
                    "model": str(self.files.base), "quantization": quantization, "task": self.spec.task,
                    "device": "cpu",
                },
                "data": data,
                "strategies": [PROBE, *self.strategies(other)],
                "train": steps | train,
                "output": str(session_folder() / "runs" / self.name / output),
            }
        )  # fmt: skip

    def run(self, promise: str, output: str = "whole", **changes: Any) -> Result:
        """Return the run `output` of the recipe with `changes`; executed once.

        Raises:
            PromiseBroken: the run failed, which breaks `promise`.
        """
        if changes.get("quantization") == "none":
            output, changes = "whole", {}
        key = (output, *sorted(changes.items()))
        if key not in self._results:
            try:
                self._results[key] = self._tune(self.recipe(output, **changes))
            except Exception as error:
                self._results[key] = error
        result = self._results[key]
        if isinstance(result, Exception):
            raise PromiseBroken(f"{promise}: the run failed with {explain(result)}") from result
        return result

    def fail(self, fail_at: int) -> tuple[Probe, Run, Exception | None]:
        """Return probe, run and exception of a run whose forward pass number `fail_at` of step 2 raises; executed once.

        It keeps its checkpoint of step 1.
        """
        if fail_at not in self._failed:
            error: Exception | None = None
            Probe.last, Probe.fail_at = None, fail_at
            try:
                with threads(1), without_plots():
                    tune(self._failing(fail_at), overwrite=True, quiet=True)
            except Exception as raised:
                error = raised
            finally:
                Probe.fail_at = 0
            assert Probe.last is not None and Probe.last.run is not None
            self._failed[fail_at] = (Probe.last, Probe.last.run, error)
        return self._failed[fail_at]

    def _failing(self, fail_at: int) -> Recipe:
        return self.recipe(f"failing-{fail_at}", save_every=1)

    def resume(self, promise: str) -> Result:
        """Let a run fail in step 2, and resume it from its checkpoint of step 1, once.

        Raises:
            PromiseBroken: it cannot be resumed, which breaks `promise`.
        """
        if self._resumed is None:
            self.fail(1)
            try:
                self._resumed = self._tune(self._failing(1), overwrite=False, resume=True)
            except Exception as error:
                raise PromiseBroken(f"{promise}: the resumed run failed with {explain(error)}") from error
        return self._resumed

    def _tune(self, recipe: Recipe, overwrite: bool = True, resume: bool = False) -> Result:
        with threads(1), without_plots():
            run = tune(recipe, overwrite=overwrite, resume=resume, quiet=True)
        probe = next(strategy for strategy in run.strategies if isinstance(strategy, Probe))
        return Result(run, probe, named_parameters(run))


def implements(strategy: type, hook: str) -> bool:
    """Whether a class implements a hook."""
    return hasattr(getattr(strategy, hook, None), "budwood_impl")


def adapter_owner(run: Run) -> Strategy | None:
    """Return the strategy of a run that owns the adapter."""
    return next((strategy for strategy in run.strategies if "adapter" in strategy.slots), None)


def explain(error: BaseException) -> str:
    """Format an error, with the line of the author's code that raised it."""
    origin = error
    while origin.__cause__ is not None:
        origin = origin.__cause__
    if isinstance(origin, BudwoodError):
        return str(error)
    frames = traceback.extract_tb(origin.__traceback__)
    text = str(error) if isinstance(error, BudwoodError) else f"{type(error).__name__}: {error}"
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line})" if frames else text


def register(strategy: type[Strategy], name: str | None = None) -> str:
    """Return the name under which a class is installed; a class without a distribution is registered first."""
    classes = getattr(sys.modules.get(MODULE), "classes", {})
    for known, cls in classes.items():
        if cls is strategy:
            return str(known)
    if name is None:
        package = strategy.__module__.partition(".")[0]
        for known, entries in installed().items():
            for entry in entries:
                if entry.value.partition(".")[0].partition(":")[0] == package and entry.load() is strategy:
                    return known
        plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", strategy.__name__).lower().strip("_")
        taken = {*installed(), *classes}
        name = next(n for n in chain([plain], (f"{plain}-{i}" for i in count(2))) if n not in taken)
    pretend_installed(strategy, name)
    return name


def pretend_installed(strategy: type[Strategy], name: str) -> None:
    """Add a class to a temporary distribution of this session on sys.path."""
    module: Any = sys.modules.get(MODULE)
    if module is None:
        module = sys.modules[MODULE] = types.ModuleType(MODULE)
        module.classes = {}
        sys.path.append(str(session_folder() / "site"))
    module.classes[name] = strategy
    setattr(module, _attribute(name), strategy)
    _write_distribution(module)


def forget_pretended() -> None:
    """Remove the classes that `pretend_installed` added."""
    module: Any = sys.modules.get(MODULE)
    if module is not None and module.classes:
        module.classes.clear()
        _write_distribution(module)


def _write_distribution(module: Any) -> None:
    info = session_folder() / "site" / f"{MODULE}-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {MODULE}\nVersion: 0\n", encoding="utf-8")
    lines = [f"{name} = {MODULE}:{_attribute(name)}" for name in module.classes]
    (info / "entry_points.txt").write_text("\n".join(["[budwood]", *lines, ""]), encoding="utf-8")
    importlib.invalidate_caches()
    scan.cache_clear()  # the folder's modification time does not show a changed file


def _attribute(name: str) -> str:
    return re.sub(r"\W", "_", name)


def registered() -> dict[str, dict[str, str]]:
    """Return name, module, file and qualified name of every class in the temporary distribution, for subprocesses."""
    classes = {}
    for name, cls in getattr(sys.modules.get(MODULE), "classes", {}).items():
        classes[name] = {"module": cls.__module__, "file": inspect.getsourcefile(cls) or "", "class": cls.__qualname__}
    return classes


@contextmanager
def without_plots() -> Iterator[None]:
    """Disable loss.png and report.html, which take as long as such a short run."""
    plot, write_page = Report.plot, finish.write_page
    Report.plot = lambda self, run: None  # type: ignore[method-assign]
    finish.write_page = lambda directory: None
    try:
        yield
    finally:
        Report.plot = plot  # type: ignore[method-assign]
        finish.write_page = write_page


def _name(choice: Any) -> str:
    return choice if isinstance(choice, str) else str(next(iter(choice)))

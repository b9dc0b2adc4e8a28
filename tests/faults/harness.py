"""Runs for fault injection, forked from a process that has imported everything, so that each takes a second.

The parent computes nothing and starts no threads; a child may be killed, or have its disk fail, at any time.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from tests.conftest import make_base
from tests.core.conftest import write_rows

from budwood.adapters.store import read_adapter
from budwood.errors import BudwoodError
from budwood.recipe.schema import Recipe
from budwood.training import loop
from budwood.training.durability.reading import FOLDER, read_checkpoint, steps_in
from budwood.training.loop import tune

PRELOADED = (
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "PIL.PngImagePlugin",
    "transformers.models.llama.modeling_llama",
    "budwood_lora",
    "budwood_adalora",
    "budwood_adversarial",
    "budwood_averaging",
    "budwood_distillation",
    "budwood_grpo",
)
STRATEGIES = Path(__file__).parent / "strategies"
TRAIN = {
    "steps": 6, "batch_examples": 8, "micro_tokens": 128, "learning_rate": 1e-2, "precision": "fp32",
    "schedule": "linear", "warmup": 1, "eval_generate": 0, "eval_every": 2, "save_every": 1,
}  # fmt: skip
METHODS: dict[str, list[Any]] = {
    "lora": [{"lora": {"rank": 4}}],
    "lora, dropout": [{"lora": {"rank": 4, "dropout": 0.1}}],
    "adalora, fgm": [
        {"adalora": {"initial_rank": 4, "target_rank": 2, "initial_phase": 1, "final_phase": 2, "interval": 1}},
        {"adversarial": {"method": "fgm", "epsilon": 0.5}},
    ],
}


@dataclass(frozen=True)
class Outcome:
    """One injected fault: kind, description, and the loss it caused ("" if none)."""

    kind: str
    what: str
    lost: str = ""


@dataclass(frozen=True)
class Ended:
    """The end of a forked run: exit code (-9: killed), stderr, and error message."""

    code: int
    said: str = ""
    error: str = ""


class Shop:
    """A folder with a tiny base, data, and runs on them."""

    def __init__(self, folder: Path) -> None:
        os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        torch.set_num_threads(1)
        sys.path.insert(0, str(STRATEGIES))
        for name in PRELOADED:
            importlib.import_module(name)
        self.folder = folder
        self.base = folder / "base"
        write_rows(folder / "train.jsonl")
        self.eval = write_rows(folder / "eval.jsonl", 8, seed=1)
        self.finish(self.fork(lambda: make_base(self.base)))
        self._references: dict[str, Path] = {}

    def write_long_rows(self) -> None:
        """Write long.jsonl: rows of about 300 tokens, so that a step needs noticeable memory."""
        draw = random.Random(0)
        texts = [" ".join(draw.choices("games section library terminal files".split(), k=60)) for _ in range(64)]  # noqa: SIM905
        lines = [json.dumps({"prompt": f"{text}:", "completion": " x"}) for text in texts]
        (self.folder / "long.jsonl").write_text("\n".join(lines))

    def recipe(
        self, method: str, output: str, strategies: list[Any] | None = None, data: str = "train.jsonl",
        max_length: int = 128, **train: Any,
    ) -> Recipe:  # fmt: skip
        """Return a recipe of a few steps with a checkpoint after each."""
        return Recipe.from_dict(
            {
                "base": {"model": str(self.base), "quantization": "none"},
                "data": {"train": str(self.folder / data), "eval": str(self.eval), "max_length": max_length},
                "strategies": [*METHODS[method], *(strategies or [])],
                "train": {**TRAIN, **train},
                "output": str(self.folder / output),
            }
        )

    def fork(self, work: Callable[[], Any]) -> tuple[int, Path]:
        """Start `work` in a forked process; `finish` waits for it."""
        report = self.folder / f"ended-{random.getrandbits(64):x}.json"
        pid = os.fork()
        if pid:
            return pid, report
        said, error, code = io.StringIO(), "", 0
        try:
            with redirect_stderr(said):
                work()
        except BudwoodError as failure:
            code, error = failure.exit_code, str(failure)
        except BaseException:
            code, error = 1, traceback.format_exc()
        try:
            report.write_text(json.dumps([said.getvalue(), error]))
        finally:
            os._exit(code)

    def finish(self, started: tuple[int, Path]) -> Ended:
        """Wait for a forked process, and return how it ended."""
        pid, report = started
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said, error = json.loads(report.read_text()) if code >= 0 and report.exists() else ("", "")
        report.unlink(missing_ok=True)
        return Ended(code, said, error)

    def tune(self, recipe: Recipe, **options: Any) -> Ended:
        """Run a recipe in a forked process, and wait for it."""
        return self.finish(self.fork(lambda: tune(recipe, **options)))

    def stopped(self, recipe: Recipe, step: int) -> Path:
        """Return the run folder after a kill in the middle of the step after `step`, to be copied for each trial."""
        sum_gradients = loop.sum_gradients

        def die(run: Any) -> None:
            if run.step == step:
                os._exit(9)
            sum_gradients(run)

        def work() -> None:
            with mock.patch.object(loop, "sum_gradients", die):
                tune(recipe)

        self.finish(self.fork(work))
        return recipe.output.rename(recipe.output.with_name(f"{recipe.output.name}-stopped"))

    def reference(self, method: str) -> Path:
        """Return the folder of the uninterrupted run of a method."""
        if method not in self._references:
            name = f"whole-{len(self._references)}"
            ended = self.tune(self.recipe(method, name))
            if ended.code:
                raise RuntimeError(f"the uninterrupted run failed: {ended.error}")
            self._references[method] = self.folder / name
        return self._references[method]

    def compare(self, method: str, output: Path, numbers: bool = True) -> str:
        """Return "" if files and metrics of a run equal those of the uninterrupted run, otherwise the difference."""
        whole = self.reference(method)
        for name in ("adapter_model.safetensors", "adapter_config.json", "golden.safetensors"):
            if (output / "adapter" / name).read_bytes() != (whole / "adapter" / name).read_bytes():
                return f"{name} differs from that of the uninterrupted run"
        if numbers and records(output) != records(whole):
            return "metrics.jsonl differs from that of the uninterrupted run"
        return ""

    def remove(self, output: Path) -> None:
        """Delete the folder of a run."""
        shutil.rmtree(output, ignore_errors=True)


def records(directory: Path) -> list[dict[str, Any]]:
    """Return all logged values except timings."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def incomplete(directory: Path) -> str:
    """Return "" if all files in a run's folder are complete and readable, otherwise the problem."""
    for path in steps_in(directory / FOLDER).values():
        try:
            read_checkpoint(path).load()
        except Exception as error:
            return f"{path.name}: {error}"
    if (directory / "adapter").exists():
        try:
            read_adapter(directory / "adapter").load_tensors()
            load_file(directory / "adapter" / "golden.safetensors")
        except Exception as error:
            return f"adapter: {error}"
    for name in ("manifest.json",):
        try:
            json.loads((directory / name).read_text() if (directory / name).exists() else "{}")
        except ValueError as error:
            return f"{name}: {error}"
    return ""


def tally(outcomes: Iterator[Outcome] | list[Outcome]) -> tuple[str, int]:
    """Return a table of faults by kind followed by a list of losses, and the number of losses."""
    kinds: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        kinds.setdefault(outcome.kind, []).append(outcome)
    rows = [("fault", "tried", "survived", "lost")]
    lost = [outcome for tried in kinds.values() for outcome in tried if outcome.lost]
    for kind, tried in kinds.items():
        bad = sum(bool(outcome.lost) for outcome in tried)
        rows.append((kind, str(len(tried)), str(len(tried) - bad), str(bad)))
    total = sum(map(len, kinds.values()))
    rows.append(("all", str(total), str(total - len(lost)), str(len(lost))))
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:{width}}  {row[1]:>6}  {row[2]:>8}  {row[3]:>5}" for row in rows]
    return "\n".join([*lines, *(f"lost: {o.kind}: {o.what}: {o.lost}" for o in lost)]), len(lost)

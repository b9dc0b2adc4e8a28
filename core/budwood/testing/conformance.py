"""The test classes that authors inherit: one test per guarantee. Those of tasks are in task_conformance.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest

from budwood.contract.strategy import Strategy
from budwood.testing import adapter_checks, checks
from budwood.testing.bench import FIRST_PARTY, Bench, NotApplicable, PromiseBroken, Spec
from budwood.testing.files import Files, kind_for, make_files
from budwood.testing.plugin import SKIPPED


class Conformance:
    """What the test classes of the kit share: runs in common, and tests that do not apply are skipped with the reason.

    Attributes:
        does_not_apply: name of a test (without `test_`) → why the guarantee does not apply to the plugin under test.
    """

    does_not_apply: ClassVar[dict[str, str]] = {}

    @classmethod
    def make_bench(cls) -> Bench:
        """Create the runs of this class."""
        raise NotImplementedError

    @classmethod
    def bench(cls) -> Bench:
        """Return the runs shared by the tests of this class."""
        if cls not in _benches:
            _benches[cls] = cls.make_bench()
        return _benches[cls]

    @classmethod
    def announce(cls, group: str) -> None:
        """Queue the two-process run to share one start of processes with the other classes of `group`."""
        if "two_processes_equal_one" not in cls.does_not_apply:
            _announced.setdefault(group, []).append(cls)

    def _run_announced(self, request: pytest.FixtureRequest) -> None:
        for group in ("", str(request.node.path)):
            for cls in _announced.pop(group, ()):
                checks.wait_for_processes(cls.bench())

    def _check(self, request: pytest.FixtureRequest, check: Callable[[Any], None]) -> None:
        """Run a check: fail the test if the promise is broken, skip it if it does not apply."""
        name = request.node.originalname.removeprefix("test_")
        unknown = [key for key in self.does_not_apply if not hasattr(type(self), f"test_{key}")]
        if unknown:
            pytest.fail(f"does_not_apply: there is no test '{unknown[0]}'", pytrace=False)
        reason = self.does_not_apply.get(name)
        broken = ""
        if reason is None:
            try:
                check(self.bench())
                return
            except NotApplicable as error:
                reason = str(error)
            except PromiseBroken as error:
                broken = str(error)
        if broken:
            pytest.fail(f"promise broken: {broken}", pytrace=False)
        request.node.user_properties.append((SKIPPED, reason))
        pytest.skip(f"does not apply: {reason}")


class StrategyConformance(Conformance):
    """Base class for conformance tests; name the subclass Test… and set `strategy`.

    Each test checks one guarantee; a failure names it, with the measured values. Tests that do not apply are skipped
    with the reason. All runs take a few steps on a tiny generated base, in fp32 on the CPU; do not use dropout.

    Attributes:
        strategy: the class under test.
        options: its options in the kit's recipes; override `make_options` if they need paths.
        companions: the other strategies of these recipes; None: LoRA, if this one trains nothing itself.
        task: causal-lm or sequence-classification.
        steps: optimizer steps of each run.
    """

    strategy: ClassVar[type[Strategy]]
    options: ClassVar[dict[str, Any]] = {}
    companions: ClassVar[Sequence[Any] | None] = None
    task: ClassVar[str] = "causal-lm"
    steps: ClassVar[int] = 3

    @classmethod
    def make_options(cls, files: Files) -> dict[str, Any]:
        """Return the strategy's options; `files` are the kit's base, teacher and data."""
        return dict(cls.options)

    @classmethod
    def make_bench(cls) -> Bench:
        """See `Conformance.make_bench`."""
        if not hasattr(cls, "strategy"):
            pytest.fail(f"{cls.__name__}: set the strategy under test: strategy = Mine", pytrace=False)
        options = cls.make_options(make_files(cls.task, kind_for(cls.strategy.trains_on)))
        return Bench(Spec(cls.strategy, options, cls.companions, cls.task, cls.steps))

    def test_declares_what_it_implements(self, request: pytest.FixtureRequest) -> None:
        self._check(request, checks.declares)

    def test_options_round_trip(self, request: pytest.FixtureRequest) -> None:
        self._check(request, checks.options_round_trip)

    def test_zero_effect_at_start(self, request: pytest.FixtureRequest) -> None:
        self._check(request, checks.zero_effect_at_start)

    def test_gradients_only_where_declared(self, request: pytest.FixtureRequest) -> None:
        self._check(request, checks.gradients_where_declared)

    def test_base_unchanged(self, request: pytest.FixtureRequest) -> None:
        self._check(request, checks.base_unchanged)

    def test_same_seed_same_bytes(self, request: pytest.FixtureRequest) -> None:
        self._check(request, checks.same_seed_same_bytes)

    def test_one_batch_equals_two_halves(self, request: pytest.FixtureRequest) -> None:
        self._check(request, checks.micro_batches)

    def test_two_processes_equal_one(self, request: pytest.FixtureRequest) -> None:
        self._run_announced(request)
        self._check(request, checks.two_processes)

    def test_save_and_load(self, request: pytest.FixtureRequest) -> None:
        self._check(request, adapter_checks.save_and_load)

    def test_resumed_equals_uninterrupted(self, request: pytest.FixtureRequest) -> None:
        self._check(request, checks.resume)

    def test_merged_equals_unmerged(self, request: pytest.FixtureRequest) -> None:
        self._check(request, adapter_checks.merge)

    def test_off_restores_the_base(self, request: pytest.FixtureRequest) -> None:
        self._check(request, adapter_checks.off)

    @pytest.mark.parametrize("quantization", ["none", "nf4"])
    def test_runs_on(self, quantization: str, request: pytest.FixtureRequest) -> None:
        self._check(request, functools.partial(checks.runs_on, quantization=quantization))

    def test_runs_on_fake_tensors(self, request: pytest.FixtureRequest) -> None:
        self._check(request, checks.fake_tensors)

    def test_hooks_removed_after_an_exception(self, request: pytest.FixtureRequest) -> None:
        self._check(request, checks.after_an_exception)

    @pytest.mark.parametrize("other", FIRST_PARTY)
    def test_composes_with(self, other: str, request: pytest.FixtureRequest) -> None:
        self._check(request, functools.partial(checks.composes, other=other))


_announced: dict[str, list[type[Conformance]]] = {}

_benches: dict[type[Conformance], Bench] = {}

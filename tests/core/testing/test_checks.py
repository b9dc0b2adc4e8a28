"""Each check of the conformance kit against strategies that break only its promise."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tests.core.testing import broken

from budwood import Strategy, installed
from budwood.testing import StrategyConformance, adapter_checks, bench, checks, plugin
from budwood.testing.bench import Bench, NotApplicable, PromiseBroken, Spec
from budwood.testing.expect import expect_equal

CHECKS: dict[str, Callable[[Bench], None]] = {
    "declares": checks.declares,
    "options": checks.options_round_trip,
    "start": checks.zero_effect_at_start,
    "gradients": checks.gradients_where_declared,
    "base": checks.base_unchanged,
    "seed": checks.same_seed_same_bytes,
    "micro-batches": checks.micro_batches,
    "processes": checks.two_processes,
    "save": adapter_checks.save_and_load,
    "resume": checks.resume,
    "merge": adapter_checks.merge,
    "off": adapter_checks.off,
    "unquantised": functools.partial(checks.runs_on, quantization="none"),
    "nf4": functools.partial(checks.runs_on, quantization="nf4"),
    "fake": checks.fake_tensors,
    "exception": checks.after_an_exception,
    "composes": functools.partial(checks.composes, other="adversarial"),
}
EXPENSIVE = ("processes", "resume", "base", "nf4", "fake", "exception", "composes")
"""Checks with additional runs: tested only on the strategies that break them, and on all first-party ones."""
BROKEN: list[tuple[type[Strategy], str, str]] = [
    (broken.Undocumented, "declares", "no docstring"),
    (broken.AcceptsAnything, "options", "Options accepts unknown keys"),
    (broken.NonZeroStart, "start", r"a logit differs from the base's by 0\.\d+ "),
    (broken.Unfreezes, "gradients", r"elsewhere: step 1: lm_head.weight, largest gradient \d"),
    (
        broken.ChangesTheBase,
        "base",
        r"1 tensors of the none base differ after 2 steps: \S*embed_tokens.weight by 0\.\d+",
    ),
    (broken.Unseeded, "seed", r"two runs with seed 0 differ by \de-0\d|two runs with seed 0 differ by \d\.\d+e-0\d"),
    (broken.FirstMicroBatchAlone, "micro-batches", r"micro-batches of \[4\] and of \[2, 2\] examples differ by \d"),
    (broken.FirstProcessAlone, "processes", r"one process and several differ by \d"),
    (broken.SavesHalf, "save", r"loaded adapter differs from that of the trained one by \d\.\d+ \(at most"),
    (broken.Forgets, "resume", r"a run resumed after step 1 differs by \d\S* in \S+: .* after 2 steps"),
    (broken.MergesHalf, "merge", r"a logit of the merged model differs by \d\.\d+"),
    (broken.StaysOn, "off", r"after training, with the adapter disabled, a logit differs from the base's by \d\.\d+"),
    (broken.NeedsFloats, "nf4", "runs on NF4: the run failed with .*weights must be floating"),
    (broken.ReadsAValue, "fake", "DataDependentOutputException"),
    (broken.ForgetsItsHook, "exception", r"forward hooks of model.embed_tokens: 0 before, 1 after"),
    (broken.FailsInReplay, "composes", r"with adversarial: .*a replayed pass.*broken.py, line \d+"),
]
ALSO_BROKEN: list[tuple[type[Strategy], str, str]] = [
    (broken.MissingOwnerHooks, "declares", "1 of the 5 required hooks; missing: use_adapters, detach_adapter, export"),
    (broken.RoundsInYAML, "options", r"'rate' was 0.123 and is 0.1 after a YAML round trip"),
    (broken.NotFrozen, "options", "not frozen"),
    (broken.DeclaresUnused, "gradients", "idle is declared and had no gradient in all 2 steps"),
    (broken.LeavesAHook, "off", "detach_adapter, 1 properties of the model changed: forward hooks of"),
    (broken.Swallows, "exception", "an exception in forward pass 1 of a step was swallowed"),
]


@functools.cache
def bench_of(strategy: type[Strategy]) -> Bench:
    return Bench(Spec(strategy, steps=2))


@pytest.fixture(scope="module")
def benches() -> None:
    """Queue the two-process runs to share one start of processes."""
    for strategy in (broken.FirstProcessAlone, broken.FirstMicroBatchAlone):
        checks.wait_for_processes(bench_of(strategy))


def outcome(check: str, strategy: type[Strategy]) -> str:
    """Return the message of the broken promise, or "" if it holds or does not apply."""
    try:
        CHECKS[check](bench_of(strategy))
    except PromiseBroken as error:
        return str(error)
    except NotApplicable:
        pass
    return ""


@pytest.mark.parametrize(("strategy", "check", "message"), BROKEN, ids=[row[1] for row in BROKEN])
def test_only_the_matching_check_fails_for_a_broken_promise(
    strategy: type[Strategy], check: str, message: str, benches: None
) -> None:
    names = {name for name in CHECKS if name not in EXPENSIVE} | {check}
    if check == "micro-batches":  # splitting a step over processes is a separate promise
        names.add("processes")
    failures = {name: text for name in names if (text := outcome(name, strategy))}
    assert set(failures) == {check}, failures
    assert re.search(message, failures[check], re.DOTALL), failures[check]


@pytest.mark.parametrize(("strategy", "check", "message"), ALSO_BROKEN, ids=[row[0].__name__ for row in ALSO_BROKEN])
def test_other_ways_to_break_a_promise(strategy: type[Strategy], check: str, message: str) -> None:
    failure = outcome(check, strategy)
    assert re.search(message, failure), failure


def test_every_check_fails_for_some_strategy() -> None:
    assert {check for _, check, _ in BROKEN} == set(CHECKS) - {"unquantised"}


class Conformance(StrategyConformance):
    strategy = broken.AcceptsAnything


def request(test: str) -> SimpleNamespace:
    return SimpleNamespace(node=SimpleNamespace(originalname=test, user_properties=[]))


def test_a_failure_names_the_broken_promise() -> None:
    with pytest.raises(pytest.fail.Exception, match="^promise broken: options round-trip, unknown keys refused: "):
        Conformance().test_options_round_trip(request("test_options_round_trip"))


def test_checks_that_do_not_apply_are_skipped_and_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    inapplicable = request("test_merged_equals_unmerged")
    with pytest.raises(pytest.skip.Exception, match="does not apply: it owns no adapter"):
        Conformance().test_merged_equals_unmerged(inapplicable)
    monkeypatch.setattr(Conformance, "does_not_apply", {"options_round_trip": "tested elsewhere"})
    waived = request("test_options_round_trip")
    with pytest.raises(pytest.skip.Exception, match="tested elsewhere"):
        Conformance().test_options_round_trip(waived)

    lines: list[str] = []
    reports = [
        SimpleNamespace(
            nodeid=f"test_mine.py::TestMine::{skipped.node.originalname}", user_properties=skipped.node.user_properties
        )
        for skipped in (inapplicable, waived)
    ]
    other = SimpleNamespace(nodeid="test_mine.py::test_other", user_properties=[])
    reporter = SimpleNamespace(stats={"skipped": [*reports, other]}, section=lines.append, line=lines.append)
    plugin.pytest_terminal_summary(reporter)
    assert lines == [
        "budwood: checks that do not apply",
        "TestMine::test_merged_equals_unmerged: it owns no adapter",
        "TestMine::test_options_round_trip: tested elsewhere",
    ]


def test_a_waiver_of_an_unknown_test_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conformance, "does_not_apply", {"micro_batch": "…"})
    with pytest.raises(pytest.fail.Exception, match="there is no test 'micro_batch'"):
        Conformance().test_base_unchanged(request("test_base_unchanged"))


def test_the_strategy_under_test_is_registered_under_a_unique_name() -> None:
    name = bench.register(broken.Undocumented)
    assert name == "undocumented"
    assert bench.register(broken.Undocumented) == name
    assert [entry.load() for entry in installed()[name]] == [broken.Undocumented]
    assert bench.register(broken.LoRA) == "lora"


def fixed_probe(sizes: list[float]) -> SimpleNamespace:
    """The probe of a run whose parameter `b` had these gradients, and `a` larger ones."""
    return SimpleNamespace(largest={"a": 1.0, "b": max(sizes)}, smallest={"a": torch.ones(2), "b": torch.tensor(sizes)})


@pytest.mark.parametrize(
    ("whole", "parts", "gap", "differs"),
    [
        ([1e-9, 1e-9], [1e-9, 1e-9], 1e-2, False),
        ([1e-9, 1e-9], [1e-4, 1e-4], 1e-2, True),
        ([5e-7, 5e-7], [5e-7, 5e-7], 1e-2, True),
        ([1.0, 1e-6], [1.0, 1e-6], 5e-4, False),
        ([1.0, 1e-6], [1.0, 1e-6], 1e-3, True),
        ([1.0, 1.0], [1.0, 1.0], 2e-5, True),
    ],
)
def test_only_elements_with_gradients_near_rounding_may_differ(
    whole: list[float], parts: list[float], gap: float, differs: bool
) -> None:
    """By 1e-2 · 2^-24 / gradient, in both runs, since the kit's rate is 1e-2 and the largest gradient here is 1."""
    first = SimpleNamespace(probe=fixed_probe(whole), parameters={"a": torch.zeros(2), "b": torch.zeros(2)})
    runs = SimpleNamespace(spec=SimpleNamespace(steps=3))
    others = {"a": torch.zeros(2), "b": torch.tensor([0.0, gap])}
    with pytest.raises(PromiseBroken, match=f"differ by {gap:.3g} in b") if differs else nullcontext():
        expect_equal("a promise", first, others, "two runs", runs, fixed_probe(parts))

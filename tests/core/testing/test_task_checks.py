"""The conformance kit of tasks: a third party's task keeps every promise, and tasks that break one are found."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from budwood.contract.discovery import scan
from budwood.testing import TaskConformance, adapter_checks, checks, task_checks, tiny_decoder
from budwood.testing.bench import PROBE, NotApplicable, PromiseBroken, register
from budwood.testing.probe import Probe
from budwood.testing.task_bench import TaskBench, TaskSpec

FIXTURE = Path(__file__).parents[2] / "fixtures" / "number_task"
ROWS = [{"x1": number / 8, "x2": -number / 5, "y": number / 10} for number in range(12)]
BROKEN = '''
    import numpy as np
    import torch
    from dataclasses import replace
    from budwood_numbers import NumberRegression, Numbers

    class Unkeyed(NumberRegression):
        """Draws from a generator of its own."""
        name = "unkeyed"
        def vary(self, example, generator):
            noise = np.random.default_rng().normal(size=2).astype(np.float32)
            return replace(example, inputs={"numbers": example.inputs["numbers"] + noise})

    class Constant(NumberRegression):
        """Draws nothing."""
        name = "constant"
        def vary(self, example, generator):
            return replace(example)

    class OfTheBatch(NumberRegression):
        """Its loss depends on how a step is split."""
        name = "of-the-batch"
        def loss(self, logits, labels):
            return super().loss(logits, labels) / len(labels)

    class Forgets(NumberRegression):
        """Keeps something of training that is not saved."""
        name = "forgets"
        scale = 1.0
        def encode(self, items, where, encoder):
            self.scale = 2.0
            return super().encode(items, where, encoder)
        def outputs(self, model, batch):
            found = super().outputs(model, batch)
            return replace(found, head=lambda rows: self.scale * model.score(rows))

    class Speechless(NumberRegression):
        """Answers with a tensor."""
        name = "speechless"
        def respond(self, model, tokenizer, texts, labels):
            return [{"vector": torch.zeros(2)}]
'''
NAMES = {"unkeyed": "Unkeyed", "constant": "Constant", "of-the-batch": "OfTheBatch", "forgets": "Forgets",
         "speechless": "Speechless", "number-regression": "NumberRegression"}  # fmt: skip


@pytest.fixture
def bench_of(
    distribution: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], TaskBench]:
    """Function that makes a bench for a task, which is installed beside the fixture's data format."""
    register(Probe, PROBE)  # before `monkeypatch` keeps the path, which it restores
    monkeypatch.syspath_prepend(str(FIXTURE))
    broken = BROKEN.replace('"""', "'''")
    distribution("broken-tasks", broken, NAMES, group="budwood.tasks")
    distribution(
        "numbers-format", "from budwood_numbers import Numbers", {"numbers": "Numbers"}, group="budwood.formats"
    )
    data = tmp_path / "rows.jsonl"
    monkeypatch.setattr("budwood_numbers.Numbers.tasks", tuple(NAMES))
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    scan.cache_clear()
    base = tiny_decoder(tmp_path / "base")
    return lambda name: TaskBench(TaskSpec(f"{tmp_path.name}-{name}", name, base, data, data))


def test_a_third_partys_task_keeps_every_promise(bench_of: Callable[[str], TaskBench]) -> None:
    bench = bench_of("number-regression")
    promises = [name for name in vars(TaskConformance) if name.startswith("test_")]
    kept = [
        task_checks.declares, task_checks.examples_are_valid, task_checks.trains, task_checks.splits, checks.resume,
        adapter_checks.save_and_load, task_checks.saved_is_evaluated, task_checks.verifies, task_checks.opens_in_peft,
        adapter_checks.merge, checks.fake_tensors, functools.partial(checks.base_unchanged, quantizations=("none",)),
        task_checks.plans_without_data,
    ]  # fmt: skip
    for check in kept:
        check(bench)
    responds = functools.partial(task_checks.responds, text="a")
    for check in (task_checks.varies_by_key, responds, task_checks.attacked):
        with pytest.raises(NotApplicable):
            check(bench)
    assert len(promises) == len(kept) + 4, "the test in two processes is that of first-party tasks"


@pytest.mark.parametrize(
    ("name", "check", "message"),
    [
        ("unkeyed", task_checks.varies_by_key, "two calls for epoch 0 differ"),
        ("constant", task_checks.varies_by_key, "eight examples are the same in epochs 0 and 1"),
        ("of-the-batch", task_checks.splits, r"micro-batches of \[4\] and of \[1, 1, 1, 1\] examples differ by \d"),
        ("forgets", adapter_checks.save_and_load, r"differs from that of the trained one by \d"),
        ("speechless", functools.partial(task_checks.responds, text="a"), "Tensor is not JSON serializable"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_task_that_breaks_a_promise_is_found(
    bench_of: Callable[[str], TaskBench], name: str, check: Callable[[TaskBench], None], message: str
) -> None:
    with pytest.raises(PromiseBroken, match=message):
        check(bench_of(name))

"""How often a run reads values from its device: each read waits until a GPU has done all that it was given."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.core.training.misuse import LORA, Make, mine
from torch import Tensor

from budwood import tune
from budwood.model import evaluation
from budwood.model.evaluation import EvalTotals, over_eval_batches

LOGGING = """
@hookimpl
def loss_terms(self, step, outputs):
    step.run.log("passes", torch.full((1,), 0.1 + step.run.step))
    return []

@hookimpl
def before_clip(self, run):
    run.log("after_passes", 7)
"""
LATER = """
@hookimpl
def after_optimizer_step(self, run):
    run.log("later", torch.tensor(run.step * 2))
"""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The calls that read tensors, by name."""
    counts: Counter[str] = Counter()
    for name in ("tolist", "item", "__int__", "__float__", "cpu", "__bool__"):
        own = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda self, *args, own=own, name=name: (counts.update([name]), own(self, *args))[1]
        )
    return counts


@pytest.mark.parametrize(("body", "each"), [(LOGGING, 1), (LOGGING + LATER, 2)])
def test_a_step_reads_the_device_once_before_the_optimizer_and_again_for_what_is_logged_after(
    distribution: Callable, make_recipe: Make, reads: Counter[str], body: str, each: int
) -> None:
    distribution("sprout", mine(body), {"mine": "Mine"})
    counts = []
    for steps in (2, 5):
        reads.clear()
        run = tune(make_recipe(f"run{steps}", strategies=[LORA, "mine"], train={"steps": steps}), quiet=True)
        counts.append(reads.copy())
    assert counts[1] - counts[0] == {"tolist": 3 * each}
    records = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["passes"] for record in steps] == [float(np.float32(0.1 + step)) for step in range(5)]
    assert all(record["after_passes"] == 7 and record["skipped"] == 0 for record in steps)
    assert [record.get("later") for record in steps] == ([0, 2, 4, 6, 8] if each == 2 else [None] * 5)


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_an_evaluation_reads_the_device_as_often_however_many_batches_it_has(
    make_recipe: Make, reads: Counter[str], tmp_path: Any, task: str
) -> None:
    rows = [{"text": f"{word} things number {i}", "label": word} for i in range(9) for word in ("games", "fonts", "x")]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {} if task == "causal-lm" else {"train": str(path), "eval": str(path)}
    run = tune(make_recipe(evaluate=True, base={"task": task}, data=data, train={"steps": 1}), quiet=True)
    found = []
    for tokens in (1024, 64):
        run.eval_tokens = tokens
        batches = list(over_eval_batches(run, lambda batch: list(batch.keys)))
        reads.clear()
        totals = EvalTotals.of(run.task, run)
        found.append((len(batches), reads.copy(), totals))
    (few, reads_of_few, one), (many, reads_of_many, other) = found
    assert few < many and reads_of_few == reads_of_many and reads_of_few.total() <= 4
    assert one.weight == other.weight and one.means == pytest.approx(other.means, abs=1e-5)
    assert len(one.sizes) == len(other.sizes) and sum(one.sizes) == sum(other.sizes) == len(one.pairs)
    assert sorted(one.pairs) == sorted(other.pairs) and bool(one.pairs) == (task == "sequence-classification")


def test_batches_of_an_evaluation_are_made_beside_the_work_and_pinned_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, pinned = [threading.Event() for _ in range(3)], []

    class Made:
        def __init__(self, number: int) -> None:
            self.number = number

        def pinned(self) -> Made:
            pinned.append(self.number)
            made[self.number].set()
            return self

        def to(self, device: torch.device) -> Made:
            return self

    def work(batch: Any) -> int:
        assert made[min(batch.number + 1, 2)].wait(30), "the next batch is not made beside this one"
        return batch.number

    monkeypatch.setattr(evaluation, "collate_for", lambda run, examples, epoch: Made(examples[0]))
    monkeypatch.setattr(evaluation, "autocast", lambda run: torch.no_grad())
    examples = type("Rows", (list,), {"lengths": np.ones(3, dtype=np.int64), "groups": np.arange(3)})(range(3))
    run: Any = SimpleNamespace(
        eval_examples=examples, eval_tokens=1, packed=True, sharded=False, device=torch.device("cuda"),
        world=SimpleNamespace(share=lambda parts: parts), model=torch.nn.Linear(1, 1),
    )  # fmt: skip
    assert list(over_eval_batches(run, work)) == [0, 1, 2] == pinned

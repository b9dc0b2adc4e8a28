"""The learning rate of every step, and the note on a warm-up that takes up the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from budwood.recipe.schema import Recipe
from budwood.recipe.sections import TrainSection
from budwood.training.loop import tune
from budwood.training.schedule import make_scheduler, warmup_note

Make = Callable[..., Recipe]


def rates(steps: int, **train: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer, TrainSection(**train), steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_first_step_has_its_share_of_the_peak(schedule: str) -> None:
    found = rates(20, schedule=schedule, warmup=4)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    decay = {
        "cosine": [0.5 + 0.5 * math.cos(math.pi * n / 17) for n in range(17)],
        "linear": [1 - n / 17 for n in range(17)],
        "constant": [1.0] * 17,
    }
    assert found[3:] == pytest.approx(decay[schedule], abs=1e-12)
    assert min(found) > 0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_without_a_warmup_the_schedule_is_that_of_transformers(schedule: str, warmup: int) -> None:
    """A warm-up of one step is that step at the peak."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    names = {"constant": "constant_with_warmup"}
    peer = transformers.get_scheduler(names.get(schedule, schedule), optimizer, 0, 13)
    expected = []
    for _ in range(13):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        peer.step()
    assert rates(13, schedule=schedule, warmup=warmup) == pytest.approx(expected, abs=1e-12)


def test_a_fraction_counts_steps_of_the_run() -> None:
    assert rates(100, warmup=0.03)[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0], abs=1e-3)


@pytest.mark.parametrize(
    ("steps", "warmup", "note"),
    [
        (4, 10, "note: the warm-up (10 steps) is longer than the run: the learning rate ends at 40% of its peak; "),
        (
            4,
            4,
            "note: the warm-up (4 steps) is as long as the run: the learning rate reaches its peak only at the last",
        ),
        (4, 3, ""),
        (1, 0.03, ""),
    ],
)
def test_a_warmup_that_takes_up_the_run_is_reported(steps: int, warmup: float, note: str) -> None:
    found = warmup_note(TrainSection(warmup=warmup), steps)
    assert found.startswith(note) if note else not found


def test_a_run_of_one_step_moves_and_says_what_its_warmup_means(make_recipe: Make, said: list[str]) -> None:
    run = tune(make_recipe(train={"steps": 1, "warmup": 1, "schedule": "cosine"}))
    assert run.metrics["learning_rate"] == pytest.approx(1e-2)
    assert any("the warm-up (1 step) is as long as the run" in line for line in said)


def test_every_step_of_a_warmup_moves_the_adapter(make_recipe: Make) -> None:
    run = tune(make_recipe(train={"steps": 1, "warmup": 10}), quiet=True)
    moved = [not torch.equal(p.detach().cpu(), old) for p, old in zip(run.trainable, run.start, strict=True)]
    assert any(moved) and run.metrics["learning_rate"] == pytest.approx(1e-3)

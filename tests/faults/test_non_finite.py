"""A non-finite loss or gradient: the run stops or skips the step, and names the rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from budwood.errors import DivergedError
from budwood.training.loop import tune

from .test_memory import distance, log, tensors

Make = Callable[..., Any]
LORA = {"lora": {"rank": 4}}
WHOLE = {"batch_examples": 24, "steps": 4}


@pytest.mark.parametrize(
    ("what", "named"), [("loss", r"loss 'causal_lm'.* rows .*train.jsonl:4[.;]"), ("gradient", "the gradient is")]
)
def test_by_default_the_run_stops_and_saves_the_last_finite_step(
    make_recipe: Make, faults: Any, what: str, named: str
) -> None:
    recipe = make_recipe(strategies=[LORA, {"spoil": {"what": what, "steps": [3]}}], train=WHOLE)
    with pytest.raises(DivergedError, match=rf"step 3: {named}.*train.non_finite: skip.*step 2 is kept") as caught:
        tune(recipe, quiet=True)
    assert caught.value.exit_code == 5
    assert all(tensor.isfinite().all() for tensor in tensors(recipe.output).values())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_is_counted_and_changes_nothing(make_recipe: Make, faults: Any, capsys: Any, what: str) -> None:
    """Every step uses the same rows here, so skipping two of four steps equals training for two."""
    train = {**WHOLE, "non_finite": "skip"}
    two = tune(make_recipe("two", strategies=[LORA], train={**train, "steps": 2}), quiet=True)
    run = tune(make_recipe("four", strategies=[LORA, {"spoil": {"what": what, "steps": [1, 3]}}], train=train))
    said = capsys.readouterr().err
    assert "warning: step 1: " in said and "warning: step 3: " in said
    assert said.count("the step is skipped") == 2
    assert "2 steps were skipped: their loss or gradient was not finite" in said
    assert ("train.jsonl:4:" in said) == (what == "loss"), "the row that caused it"
    assert run.metrics["skipped"] == 2
    assert [line["skipped"] for line in log(run.directory) if line["kind"] == "step"] == [1, 0, 1, 0]
    assert distance(two.directory, run.directory) < 1e-6, "rows are packed in a different order, which changes rounding"
    assert run.optimizer.state[run.trainable[0]]["step"] == 2
    assert run.scheduler.last_epoch == 2


def test_too_many_skipped_steps_in_a_row_end_the_run(make_recipe: Make, faults: Any) -> None:
    spoil = {"spoil": {"steps": list(range(4, 40))}}
    recipe = make_recipe(strategies=[LORA, spoil], train={**WHOLE, "steps": 40, "non_finite": "skip"})
    with pytest.raises(
        DivergedError, match="step 24: .*train.jsonl:4; 21 steps in a row.*adapter of step 2[34] is kept"
    ):
        tune(recipe, quiet=True)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors(Path(recipe.output)).values())

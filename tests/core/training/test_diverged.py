"""A run whose optimizer leaves non-finite parameters: exit code 5, one line, and no useless adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from budwood.cli.app import run as command
from budwood.errors import DivergedError
from budwood.recipe.schema import Recipe
from budwood.serving.verify import verify
from budwood.training import setup
from budwood.training.durability.reading import steps_in
from budwood.training.loop import train
from budwood.training.report import Report

Make = Callable[..., Recipe]
OVERFLOWS = 1e300


def tune_with_rates(recipe: Recipe, rates: list[float]) -> None:
    """Train with a learning rate per step, relative to the recipe's."""
    run, hooks, engine = setup.prepare(recipe, report := Report(quiet=True), False)
    run.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda n: rates[min(n, len(rates) - 1)])
    try:
        train(run, hooks, engine, report)
    finally:
        report.close()


def test_a_learning_rate_that_overflows_at_the_last_step(
    make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(train={"steps": 1, "learning_rate": OVERFLOWS})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert command(["tune", str(path)]) == 5
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: step 1: the optimizer left NaN or infinity in 'lora_A/")
    assert "although loss and gradient were finite; lower train.learning_rate; no adapter is kept" in line
    assert not (Path(recipe.output) / "adapter").exists()
    assert not steps_in(Path(recipe.output) / "checkpoints"), "no checkpoint holds non-finite values"
    assert json.loads((Path(recipe.output) / "manifest.json").read_text()).get("finished") is None


def test_the_best_adapter_from_before_is_kept_and_usable(make_recipe: Make) -> None:
    recipe = make_recipe(evaluate=True, train={"steps": 3, "eval_every": 1})
    with pytest.raises(
        DivergedError, match=r"step 3: the optimizer left .* the adapter of step 2 is kept in .*adapter"
    ):
        tune_with_rates(recipe, [1.0, 1.0, OVERFLOWS])
    assert verify(Path(recipe.output) / "adapter", precision="fp32").exact


def test_in_the_middle_of_a_run_the_step_is_named_and_no_row(make_recipe: Make) -> None:
    recipe = make_recipe(train={"steps": 4, "non_finite": "skip"})
    with pytest.raises(DivergedError, match=r"^step 2: the optimizer left NaN or infinity") as caught:
        tune_with_rates(recipe, [1.0, OVERFLOWS, 1.0])
    assert "train.jsonl" not in str(caught.value)


def test_finite_parameters_with_non_finite_logits_write_no_adapter(make_recipe: Make) -> None:
    recipe = make_recipe(train={"steps": 2})
    with pytest.raises(DivergedError, match=r"the adapter makes the model's logits NaN or infinite") as caught:
        tune_with_rates(recipe, [1.0, 1e32])
    assert caught.value.exit_code == 5
    assert not (Path(recipe.output) / "adapter").exists()


def test_after_such_a_step_the_run_ends_with_the_best_evaluation(make_recipe: Make) -> None:
    recipe = make_recipe(evaluate=True, train={"steps": 3, "eval_every": 1})
    tune_with_rates(recipe, [1.0, 1.0, 1e32])
    manifest = json.loads((Path(recipe.output) / "manifest.json").read_text())
    assert manifest["finished"] is True and manifest["metrics"]["best_step"] == 2
    assert verify(Path(recipe.output) / "adapter", precision="fp32").exact

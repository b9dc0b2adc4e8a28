"""The choice of the best evaluation: its metric, its direction, and never a non-finite value."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from budwood.cli.app import run as command
from budwood.contract.discovery import PluginError
from budwood.contract.types import BestMetric, Run
from budwood.model.text_tasks import CausalLM
from budwood.recipe.schema import Recipe
from budwood.training import setup
from budwood.training.loop import train, tune
from budwood.training.report import Report

Make = Callable[..., Recipe]
NAN, INF = math.nan, math.inf


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[torch.Tensor]]]:
    """Function `script(name=values, …)`: scripts the metrics of evaluations; returns the parameters at each."""

    def set_metrics(**metrics: Sequence[float]) -> list[list[torch.Tensor]]:
        seen: list[list[torch.Tensor]] = []

        def measure(self: Any, run: Run, noise: Any = None) -> dict[str, float]:
            seen.append([p.detach().clone() for p in run.trainable])
            return {name: values[len(seen) - 1] for name, values in metrics.items()}

        monkeypatch.setattr(CausalLM, "measure", measure)
        return seen

    return set_metrics


def same(run: Run, parameters: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, kept) for p, kept in zip(run.trainable, parameters, strict=True))


@pytest.mark.parametrize(
    ("higher", "best", "steps"),
    [(True, 3, 5), (False, 2, 4)],
)
def test_the_direction_decides_the_best_and_the_patience(
    make_recipe: Make, script: Any, monkeypatch: pytest.MonkeyPatch, higher: bool, best: int, steps: int
) -> None:
    """Evaluations of steps 0 to 6. The loss would have chosen step 1."""
    monkeypatch.setattr(CausalLM, "best_metric", "eval_token_accuracy")
    monkeypatch.setattr(CausalLM, "lower_is_better", not higher)
    seen = script(
        eval_loss=[9, 0, 5, 5, 5, 5, 5], eval_token_accuracy=[0.9, 0.5, 0.2, 0.8, 0.7, 0.6, 0.5]
    )  # fmt: skip
    run = tune(make_recipe(evaluate=True, train={"steps": 6, "eval_every": 1, "patience": 2}), quiet=True)
    assert run.step == steps
    assert run.metrics["best_step"] == best
    assert same(run, seen[best])
    manifest = json.loads((run.directory / "manifest.json").read_text())
    assert manifest["best_metric"] == {"name": "eval_token_accuracy", "higher": higher}


def test_the_highest_accuracy_of_a_classifier_is_kept(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """A custom task with real accuracies; the last learning rate destroys what was learned."""
    from budwood.model.text_tasks import SequenceClassification

    monkeypatch.setattr(SequenceClassification, "best_metric", "eval_accuracy")
    monkeypatch.setattr(SequenceClassification, "lower_is_better", False)
    rows = [{"text": f"{word} things number {i}", "label": word} for i in range(16) for word in ("games", "fonts")]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = make_recipe(
        base={"task": "sequence-classification"}, data={"train": str(path), "eval": str(path)},
        train={"steps": 30, "eval_every": 2, "micro_tokens": 256, "learning_rate": 3e-3},
    )  # fmt: skip
    run, hooks, engine = setup.prepare(recipe, report := Report(quiet=True), False)
    run.scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda n: -100.0 if n >= 28 else 1.0)
    train(run, hooks, engine, report)
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    result = {line["step"]: line["eval_accuracy"] for line in lines if line["kind"] == "evaluation" and line["step"]}
    assert result[30] < max(result.values())
    assert run.metrics["eval_accuracy"] == max(result.values())
    assert run.metrics["best_step"] == next(step for step, value in result.items() if value == max(result.values()))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_non_finite_metric_is_reported_once_and_never_the_best(
    make_recipe: Make, script: Any, said: list[str], bad: float
) -> None:
    seen = script(eval_loss=[2.0, bad, 1.0, bad, 1.5], eval_perplexity=[1.0] * 5)
    run = tune(make_recipe(evaluate=True, train={"eval_every": 1}))
    warned = [line for line in said if "such an evaluation" in line]
    assert warned == [f"warning: step 1: eval_loss is {bad}; such an evaluation never counts as the best"]
    assert run.metrics["best_step"] == 2 and run.metrics["eval_loss"] == 1.0
    assert same(run, seen[2])


def test_without_a_finite_evaluation_the_last_adapter_is_written_and_json_stays_valid(
    make_recipe: Make, script: Any, said: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script(eval_loss=[NAN] * 5)
    recipe = make_recipe(evaluate=True, train={"eval_every": 2, "patience": 9})
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert command(["tune", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert shown["metrics"]["eval_loss"] is None and shown["before"] == {"eval_loss": None}
    assert shown["metrics"]["best_step"] == 4
    for name in ("manifest.json", "adapter/budwood.json"):
        result = json.loads((Path(recipe.output) / name).read_text(), parse_constant=refuse)
        assert result["metrics"]["eval_loss"] is None
    for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert command(["tune", str(path), "--json", "--resume"]) == 0, "the finished run is read back"
    assert json.loads(capsys.readouterr().out, parse_constant=refuse)["metrics"]["eval_loss"] is None


def test_a_strategy_chooses_another_metric(make_recipe: Make, test_strategies: Any, said: list[str]) -> None:
    recipe = make_recipe(strategies=["lora", "reward"], evaluate=True, train={"eval_every": 1})
    run = tune(recipe)
    assert run.metrics["best_step"] == 2 and run.metrics["eval_reward"] == 3.0
    assert "reward: 2.0000 before, 3.0000 after" in said


def test_a_missing_best_metric_names_the_strategy_that_chose_it(make_recipe: Make, test_strategies: Any) -> None:
    recipe = make_recipe(strategies=["lora", {"reward": {"metric": "eval_rewrad"}}], evaluate=True)
    with pytest.raises(PluginError) as caught:
        tune(recipe, quiet=True)
    assert str(caught.value).startswith(
        "strategy 'reward' (budwood-test-strategies 1.0) chose 'eval_rewrad' as the best metric, but the evaluation of "
        "step 0 returned only eval_reward, eval_loss, "
    )


def test_a_task_whose_metric_is_missing_is_named(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalLM, "best_metric", "eval_wer")
    with pytest.raises(PluginError, match=r"task 'causal-lm' \(budwood .*\) chose 'eval_wer' as the best metric"):
        tune(make_recipe(evaluate=True), quiet=True)


def test_a_best_metric_of_the_wrong_type_is_rejected(make_recipe: Make, test_strategies: Any) -> None:
    recipe = make_recipe(strategies=["lora", {"reward": {"plain": True}}])
    with pytest.raises(PluginError, match="'reward' .*: run.best_metric must be a BestMetric, not 'eval_reward'"):
        tune(recipe, quiet=True)


def test_a_resumed_run_with_another_best_metric_starts_the_choice_over(
    make_recipe: Make, test_strategies: Any, said: list[str]
) -> None:
    """An accuracy of 0.9 is no better than a loss of 0.2."""
    train_ = {"steps": 3, "eval_every": 1, "save_every": 1}
    tune(make_recipe(evaluate=True, train=train_))
    (make_recipe().output / "manifest.json").write_text(
        (make_recipe().output / "manifest.json").read_text().replace('"finished": true', '"finished": false')
    )
    recipe = make_recipe(strategies=[{"lora": {"rank": 4}}, "reward"], evaluate=True, train={**train_, "steps": 5})
    run = tune(recipe, resume=True, accept_changes=True)
    assert any("the best evaluation so far was chosen by eval_loss; the choice starts over by eval_reward" in line
               for line in said)  # fmt: skip
    assert run.metrics["best_step"] == 3, "the first evaluation after the resume; the others are equally good"
    assert BestMetric("eval_reward", True) == run.best_metric

"""`budwood eval` reproduces a run's metrics to the digit: every setting that affects them is recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.conftest import write_rows

from budwood.cli.app import run as command
from budwood.contract.types import Run
from budwood.model import evaluation
from budwood.model.halves.chain import Chain
from budwood.recipe.schema import Recipe
from budwood.training.evaluate import evaluate_adapter
from budwood.training.loop import tune

Make = Callable[..., Recipe]
LORA = {"lora": {"rank": 4}}
ADALORA = {"adalora": {"initial_rank": 4, "target_rank": 2, "initial_phase": 1, "final_phase": 2, "interval": 1}}
ADAPTERS = {
    "lora": [LORA],
    "adalora": [ADALORA],
    "ema": [LORA, {"ema": {"decay": 0.7}}],
    "dropout and head": [{"lora": {"rank": 4, "dropout": 0.3, "modules_to_save": ["lm_head"], "dora": True}}],
}
EVAL = {"steps": 4, "eval_every": 2, "eval_generate": 3, "micro_tokens": 64}
"""Several packed rows per evaluation, and generated answers to some prompts."""


def recorded(run: Run) -> dict[str, float]:
    """Return the evaluation metrics in the adapter's manifest."""
    metrics = json.loads((run.directory / "adapter" / "budwood.json").read_text())["metrics"]
    return {name: value for name, value in metrics.items() if name.startswith("eval_")}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("strategies", ADAPTERS.values(), ids=ADAPTERS)
def test_the_metrics_of_a_run_are_reproduced_to_the_digit(
    make_recipe: Make, strategies: list[Any], quantization: str
) -> None:
    """Rows are truncated, batches are small, and the best evaluation is recorded."""
    recipe = make_recipe(
        strategies=strategies, evaluate=True, base={"quantization": quantization}, data={"max_length": 64}, train=EVAL
    )
    run = tune(recipe, quiet=True)
    assert run.packed
    again = evaluate_adapter(run.directory / "adapter", Path(recipe.data.eval), quiet=True)
    assert again.adapter == recorded(run) and "eval_exact_match" in again.adapter
    assert again.base == run.before


@pytest.mark.parametrize("options", [{}, {"bias": "lora_only"}, {"bias": "all", "targets": ["q_proj"]}], ids=str)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_run_and_its_adapter_evaluate_with_the_operations_of_training(
    make_recipe: Make, tiny_bases: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, options: Any, quantization: str
) -> None:
    """Also where the adapter replaces biases, with any of its linears adapted."""
    passes: list[Chain] = []
    original = Chain.__call__

    def counted(chain: Chain, *arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            passes.append(chain)
        return original(chain, *arguments)

    monkeypatch.setattr(Chain, "__call__", counted)
    base = {"model": str(tiny_bases("biases", attention_bias=True)), "quantization": quantization}
    strategies, train = [{"lora": {"rank": 4, **options}}], EVAL | {"eval_generate": 0}
    recipe = make_recipe(strategies=strategies, evaluate=True, base=base, train=train)
    run = tune(recipe, quiet=True)
    in_run = len(passes)
    again = evaluate_adapter(run.directory / "adapter", Path(recipe.data.eval), quiet=True)
    assert again.adapter == recorded(run) and again.base == run.before
    assert in_run == 3 * (len(passes) - in_run) / 2 > 0  # before, half-way and at the end; with and without the adapter


@pytest.mark.parametrize(
    ("base", "train"),
    [
        ({"quantization": "nf4", "double_quantization": False}, {}),
        ({"quantization": "int8"}, {}),
        ({}, {"precision": "bf16"}),
        ({"quantization": "nf4"}, {"precision": "bf16", "micro_tokens": 1000}),
        ({}, {"steps": 8, "eval_every": 3, "learning_rate": 0.3}),
    ],
)
def test_in_every_setting_of_a_recipe(make_recipe: Make, base: dict[str, Any], train: dict[str, Any]) -> None:
    recipe = make_recipe(evaluate=True, base=base, data={"max_length": 64}, train=EVAL | train)
    run = tune(recipe, quiet=True)
    again = evaluate_adapter(run.directory / "adapter", Path(recipe.data.eval), quiet=True)
    assert again.adapter == recorded(run)


def test_if_the_run_padded_its_rows(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a run whose teacher does not support packed rows."""
    from budwood.training import setup

    check = setup.check_packing

    def padded(run: Run, report: Any) -> None:
        check(run, report)
        run.packed = False

    with monkeypatch.context() as patch:
        patch.setattr(setup, "check_packing", padded)
        recipe = make_recipe(evaluate=True, train=EVAL, data={"max_length": 64})
        run = tune(recipe, quiet=True)
    assert not run.packed
    again = evaluate_adapter(run.directory / "adapter", Path(recipe.data.eval), quiet=True)
    assert again.adapter == recorded(run)


def test_a_classifier(make_recipe: Make, tmp_path: Path) -> None:
    rows = [{"text": f"{word} things number {i}", "label": word} for i in range(9) for word in ("games", "fonts", "x")]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = make_recipe(
        base={"task": "sequence-classification"}, data={"train": str(path), "eval": str(path), "max_length": 64},
        train=EVAL,
    )  # fmt: skip
    run = tune(recipe, quiet=True)
    assert evaluate_adapter(run.directory / "adapter", path, quiet=True).adapter == recorded(run)


def test_if_an_evaluation_of_the_run_ran_out_of_memory(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, said: list[str], tmp_path: Path
) -> None:
    """The evaluation is repeated with smaller batches, whose size is recorded."""
    attempt, tried = evaluation._attempt, []

    def scarce(run: Run, made: Any, *rest: Any) -> Any:
        tried.append(run.step)
        if run.step == 8 and tried.count(run.step) > 1 and run.eval_tokens == 128 and len(made.result().keys) > 1:
            return None
        return attempt(run, made, *rest)

    rows = str(write_rows(tmp_path / "many.jsonl", 40, seed=2))
    recipe = make_recipe(evaluate=True, train=EVAL | {"steps": 8, "micro_tokens": 128}, data={"eval": rows})
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "_attempt", scarce)
        run = tune(recipe)
    assert any("out of memory: from now on, evaluation batches have at most" in line for line in said)
    assert run.eval_tokens < 70 and run.metrics["best_step"] == 8
    again = evaluate_adapter(run.directory / "adapter", Path(recipe.data.eval), quiet=True)
    assert again.adapter == recorded(run)


def test_the_command_in_a_separate_process_with_other_threads(make_recipe: Make, forked: None) -> None:
    recipe = make_recipe(evaluate=True, train=EVAL, data={"max_length": 64})
    run = tune(recipe, quiet=True)
    line = ["eval", str(run.directory / "adapter"), "--data", str(recipe.data.eval), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "budwood", *line],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert json.loads(done.stdout)["adapter"] == recorded(run)


def test_a_run_that_generated_no_answers_is_evaluated_without_any(make_recipe: Make) -> None:
    recipe = make_recipe(evaluate=True, train={"steps": 1, "eval_generate": 0})
    adapter = tune(recipe, quiet=True).directory / "adapter"
    assert "eval_exact_match" not in evaluate_adapter(adapter, quiet=True).adapter
    assert "eval_exact_match" in evaluate_adapter(adapter, generate=2, quiet=True).adapter


def test_a_requested_different_setting_is_used_and_reported(
    make_recipe: Make, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(evaluate=True, train=EVAL, data={"max_length": 64})
    run = tune(recipe, quiet=True)
    adapter, data = str(run.directory / "adapter"), str(recipe.data.eval)
    assert command(["eval", adapter, "--data", data, "--json", "--max-length", "12"]) == 0
    assert any("truncated at 12" in line for line in said)
    assert not any("the metrics may differ" in line for line in said)
    assert command(["eval", adapter, "--data", data, "--json", "--precision", "bf16", "--device", "cpu"]) == 0
    (note,) = [line for line in said if "the metrics may differ" in line]
    assert "in bfloat16, quantization none; its run used" in note
    assert command(["eval", adapter, "--data", data, "--device", "tpu"]) == 2
    assert torch.get_num_threads() == 1, "the thread count is restored"

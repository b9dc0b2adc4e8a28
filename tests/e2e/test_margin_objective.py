"""A third party's objective on preference pairs, installed as a package."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tests.conftest import make_base

from .test_strategy_packages import Environment

PACKAGE = Path(__file__).parents[1] / "fixtures" / "margin_objective"
SOURCE = PACKAGE / "budwood_margin" / "__init__.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, pairs of which the one that repeats the prompt's first word is chosen, and a recipe."""
    folder = tmp_path_factory.mktemp("margin")
    make_base(folder / "base")
    draw = random.Random(0)
    for name, count in (("train", 64), ("eval", 16)):
        rows = []
        for _ in range(count):
            chosen, rejected = draw.sample(["games", "files", "data", "model"], 2)
            rows.append(
                {"prompt": f"{chosen} {draw.randint(0, 99)}:", "chosen": f" {chosen}", "rejected": f" {rejected}"}
            )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "base": {"model": "base", "quantization": "none"},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "strategies": [{"lora": {"rank": 8}}, "pair-margin"],
        "train": {"epochs": 4, "batch_examples": 8, "learning_rate": 1e-2, "precision": "fp32"},
        "output": "run",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


@pytest.mark.slow
def test_an_objective_on_pairs_plans_trains_and_evaluates(folder: Path) -> None:
    assert len(SOURCE.read_text().splitlines()) <= 60
    environment = Environment(folder / "venv")
    environment.pip("install", "--no-deps", "--no-build-isolation", str(PACKAGE))
    (folder / "plain.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    plan, tune, evaluation, wrong = environment.budwood(
        ["plan", "recipe.yaml"],
        ["tune", "recipe.yaml"],
        ["eval", "run/adapter", "--data", "eval.jsonl", "--json"],
        ["tune", "recipe.yaml", "-o", "data.train=plain.jsonl", "-o", "output=wrong"],
        cwd=folder,
    )
    assert plan.code == tune.code == evaluation.code == 0, (plan, tune, evaluation)
    assert "pair-margin" in plan.out
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    assert manifest["best_metric"] == {"name": "eval_pair_accuracy", "higher": True}
    assert manifest["before"]["eval_pair_accuracy"] == 0, "without training, no answer has gained"
    assert manifest["metrics"]["eval_pair_accuracy"] > 0.75, "it learns on held-out pairs"
    assert json.loads(evaluation.out)["adapter"]["eval_loss"] == manifest["metrics"]["eval_loss"]
    assert (wrong.code, wrong.err.count("error:")) == (2, 1)
    assert "pair-margin" in wrong.err and "trains on preference pairs" in wrong.err

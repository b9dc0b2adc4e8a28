"""A third party's numeric task, without a tokenizer or text, installed as a package."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tests.conftest import make_base

from .test_strategy_packages import Environment

PACKAGE = Path(__file__).parents[1] / "fixtures" / "number_task"
SOURCE = PACKAGE / "budwood_numbers" / "__init__.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without a tokenizer, y = 3 x1 - 2 x2 as rows, and a recipe."""
    folder = tmp_path_factory.mktemp("numbers")
    for file in make_base(folder / "base").iterdir():
        if "token" in file.name or "chat" in file.name:
            file.unlink()
    draw = random.Random(0)
    for name, count in (("train", 96), ("eval", 32)):
        pairs = [(draw.uniform(-1, 1), draw.uniform(-1, 1)) for _ in range(count)]
        rows = [json.dumps({"x1": a, "x2": b, "y": 3 * a - 2 * b}) for a, b in pairs]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    recipe = {
        "base": {"model": "base", "quantization": "none", "task": "number-regression"},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "strategies": [{"lora": {"rank": 8}}],
        "train": {"epochs": 5, "batch_tokens": 16, "learning_rate": 5e-3, "precision": "fp32"},
        "output": "run",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


@pytest.mark.slow
def test_a_numeric_task_trains_evaluates_saves_and_loads(folder: Path) -> None:
    assert len(SOURCE.read_text().splitlines()) <= 60
    environment = Environment(folder / "venv")
    environment.pip("install", "--no-deps", "--no-build-isolation", str(PACKAGE))
    bad = folder / "bad.jsonl"
    bad.write_text('{"x1": 1, "x2": null, "y": 2}\n')
    plan, data, tune, evaluation, verify, wrong = environment.budwood(
        ["plan", "recipe.yaml"],
        ["data", "recipe.yaml"],
        ["tune", "recipe.yaml"],
        ["eval", "run/adapter", "--data", "eval.jsonl", "--json"],
        ["adapter", "verify", "run/adapter"],
        ["eval", "run/adapter", "--data", "bad.jsonl"],
        cwd=folder,
    )
    assert plan.code == data.code == tune.code == evaluation.code == verify.code == 0, (plan, data, tune, evaluation)
    assert "numbers [2]" in data.out
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    before, after = manifest["before"]["eval_loss"], manifest["metrics"]["eval_loss"]
    assert after < before / 2, "it learns"
    assert json.loads(evaluation.out)["adapter"]["eval_loss"] == after, "the saved adapter is the evaluated one"
    assert json.loads(evaluation.out)["adapter"]["eval_absolute_error"] > 0
    assert "4 golden" in verify.out
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert "bad.jsonl:1: field 'x2' must be a finite number, not None" in wrong.err

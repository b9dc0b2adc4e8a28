"""`budwood data`, run through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from budwood.cli.app import run

RECIPE = """
base: {{model: {base}}}
data: {{train: {train}, eval: {train}, max_length: 64}}
strategies: [lora]
"""


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path) -> Path:
    train = tmp_path / "train.jsonl"
    rows = [{"prompt": f"Section: games {i}. Description:", "completion": " a small library"} for i in range(9)]
    train.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "x", "completion": ""}]))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(base=tiny_base, train=train))
    return path


def test_shows_the_loss_mask(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", str(recipe), "-n", "2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("⟦ a small library<eos>⟧") == 2
    assert "<bos>Section: games 0. Description:" in out
    assert "read as prompt + completion for causal-lm" in out
    assert "9 of 10 rows" in out
    assert "dropped: 1 empty completion" in out
    assert "9 also in the training data" in out


def test_json(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", str(recipe), "--json", "-o", "data.max_length=40"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["train"]["max_length"] == 40
    assert report["train"]["examples"] + sum(report["train"]["dropped"].values()) == 10
    assert report["steps_per_epoch"] == 3


def test_invalid_data_is_a_one_line_error(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recipe.parent / "train.jsonl").write_text('{"prompt": "x", "completion": "y"}\n{"prompt": null}\n')
    assert run(["data", str(recipe)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {recipe.parent / 'train.jsonl'}:2: field 'prompt' must be text, not null.\n"

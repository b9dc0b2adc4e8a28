"""`budwood sweep`: a real one of two trials, and what it refuses before anything runs."""

import json
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from budwood.cli.app import run as command
from budwood.cli.sweep import _evaluated_at_the_end
from budwood.recipe.schema import load_recipe
from budwood.sweeps.space import Field


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"section {i % 7}:", "completion": f" files {i % 5}"} for i in range(20)]
    for name in ("train", "eval", "test"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("small.yaml").write_text(
        f"base: {{model: {tiny_base}, quantization: none}}\n"
        "data: {train: train.jsonl, eval: eval.jsonl, max_length: 64}\n"
        "strategies: [lora: {rank: 2}]\n"
        "train: {steps: 2, batch_examples: 4, micro_tokens: 256, learning_rate: 1e-2, eval_generate: 0,"
        " precision: fp32}\n"
    )
    return Path("small.yaml")


@pytest.mark.plots
def test_two_trials_and_the_test_of_the_best(recipe: Path, capsys: pytest.CaptureFixture, forked: None) -> None:
    given = ["sweep", str(recipe), "-s", "lora.rank=2,4", "-o", "train.steps=1"]
    assert command([*given, "--test", "test.jsonl", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    values = {row["lora.rank"]: row["value"] for row in result["trials"]}
    assert set(values) == {2, 4} and result["higher"] is False and result["best"]["value"] == min(values.values())
    assert result["test"]["eval_loss"] == pytest.approx(result["best"]["value"], abs=1e-5)  # of the same rows
    assert "trial 1 (2 of 2): lora.rank=4" in err
    best = load_recipe("runs/small-sweep/best.yaml")  # complete, and with another output
    assert best.train.steps == 1 and best.strategies[0].options["rank"] == result["trials"][0]["lora.rank"]
    assert best.output == Path("runs/small-sweep/best")
    report = Path(result["best"]["folder"], "report.html").read_text()
    assert "<figure>" in report and "1. lora" in report and "train.jsonl" in report and report.count("<svg") > 4
    assert command(given) == 2 and "continue it with --resume" in capsys.readouterr().err
    assert command([*given, "--resume"]) == 0 and "continues a sweep of 2 trials" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the space is empty"),
        (["-s", "lora.rnk=2,4"], "-s lora.rnk=2,4: lora.rnk: unknown key. Did you mean 'rank'?"),
        (["-s", "loar.rank=2,4"], "-s loar.rank=2,4: the recipe has no 'loar'. Did you mean 'lora'?"),
        (["-s", "train.learning_rat=1,2"], "Did you mean 'learning_rate'?"),
        (["-s", "lora.rank=0..4"], "-s lora.rank=0..4: lora.rank: must be greater"),
        (["-s", "train.steps=1,2", "-s", "train.epochs=1,2"], "-s train.steps=1,2: train.steps: cannot be combined"),
        (["-s", "lora.rank=2,4", "-o", "data.eval=none"], "a sweep compares evaluations"),
        (["-s", "lora.rank=2,4", "--test", "eval.jsonl"], "--test eval.jsonl: is data.eval of the recipe"),
        (["-s", "lora.rank=2,4", "--test", "none.jsonl"], "no such file"),
        (["-s", "lora.rank=2,4", "--direction", "up"], "write lower or higher"),
        (["-s", "lora.rank=2,4", "--output", "small.yaml"], "is a file"),
    ],
)
def test_bad_input(recipe: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert command(["sweep", str(recipe), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not Path("runs").exists()


@pytest.mark.parametrize(
    ("overrides", "searched", "told"),
    [
        ("train.steps=2", "lora.rank", True),
        ("train.steps=null train.epochs=2", "lora.rank", True),
        ("train.steps=null", "train.epochs", True),
        ("train.steps=null", "lora.rank", False),  # epochs are chosen, and an evaluation after each
        ("train.eval_every=1", "lora.rank", False),
        ("train.steps=2", "train.eval_every", False),
        ("train.steps=null train.epochs=2", "train.patience", False),
    ],
)
def test_it_says_if_no_trial_can_stop_early(recipe: Path, overrides: str, searched: str, told: bool) -> None:
    field = Field(searched, f"-s {searched}=2,4", (2, 4))
    assert _evaluated_at_the_end(load_recipe(recipe, overrides.split()), [field]) is told


def test_without_optuna(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    assert command(["sweep", str(recipe), "-s", "lora.rank=2,4"]) == 3
    assert "pip install 'budwood[sweep]'" in capsys.readouterr().err

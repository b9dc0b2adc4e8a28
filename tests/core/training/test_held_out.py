"""Runs that hold out part of their training data: never trained on, recorded, evaluated, and evaluated again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.core.conftest import write_rows

from budwood.cli.app import run as command
from budwood.contract.types import Run
from budwood.data.build import overlap
from budwood.errors import InputError
from budwood.recipe.schema import Recipe
from budwood.training.evaluate import evaluate_adapter
from budwood.training.loop import tune

Make = Callable[..., Recipe]
TRAIN = {"steps": 4, "eval_every": 2, "eval_generate": 3, "micro_tokens": 256}


def recorded(run: Run) -> dict[str, float]:
    """Return the evaluation metrics in the adapter's manifest."""
    metrics = json.loads((run.directory / "adapter" / "budwood.json").read_text())["metrics"]
    return {name: value for name, value in metrics.items() if name.startswith("eval_")}


def many(tmp_path: Path, count: int = 220) -> dict[str, Any]:
    return {"train": str(write_rows(tmp_path / "many.jsonl", count)), "max_length": 128}


def check_run(run: Run) -> None:
    """Check that no held-out row is trained on, and that `budwood eval` reproduces its metrics."""
    assert run.eval_examples is not None and len(run.eval_examples) == len(run.held_out)
    assert not set(run.examples.row_numbers) & set(run.held_out) and overlap(run.examples, run.eval_examples) == 0
    again = evaluate_adapter(run.directory / "adapter", quiet=True)
    assert again.adapter == recorded(run)


def test_a_run_without_data_eval_holds_out_and_evaluates(make_recipe: Make, tmp_path: Path, said: list[str]) -> None:
    run = tune(make_recipe(data=many(tmp_path), train=TRAIN))
    (line,) = [line for line in said if line.startswith("held out")]
    assert line == "held out for evaluation: 11 of 220 examples (11 rows); data.eval: none trains on them too"
    assert len(run.examples) == 209 and run.metrics["best_step"] in (2, 4)
    assert any(line.startswith("loss: ") and "before" in line for line in said)
    check_run(run)
    again = tune(make_recipe("from the token cache", data=many(tmp_path), train=TRAIN), quiet=True)
    assert recorded(again) == recorded(run) and again.held_out == run.held_out


def test_none_trains_on_everything_and_evaluates_nothing(make_recipe: Make, tmp_path: Path, said: list[str]) -> None:
    run = tune(make_recipe(data={**many(tmp_path), "eval": "none"}))
    assert len(run.examples) == 220 and run.eval_examples is None and not run.before
    assert not any("held out" in line for line in said)
    with pytest.raises(InputError, match="its run evaluated nothing: name data to evaluate on with --data FILE"):
        evaluate_adapter(run.directory / "adapter")


def test_a_file_that_the_run_evaluated_on_is_the_default(make_recipe: Make, tmp_path: Path) -> None:
    own = write_rows(tmp_path / "own.jsonl", 12)
    run = tune(make_recipe(data={**many(tmp_path), "eval": str(own)}, train=TRAIN), quiet=True)
    adapter = run.directory / "adapter"
    assert evaluate_adapter(adapter, quiet=True).adapter == recorded(run)
    attacked = evaluate_adapter(adapter, attacks=["typos:rate=0.2"], quiet=True)
    assert attacked.adapter == recorded(run) and len(attacked.attacks) == 1
    own.write_text(own.read_text() * 2)
    with pytest.raises(InputError, match="own.jsonl has changed since the run of .*adapter, so the rows"):
        evaluate_adapter(adapter, quiet=True)
    own.unlink()
    with pytest.raises(InputError, match="own.jsonl: no such file"):
        evaluate_adapter(adapter, quiet=True)


def test_a_small_file_says_why_nothing_is_held_out(make_recipe: Make, said: list[str]) -> None:
    run = tune(make_recipe())
    assert run.eval_examples is None and not run.held_out
    assert any("nothing was held out" in line and "only 24 examples" in line for line in said)
    with pytest.raises(InputError, match=r"train.eval_every: needs evaluation data, but .* only 24 examples"):
        tune(make_recipe("other", train={"eval_every": 2}), quiet=True)


def test_a_resumed_run_holds_out_the_same_rows_even_with_another_seed(make_recipe: Make, tmp_path: Path) -> None:
    data = many(tmp_path)
    first = tune(make_recipe(data=data, train={**TRAIN, "save_every": 2}), quiet=True)
    manifest = first.directory / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "finished": False}))
    assert json.loads(manifest.read_text())["data"]["held_out"] == first.held_out
    recipe = make_recipe(data=data, train={**TRAIN, "steps": 6, "seed": 5})
    second = tune(recipe, resume=True, accept_changes=True, quiet=True)
    assert second.step == 6 and second.held_out == first.held_out
    check_run(second)
    other = tune(make_recipe("other", data=data, train={**TRAIN, "seed": 5}), quiet=True)
    assert other.held_out != first.held_out


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_classifier_of_weighted_sources_with_groups(
    make_recipe: Make, tmp_path: Path, quantization: str, said: list[str]
) -> None:
    for name in ("a", "b"):
        rows = [
            {"text": f"{word} things {name} {i}", "label": word, "source": f"{name}{i // 2}", "number": i}
            for i in range(30) for word in ("games", "fonts", "x")
        ]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sources = [{"path": str(tmp_path / "a.jsonl"), "weight": 2}, str(tmp_path / "b.jsonl")]
    run = tune(
        make_recipe(
            base={"task": "sequence-classification", "quantization": quantization},
            data={"train": sources, "group_by": "source", "max_length": 64}, train=TRAIN,
        ),
    )  # fmt: skip
    assert any(line.endswith("columns ignored: number") for line in said), said
    assert run.eval_examples is not None
    source_of = [{run.examples.rows[i]["source"] for i in e.row_numbers} for e in (run.examples, run.eval_examples)]
    assert not source_of[0] & source_of[1]
    check_run(run)


def test_the_command_evaluates_again_under_an_attack_and_refuses_changed_data(
    make_recipe: Make, tmp_path: Path, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = many(tmp_path)
    adapter = str(tune(make_recipe(data=data, train=TRAIN), quiet=True).directory / "adapter")
    assert command(["eval", adapter, "--attack", "typos:rate=0.5", "--generate", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["attacks"]["typos:rate=0.5"]["eval_loss"] != result["adapter"]["eval_loss"]
    assert any(line.startswith("typos") and "of 11 rows changed" in line for line in said)
    write_rows(Path(data["train"]), 220, seed=9)
    assert command(["eval", adapter]) == 2
    assert "many.jsonl has changed since" in capsys.readouterr().err


def test_fields_that_would_do_nothing_are_refused(make_recipe: Make) -> None:
    with pytest.raises(InputError, match="train.eval_every: needs data.eval"):
        make_recipe(data={"eval": "none"}, train={"patience": 1, "eval_every": 1})
    with pytest.raises(InputError, match="data.group_by: decides what is held out"):
        make_recipe(evaluate=True, data={"group_by": "topic"})
    assert make_recipe(data={"eval": "./none"}).data.evaluated == Path("none").absolute()

"""`budwood eval --attack`: rejected attacks, the inputs of an attack, and the metrics under it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.conftest import write_rows

from budwood import Attack, InputError, Options, PluginError, Step
from budwood.cli import app as cli
from budwood.training.evaluate import evaluate_adapter
from budwood.training.evaluation_inputs import build_attacks
from budwood.training.loop import tune


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pdg", "attack 'pdg' is not installed. Did you mean 'pgd'? Installed: pgd, typos."),
        ("pgd:epsilon=0", "--attack pgd:epsilon=0: epsilon: must be greater than 0 (got 0)."),
        ("pgd:epsilon=.nan", "--attack pgd:epsilon=.nan: epsilon: must be a finite number (got nan)."),
        ("pgd:steps=0", "--attack pgd:steps=0: steps: must be greater than or equal to 1 (got 0)."),
        ("pgd:step=3", "--attack pgd:step=3: step: unknown key. Did you mean 'steps'?"),
        ("pgd:epsilon", "--attack pgd:epsilon: write NAME:KEY=VALUE,…, for instance pgd:steps=10."),
        ("pgd:steps=1,steps=2", "--attack pgd:steps=1,steps=2: steps is given twice."),
        ("typos:rate=2", "--attack typos:rate=2: rate: must be less than or equal to 1 (got 2)."),
    ],
)
def test_an_invalid_attack_is_reported_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        build_attacks([text])
    assert str(error.value) == message
    assert error.value.exit_code == 2


def test_a_repeated_attack_is_rejected() -> None:
    with pytest.raises(InputError, match="--attack typos: given twice"):
        build_attacks(["typos", "typos"])


@pytest.fixture
def trained(make_recipe: Callable, tmp_path: Path) -> tuple[Path, Path]:
    """An adapter that has fitted its data, and held-out data."""
    run = tune(make_recipe(train={"steps": 30, "eval_generate": 16}), quiet=True)
    return run.directory / "adapter", write_rows(tmp_path / "held-out.jsonl", 16, seed=1)


def test_clean_and_attacked_metrics_are_reported_side_by_side(trained: Any, capsys: Any, monkeypatch: Any) -> None:
    adapter, data = trained
    monkeypatch.setattr(cli, "silence_libraries", lambda debug: None)
    attacks = ["pgd:epsilon=2,steps=3", "typos:rate=0.5"]
    line = ["eval", str(adapter), "--data", str(data), "--precision", "fp32"]
    for attack in attacks:
        line += ["--attack", attack]
    assert cli.run(line) == 0
    out, err = capsys.readouterr()
    header, *rows = out.splitlines()
    assert header.split() == ["adapter", *attacks, "base"]
    table = {row.split()[0]: row.split()[1:] for row in rows}
    assert list(table) == ["loss", "token_accuracy", "perplexity", "exact_match"]
    clean, pgd, typos, _ = map(float, table["loss"])
    assert pgd > clean + 0.1
    assert typos > clean
    assert table["exact_match"][1] == "–", "nothing is generated under noise"
    assert len({len(row) for row in out.splitlines()}) == 1
    assert "typos:rate=0.5: 16 of 16 rows changed" in err

    assert cli.run([*line, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["attacks"]) == attacks
    assert result["adapter"]["eval_loss"] == pytest.approx(clean, abs=1e-4)
    assert result["attacks"][attacks[0]]["eval_loss"] == pytest.approx(pgd, abs=1e-4)
    assert "eval_exact_match" not in result["attacks"][attacks[0]]
    assert "eval_exact_match" in result["attacks"][attacks[1]]


def test_a_stronger_attack_raises_the_loss_further_and_does_not_affect_the_clean_metrics(trained: Any) -> None:
    adapter, data = trained
    attacks = [f"pgd:epsilon={epsilon},steps=3" for epsilon in (0.1, 1, 3)]
    plain = evaluate_adapter(adapter, data, precision="fp32", quiet=True)
    result = evaluate_adapter(adapter, data, precision="fp32", attacks=attacks, quiet=True)
    assert result.adapter == plain.adapter
    assert result.base == plain.base
    losses = [result.adapter["eval_loss"], *(result.attacks[attack]["eval_loss"] for attack in attacks)]
    assert losses == sorted(losses)
    assert len(set(losses)) == 4


def test_an_attack_without_effect_is_reported(trained: Any, capsys: Any) -> None:
    adapter, data = trained
    result = evaluate_adapter(adapter, data, precision="fp32", attacks=["pgd:epsilon=1e-30"])
    assert result.attacks["pgd:epsilon=1e-30"]["eval_loss"] == result.adapter["eval_loss"]
    assert "warning: pgd:epsilon=1e-30 did not raise the loss" in capsys.readouterr().err


FAILING = {
    "def noise(self, step): 1 / 0": "noise: ZeroDivisionError: division by zero. Report it to its author",
    "def noise(self, step): return 3": "noise: returned a int; it must return None or a tensor [",
    "def noise(self, step): return step.zero_noise()[0]": "it must return None or a tensor [",
    "def change(self, row, index, form): return [][0]": "change: IndexError: list index out of range. Report it",
    "def change(self, row, index, form): return None": "change: returned a NoneType; it must return the row",
    "def check(self, form, task, model): raise KeyError(form)": "check: KeyError: 'prompt-completion'. Report it",
}


def test_an_attack_that_fails_is_named(trained: Any, distribution: Callable) -> None:
    adapter, data = trained
    for number, (body, message) in enumerate(FAILING.items()):
        source = f"from budwood import Attack\nclass Mine(Attack):\n    {body}"
        distribution(f"sprout{number}", source, {f"mine{number}": "Mine"}, "budwood.attacks")
        with pytest.raises(PluginError) as error:
            evaluate_adapter(adapter, data, precision="fp32", attacks=[f"mine{number}"], generate=0, quiet=True)
        assert str(error.value).startswith(f"attack 'mine{number}' (sprout{number} 1.0), ")
        assert message in str(error.value)


def test_an_impossible_attack_is_rejected_before_the_base_loads(trained: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from budwood.training import evaluate

    monkeypatch.setattr(evaluate, "open_pool", None)
    data = tmp_path / "plain.jsonl"
    data.write_text('{"text": "some text"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="no typos for the data format 'text': its text itself is scored"):
        evaluate_adapter(trained[0], data, attacks=["typos"], quiet=True)


class Shout(Attack):
    """Records its arguments."""

    class Options(Options):
        loud: bool = True

    seen: list[Any] = []

    def change(self, row: Mapping[str, Any], index: int, form: str) -> Mapping[str, Any]:
        self.seen.append((index, form))
        return {**row, "prompt": row["prompt"].upper()}

    def noise(self, step: Step) -> torch.Tensor:
        zeros = step.zero_noise()
        gradient = step.noise_gradient(zeros)
        self.seen.append((tuple(gradient.shape), float(gradient.norm())))
        return zeros


def test_a_third_partys_attack_sees_rows_and_gradients(distribution: Callable, trained: Any, monkeypatch: Any) -> None:
    distribution("loud", "", {"shout": "Shout"}, group="budwood.attacks")
    import importlib

    importlib.import_module("loud").Shout = Shout
    Shout.seen.clear()
    adapter, data = trained
    result = evaluate_adapter(adapter, data, precision="fp32", attacks=["shout:loud=true"], quiet=True)
    assert Shout.seen[:16] == [(index, "prompt-completion") for index in range(16)]
    assert all(norm > 0 for _, norm in Shout.seen[16:])
    assert result.attacks["shout:loud=true"]["eval_loss"] != result.adapter["eval_loss"]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_attacks_on_a_classifier(make_recipe: Callable, tmp_path: Path, quantization: str) -> None:
    rows = [{"text": f"{word} things number {i}", "label": word} for i in range(8) for word in ("games", "fonts")]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = make_recipe(
        base={"task": "sequence-classification", "quantization": quantization}, data={"train": str(path)},
        train={"steps": 20, "micro_tokens": 256, "learning_rate": 3e-3},
    )  # fmt: skip
    run = tune(recipe, quiet=True)
    attacks = ["pgd:epsilon=5,norm=l2", "typos:rate=1"]
    result = evaluate_adapter(run.directory / "adapter", path, precision="fp32", attacks=attacks, quiet=True)
    assert result.adapter["eval_accuracy"] > 0.9
    assert result.attacks[attacks[0]]["eval_accuracy"] < result.adapter["eval_accuracy"]
    assert result.attacks[attacks[1]]["eval_loss"] > result.adapter["eval_loss"]
    assert "fonts" in result.report

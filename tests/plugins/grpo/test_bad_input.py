"""Invalid options and data are refused in one line, before the base loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from budwood import InputError
from budwood.model import base as bases
from budwood.recipe.schema import Recipe, load_recipe
from budwood.training import setup
from budwood.training.loop import tune
from budwood.training.preflight import preflight

Make = Callable[..., Recipe]
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"samples": 1}, r"samples: 1 leaves nothing to compare with \(baseline: group\)"),
    ({"samples": 1, "baseline": "none"}, r"samples: 1 leaves nothing to compare with \(scale: group\)"),
    ({"rewards": []}, "rewards: name at least one, such as - exact-match"),
    (
        {"rewards": [{"exact-mach": {}}]},
        r"rewards\[0\]: reward 'exact-mach' is not installed. Did you mean 'exact-match'",
    ),
    ({"rewards": ["mine.py:hit"]}, r"rewards\[0\]: write .* - file: \{path: mine.py, function: hit\}"),
    ({"rewards": ["regex"]}, r"rewards\[0\]: regex\.pattern: missing"),
    ({"rewards": [{"regex": {"patern": "e"}}]}, r"regex\.patern: unknown key. Did you mean 'pattern'"),
    ({"rewards": [{"regex": {"pattern": "e", "weight": 0}}]}, r"weight must be a number other than 0, not 0"),
    ({"rewards": [{"regex": {"pattern": "e"}, "length": {}}]}, r"rewards\[0\]: write a reward's name"),
    ({"method": "grop"}, r"grpo\.method: must be .*'grpo'"),
    ({"minibatches": 5}, r"minibatches: 5 is more than samples \(4\)"),
    ({"kl_in": "reward"}, r"kl_in: needs a kl above 0"),
    ({"reference": "base"}, r"reference: needs a kl above 0"),
    ({"kl": 1, "kl_in": "token-reward"}, r"token-reward needs scale: advantages or none, not group"),
    ({"method": "reinforce++", "ratio": "sequence"}, r"token-reward gives each token its own advantage"),
    ({"unbiased_kl": True}, r"unbiased_kl: needs a kl above 0 in the loss"),
    ({"resample": 2}, r"resample: replaces only prompts that are dropped: set zero_variance: drop"),
    ({"stop": [""]}, r"an empty text would end every answer"),
]


@pytest.mark.parametrize(("options", "text"), OPTIONS)
def test_options(make_recipe: Make, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        preflight(make_recipe(options))
    assert "\n" not in str(caught.value) and "strategies" not in str(caught.value).partition(":")[2][:3]


def test_one_sample_is_enough_without_a_baseline_of_the_prompt(make_recipe: Make) -> None:
    preflight(make_recipe({"samples": 1, "method": "reinforce++"}))


def rows(path: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": str(path), "eval": "none"}


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test of this module may load a base."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(setup, "load_base", fail)
    monkeypatch.setattr(bases, "load_base", fail)


@pytest.mark.parametrize(
    ("row", "options", "sections", "text"),
    [
        ({"prompt": "a"}, {"rewards": ["exact-match"]}, {}, r"p\.jsonl:1: field 'answer' is missing; strategy 'grpo' "),
        ({"prompt": "a", "anser": "b"}, {"rewards": ["exact-match"]}, {}, r"Did you mean 'anser'\?"),
        ({"prompt": "a", "answer": None}, {"rewards": ["exact-match"]}, {}, r"p\.jsonl:1: field 'answer' is null"),
        ({"prompt": 3}, {}, {}, r"p\.jsonl:1: field 'prompt' must be text"),
        ({"prompt": "  "}, {}, {}, r"its only row was dropped: empty prompt 1"),
        ({"prompt": "a", "tools": [{"name": "f"}]}, {}, {}, r"field 'tools' needs a chat template"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, {}, {}, r"'prompt' ends with an assistant's message"),
        ({"prompt": "a " * 300}, {}, {}, r"longer than max_length allows 1\. Raise data\.max_length"),
        ({"text": "a b c"}, {}, {}, r"p\.jsonl has texts without prompts: give the column 'prompt'"),
        ({"prompt": "a", "completion": "b", "weight": 2}, {}, {}, r"weights of rows have no effect on rewards"),
        ({"prompt": "a"}, {"max_new_tokens": 512}, {}, r"max_new_tokens: 512 fills the base's 512 positions"),
        (
            {"text": "a", "label": "b"},
            {},
            {"base": {"task": "sequence-classification"}},
            r"generates no text to reward",
        ),
        ({"prompt": "a"}, {"rewards": [{"json-schema": {"path": "none.json"}}]}, {}, r"none\.json: No such file"),
        ({"prompt": "a"}, {"rewards": [{"adapter-log-prob": {"adapter": "none"}}]}, {}, r"'adapter_log_prob': .*none"),
    ],
)
def test_data(
    make_recipe: Make, tmp_path: Path, unloaded: None, row: dict[str, Any], options: dict[str, Any],
    sections: dict[str, Any], text: str,
) -> None:  # fmt: skip
    recipe = make_recipe(options, data=rows(tmp_path / "p.jsonl", row), **sections)
    with pytest.raises(InputError, match=text) as caught:
        tune(recipe, quiet=True)
    assert "\n" not in str(caught.value)


def test_a_teachers_cache_cannot_hold_answers_that_are_sampled(make_recipe: Make, unloaded: None) -> None:
    recipe = make_recipe(others=({"distillation": {"teacher": "base", "cache": "teacher"}},), completions=True)
    with pytest.raises(InputError, match=r"cache: holds outputs for the data, but strategy 'grpo' .* generates"):
        tune(recipe, quiet=True)


def test_prompts_need_a_strategy_and_something_to_measure(make_recipe: Make, unloaded: None) -> None:
    recipe = make_recipe()
    with pytest.raises(
        InputError, match=r"prompt are prompts without answers, which need an objective: add a strategy such as grpo"
    ):
        tune(recipe.model_copy(update={"strategies": recipe.strategies[:1]}), quiet=True)
    measured = make_recipe(data={"eval": recipe.data.train}, train={"eval_generate": 0})
    with pytest.raises(InputError, match=r"eval_generate: 0 leaves prompts nothing to be evaluated by"):
        tune(measured, quiet=True)


def test_a_python_file_runs_only_if_the_user_allows_it(
    make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], forked: None
) -> None:
    from budwood.cli.app import run

    code = tmp_path / "mine.py"
    code.write_text("print('RAN')\ndef reward(prompts, completions, rows):\n    return [len(c) for c in completions]\n")
    recipe = make_recipe({"rewards": [{"file": {"path": str(code)}}]}, train={"steps": 1})
    path = tmp_path / "r.yaml"
    path.write_text(recipe.to_yaml())
    assert run(["tune", str(path)]) == 2
    assert run(["plan", str(path)]) == 2
    output = capsys.readouterr()
    assert "RAN" not in output.out + output.err
    assert output.err.count("r.yaml:") == 2 and output.err.count(f"would run the Python code in {code}: read it") == 2
    assert run(["plan", str(path), "--allow-code"]) == 0
    assert run(["tune", str(path), "--allow-code"]) == 0
    assert "RAN" in capsys.readouterr().out
    written = load_recipe(recipe.output / "recipe.yaml").strategies[1].options["rewards"]
    assert len(written[0]["file"]["sha256"]) == 64
    code.write_text(code.read_text() + "\n")  # a changed file is a changed run
    assert run(["tune", str(path), "--allow-code", "--resume"]) == 2
    assert "grpo.rewards[0].file.sha256: " in capsys.readouterr().err

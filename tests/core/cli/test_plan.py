"""`budwood plan`: tables or JSON on stdout, one line per problem on stderr, and the exit code."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from budwood.cli import app as cli


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Keep the signal handlers and warning filters of the test process."""
    monkeypatch.setattr(cli, "silence_libraries", lambda debug: None)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a recipe in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    Path("recipe.yaml").write_text(
        f"base: {{model: {tiny_base}}}\ndata: {{train: train.jsonl}}\nstrategies:\n  - lora: {{rank: 4}}\n"
    )
    return "recipe.yaml"


def test_the_plan_is_printed_as_tables(recipe, capsys):
    assert cli.run(["plan", recipe, "-o", "lora.rank=2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert any(line.startswith("lora ") and "rank 2" in line and "slots adapter" in line for line in lines)
    assert any(line.split() == ["backward", "core", "core"] for line in lines)


def test_the_plan_is_printed_as_json(recipe, capsys):
    assert cli.run(["plan", recipe, "--json"]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert err == ""
    assert printed["steps"] is None
    assert printed["problems"] == []
    assert [strategy["name"] for strategy in printed["strategies"]] == ["lora"]
    backward = next(hook for hook in printed["hooks"] if hook["name"] == "backward")
    assert [call["name"] for call in backward["calls"]] == ["core"]


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_every_problem_is_one_line(recipe, capsys, as_json):
    assert cli.run(["plan", recipe, "-o", "lora.rnk=1", "-o", "train.x=2", "-o", "lora.y\x1b[31m=2", *as_json]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 3
    assert all(line.startswith("error: -o ") for line in err.splitlines())
    assert "\x1b" not in err
    if as_json:
        assert len(json.loads(out)["problems"]) == 3
    else:
        assert "lora (with problems)" in out
        assert "\x1b" not in out


def test_a_missing_recipe_is_a_one_line_error(capsys):
    assert cli.run(["plan", "nothing.yaml", "--json"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: nothing.yaml: no such recipe.\n")

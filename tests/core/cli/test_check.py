"""`budwood check`: one table, go or no, and the exit code."""

from __future__ import annotations

import json
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
from tests.core.planning.test_sizes import estimate_of

from budwood.cli import app as cli
from budwood.errors import ResourceError
from budwood.planning import process


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, forked: None):
    """Keep the signal handlers of the test process, and plan nothing."""
    monkeypatch.setattr(cli, "silence_libraries", lambda debug: None)
    monkeypatch.setattr(process, "estimate_in_process", lambda *a, **k: estimate_of(640))
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a recipe in the working folder; a row is in both files, one has no answer."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"tokens {n}:", "completion": " small"} for n in range(9)]
    rows.append({"prompt": "data", "completion": ""})
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("eval.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps({"prompt": "x", "completion": "y"}) + "\n")
    Path("recipe.yaml").write_text(
        f"base: {{model: {tiny_base}, quantization: none}}\n"
        "data: {train: train.jsonl, eval: eval.jsonl, max_length: 64}\nstrategies: [lora]\n"
    )
    return "recipe.yaml"


def test_all_is_shown_in_one_table(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check", recipe]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[-1].split() == ["verdict", "go"]
    parts = ["composition", "tokenizer", "device", "chat", "data,", "memory", "time", "disk", "versions"]
    assert all(any(line.startswith(part) for line in lines) for part in parts)
    assert any("1 evaluation example" in line for line in lines)
    assert any("1 row dropped" in line and "train.jsonl:10" in line for line in lines)
    assert any(line.startswith("memory") and "at most 640 tokens" in line for line in lines)
    assert cli.run(["check", recipe, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["go"] is True and printed["problems"] == []
    assert len(printed["tokenizer_sha256"]) == len(printed["template_sha256"]) == 64
    assert printed["data"]["eval"]["overlap"] == 1 and 0 < printed["data"]["train"]["supervised_share"] < 1
    assert printed["plan"]["fits"] is True and printed["versions"]["torch"]
    assert not Path("runs").exists()


def test_the_exit_code_says_what_is_wrong(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("runs/recipe").mkdir(parents=True)
    Path("runs/recipe/manifest.json").write_text('{"budwood": "0", "finished": true}')
    assert cli.run(["check", recipe]) == 2  # the rest is checked all the same
    out = capsys.readouterr().out
    assert "holds another run" in out and "data, train" in out and out.splitlines()[-1].split()[:2] == ["verdict", "no"]
    small = estimate_of(640)
    small.host = small.device.memory + 1
    monkeypatch.setattr(process, "estimate_in_process", lambda *a, **k: small)
    assert cli.run(["check", recipe, "--overwrite", "--json"]) == 3
    printed = json.loads(capsys.readouterr().out)
    assert (
        printed["go"] is False and len(printed["problems"]) == 1 and "memory: the run needs" in printed["problems"][0]
    )
    usage = namedtuple("usage", "total used free")(1, 1, 0)
    monkeypatch.setattr(process, "estimate_in_process", lambda *a, **k: full)
    full = estimate_of(640)
    full.disk = 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert cli.run(["check", recipe, "--overwrite"]) == 3
    assert "make room" in capsys.readouterr().out
    with Path("train.jsonl").open("a") as file:
        file.write('{"prompt": 3}\n')
    assert cli.run(["check", recipe, "--overwrite"]) == 2
    assert "train.jsonl:11" in capsys.readouterr().err


def test_what_cannot_be_planned_is_a_note(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise ResourceError("plan: no")

    monkeypatch.setattr(process, "estimate_in_process", fails)
    assert cli.run(["check", recipe]) == 0
    assert any(line.split()[:3] == ["memory", "note", "not"] for line in capsys.readouterr().out.splitlines())

"""Output for readers that leave, and terminals without UTF-8; .json files that hold an object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from budwood.cli.app import run


@pytest.fixture
def rows(write: Any) -> Path:
    path: Path = write([{"prompt": "q:", "completion": " naïve\n"}] * 3)
    return path


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | options.pop("environment", {})
    return subprocess.run([sys.executable, "-m", "budwood", *arguments], env=environment, check=False, **options)


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_reader_of_the_data_report_that_has_gone_is_no_error(rows: Path, tiny_base: Path, extra: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = command("data", str(rows), "--base", str(tiny_base), *extra, stdout=writing, stderr=subprocess.PIPE)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_marks_are_readable_in_ascii(rows: Path, tiny_base: Path) -> None:
    done = command(
        "data", str(rows), "--base", str(tiny_base), capture_output=True, environment={"PYTHONIOENCODING": "ascii"}
    )
    text = done.stdout.decode("ascii")
    assert done.returncode == 0
    assert "[[ na?ve\\n" in text and "]]" in text and "[[with a loss]]" in text and "####" in text
    assert text.count("?") == text.count("na?ve"), "only the data's own characters"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('{"train": [{"prompt": "a", "completion": "b"}]}', "; its key 'train' holds one: save that list alone."),
        ('{\n "version": 1,\n "data": [\n{"prompt": "a"}]\n}\n', "; its key 'data' holds one: save that list alone."),
        ('{\n "prompt": "a",\n "completion": "b"\n}', "."),
    ],
)
def test_a_json_file_with_an_object_says_what_it_must_hold(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], text: str, hint: str
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert run(["data", str(path), "--base", str(tiny_base)]) == 2
    assert capsys.readouterr().err == f"error: {path}: must hold a list of objects, not one object{hint}\n"


def test_one_row_on_a_line_is_json_lines(tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"prompt": "a", "completion": "b", "notes": [{"x": 1}]}\n')
    assert run(["data", str(path), "--base", str(tiny_base), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["examples"] == 1

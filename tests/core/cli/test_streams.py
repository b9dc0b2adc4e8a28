"""Output to closed pipes and to terminals without UTF-8; .json files that hold an object."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.forked import forking

from budwood.cli.app import run
from budwood.cli.streams import print_piece


@pytest.fixture
def rows(write: Any) -> Path:
    path: Path = write([{"prompt": "q:", "completion": " naïve\n"}] * 3)
    return path


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | options.pop("environment", {})
    with forking():
        return subprocess.run([sys.executable, "-m", "budwood", *arguments], env=environment, check=False, **options)


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_data_report_to_a_closed_pipe_is_not_an_error(rows: Path, tiny_base: Path, extra: list[str]) -> None:
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
    assert "[[ na\\xefve\\n" in text and "]]" in text and "[[with a loss]]" in text and "####" in text
    assert text.count("\\x") == text.count("na\\xefve") and "?" not in text, "only characters of the data are escaped"


def write_in_ascii(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> str:
    """Run a command whose standard output accepts only ASCII; return what it wrote."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run(arguments) == 0
    stream.flush()
    return stream.buffer.getvalue().decode("ascii")


@pytest.mark.parametrize("words", [["plugins"], ["plugins", "lora"], ["plan"], ["generate"], ["recipe", "schema"]])
def test_every_command_writes_ascii(
    rows: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: None, words: list[str]
) -> None:
    """typer's own `echo` writes UTF-8 even to a terminal that does not support it."""
    recipe = tmp_path / "recipe.json"
    recipe.write_text(
        json.dumps({"base": {"model": str(tiny_base)}, "data": {"train": str(rows)}, "strategies": ["lora"]})
    )
    more = {
        "plan": [str(recipe)],
        "generate": [str(tiny_base), "--prompt", "x", "--max-new-tokens", "8"],
    }
    text = write_in_ascii(monkeypatch, [*words, *more.get(words[0], [])])
    assert text.strip()


def test_json_is_whole_in_ascii(rows: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_in_ascii(monkeypatch, ["data", str(rows), "--base", str(tiny_base), "--json"])
    pieces = [piece for piece, _ in json.loads(text)["samples"][0]["pieces"]]
    assert "naïve" in "".join(pieces)


def test_every_printed_mark_has_an_ascii_spelling() -> None:
    """Covers strings that core and plugins print, not their docstrings."""
    root = Path(__file__).parents[3]
    used: dict[str, str] = {}
    for path in [*root.glob("core/budwood/**/*.py"), *root.glob("plugins/*/budwood_*/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
                used |= {c: f"{path.name}:{node.lineno}" for c in node.value if not c.isascii()}
    read = {"▁", "\ufffd"}  # only compared with tokens and decoded text
    assert {c: place for c, place in used.items() if "\\" in c.encode("ascii", "budwood").decode()}.keys() <= {
        *read,
        "↵",
    }


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('{"train": [{"prompt": "a", "completion": "b"}]}', "; its key 'train' holds one: save that list alone."),
        ('{\n "version": 1,\n "data": [\n{"prompt": "a"}]\n}\n', "; its key 'data' holds one: save that list alone."),
        ('{\n "prompt": "a",\n "completion": "b"\n}', ": write [{…}]."),
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


def test_a_terminal_gets_no_control_characters_of_an_answer(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, expected in ((Terminal(), "a\ufffd[2Jb\ufffd\n\tc\u200d"), (io.StringIO(), "a\x1b[2Jb\x9b\n\tc\u200d")):
        monkeypatch.setattr(sys, "stdout", stream)
        print_piece("a\x1b[2Jb\x9b\n\tc\u200d")
        assert stream.getvalue() == expected

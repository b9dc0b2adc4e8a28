"""The documented exit codes: every command returns each code that applies to it, on input that a user could give."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
from tests.core.adapters.conftest import make_saved

from budwood.cli import app as cli

CODES = (0, 2, 3, 4, 5)
HUB = "someone/a-model-that-is-not-here"
NO_ARTIFACT = "reads no artifact"
NO_TRAINING = "does not train"
"""Reasons for which a command cannot return a code, in place of a case."""

Case = Callable[[Any], list[str]] | str
TABLE: dict[tuple[str, ...], dict[int, Case]] = {
    ("demo",): {
        0: lambda w: [w.stub("budwood_demo.demo.main", lambda output, overwrite: {"accuracy": 1.0}), "--json"],
        2: lambda w: ["--output", w.run],  # holds files of another program
        3: lambda w: ["--output", f"{w.rows}/x"],
        4: lambda w: [w.stub("budwood_demo.demo.HERE", w.corrupt_demo), "--output", w.new],
        5: "its recipes do not diverge; if one did, it would exit as `tune` does",
    },
    ("plugins",): {
        0: lambda w: ["lora"],
        2: lambda w: ["lroa"],
        3: lambda w: [w.plugin("broken", "raise RuntimeError('x')")],
        4: NO_ARTIFACT,
        5: NO_TRAINING,
    },
    ("plan",): {
        0: lambda w: [w.recipe],
        2: lambda w: [w.recipe, "-o", "lora.rank=-1"],
        3: lambda w: [w.recipe, "-o", f"base.model={HUB}"],
        4: lambda w: [w.recipe, "-o", f"base.model={w.corrupt_base}"],
        5: NO_TRAINING,
    },
    ("data",): {
        0: lambda w: [w.recipe],
        2: lambda w: [w.recipe, "-o", "data.max_length=-1"],
        3: lambda w: [w.recipe, "-o", f"base.model={HUB}"],
        4: lambda w: [w.recipe, "-o", f"base.model={w.corrupt_tokenizer}"],
        5: NO_TRAINING,
    },
    ("tune",): {
        0: lambda w: [w.recipe, "-o", f"output={w.new}", "--json"],
        2: lambda w: [w.recipe, "-o", f"output={w.run}"],
        3: lambda w: [w.recipe, "-o", "base.device=cuda:99"],
        4: lambda w: [w.recipe, "-o", f"base.model={w.corrupt_base}"],
        5: lambda w: [w.recipe, "-o", "train.learning_rate=1e-30", "-o", f"output={w.new}"],
    },
    ("eval",): {
        0: lambda w: [w.adapter, "--data", w.rows, "--generate", "0"],
        2: lambda w: [w.adapter, "--data", "nothing.jsonl"],
        3: lambda w: [w.adapter, "--data", w.rows, "--base", HUB],
        4: lambda w: [w.corrupt, "--data", w.rows],
        5: NO_TRAINING,
    },
    ("generate",): {
        0: lambda w: [w.base, "--prompt", "x", "--max-new-tokens", "1"],
        2: lambda w: [w.base, "--prompt", "x", "--adapter", "../x=y"],
        3: lambda w: [w.base, "--prompt", "x", "--device", "cuda:99"],
        4: lambda w: [w.base, "--prompt", "x", "--adapter", f"a={w.corrupt}"],
        5: NO_TRAINING,
    },
    ("doctor",): {
        0: lambda w: [w.stub("budwood.cli.doctor.checks.examine", lambda: [])],
        2: lambda w: ["--nothing"],
        3: lambda w: [w.stub("budwood.cli.doctor.checks.examine", lambda: [w.finding])],
        4: NO_ARTIFACT,
        5: NO_TRAINING,
    },
    ("new", "strategy"): {
        0: lambda w: ["mine", "--folder", w.new],
        2: lambda w: ["mine", "--folder", w.run],
        3: lambda w: ["mine", "--folder", f"{w.rows}/x/y"],
        4: NO_ARTIFACT,
        5: NO_TRAINING,
    },
    ("recipe", "schema"): {
        0: lambda w: [],
        2: lambda w: ["--nothing"],
        3: "skips a broken plugin with a warning",
        4: NO_ARTIFACT,
        5: NO_TRAINING,
    },
    ("adapter", "info"): {
        0: lambda w: [w.adapter],
        2: lambda w: ["nothing"],
        3: lambda w: [w.unreadable],
        4: lambda w: [w.corrupt],
        5: NO_TRAINING,
    },
    ("adapter", "verify"): {
        0: lambda w: [w.adapter],
        2: lambda w: ["nothing"],
        3: lambda w: [w.adapter, "--base", HUB],
        4: lambda w: [w.corrupt],
        5: NO_TRAINING,
    },
    ("adapter", "merge"): {
        0: lambda w: [w.adapter, w.new, "--dtype", "fp32"],
        2: lambda w: [w.adapter, w.run],
        3: lambda w: [w.adapter, w.new, "--device", "cuda:99"],
        4: lambda w: [w.corrupt, w.new],
        5: NO_TRAINING,
    },
    ("adapter", "export"): {
        0: lambda w: [w.adapter, w.new],
        2: lambda w: [w.adapter, w.run],
        3: lambda w: [w.adapter, f"{w.rows}/x"],
        4: lambda w: [w.corrupt, w.new],
        5: NO_TRAINING,
    },
}


def commands(group: Any = None, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield every command as a tuple of words."""
    group = group or typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*before, name))
        else:
            yield (*before, name)


def test_the_table_covers_every_command_and_code():
    assert set(commands()) == set(TABLE)
    assert all(tuple(row) == CODES for row in TABLE.values())


CASES = [
    pytest.param(words, code, case, id=f"{' '.join(words)}-{code}")
    for words, row in TABLE.items()
    for code, case in row.items()
    if not isinstance(case, str)
]


@pytest.mark.parametrize(("words", "code", "case"), CASES)
def test_a_command_returns_its_code(world, capsys, words, code, case):
    arguments = [str(argument) for argument in case(world) if argument is not None]
    before = sorted(Path().rglob("*"))
    returned = cli.run([*words, *arguments])
    out, err = capsys.readouterr()
    assert returned == code, err
    assert "Traceback" not in err
    if code == 0:
        assert "error: " not in err
    elif words != ("doctor",) or code == 2:
        assert err.splitlines()[-1].startswith("error: ")
        assert sum(line.startswith("error: ") for line in err.splitlines()) == 1 or words == ("plan",)
    if code not in (0, 5):
        assert sorted(Path().rglob("*")) == before, "partial output is left"


@pytest.mark.parametrize("words", TABLE, ids=" ".join)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_every_command(world, monkeypatch, capsys, words, number, code):
    """The signal arrives while the command is running."""
    root = command = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]
    command.callback = lambda **options: os.kill(os.getpid(), number)
    command.params = []
    monkeypatch.setattr(typer.main, "get_command", lambda app: root)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.run(list(words)) == code
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    assert out == ""
    assert err in ("error: interrupted.\n", "error: terminated.\n")


@pytest.fixture(scope="module")
def inputs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The commands' inputs; no test modifies them."""
    folder = tmp_path_factory.mktemp("things")
    rows = [{"prompt": f"question {i}:", "completion": f" answer {i}"} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = make_saved(tiny_base, folder / "adapter")
    corrupt = Path(shutil.copytree(adapter, folder / "corrupt"))
    (corrupt / "adapter_model.safetensors").write_bytes(b"\x80\x04not opened")
    corrupt_base = Path(shutil.copytree(tiny_base, folder / "corrupt-base"))
    (corrupt_base / "model.safetensors").write_bytes(b"truncated")
    corrupt_tokenizer = Path(shutil.copytree(tiny_base, folder / "corrupt-tokenizer"))
    (corrupt_tokenizer / "tokenizer.json").write_text("{")
    (folder / "run" / "name").mkdir(parents=True)
    (folder / "run" / "name" / "thesis.tex").write_text("mine")
    train = {"steps": 2, "batch_examples": 4, "learning_rate": 1e-2, "precision": "fp32", "warmup": 0}
    recipe = {
        "base": {"model": str(tiny_base), "quantization": "none"},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 64},
        "strategies": [{"lora": {"rank": 2}}],
        "train": train,
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    demo = folder / "demo"
    demo.mkdir()
    (demo / "base").symlink_to(corrupt_base)
    return SimpleNamespace(
        base=tiny_base, rows=folder / "rows.jsonl", adapter=adapter, corrupt=corrupt, corrupt_base=corrupt_base,
        corrupt_tokenizer=corrupt_tokenizer, run=folder / "run", recipe=folder / "recipe.json",
        corrupt_demo=demo,
        finding=SimpleNamespace(status="problem", topic="memory", text="none", remedy="buy some", values={}),
    )  # fmt: skip


@pytest.fixture
def world(inputs, tmp_path, monkeypatch, distribution) -> Iterator[SimpleNamespace]:
    """The inputs, an empty working folder, and helpers that stub functions and install plugins."""
    monkeypatch.setattr(cli, "silence_libraries", lambda debug: None)
    monkeypatch.delenv("BUDWOOD_DEBUG", raising=False)

    def stub(name: str, value: Any) -> None:
        monkeypatch.setattr(name, value)

    def plugin(name: str, source: str) -> str:
        distribution(name, source, {name: "Broken"})
        return name

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    values = vars(inputs) | {"new": "new", "stub": stub, "plugin": plugin}

    class World(SimpleNamespace):
        @property
        def unreadable(self) -> Path:
            monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
            return self.adapter

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    before = signal.getsignal(signal.SIGTERM)
    yield World(**values)
    signal.signal(signal.SIGTERM, before)

"""The documented exit codes: every command returns each code that applies to it, on input that a user could give."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer.main
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from tests.core.adapters.conftest import make_saved

from budwood.cli import app as cli

CODES = (0, 2, 3, 4, 5)
HUB = "someone/a-model-that-is-not-here"
NO_ARTIFACT = "reads no artifact"
NO_TRAINING = "does not train"
"""Reasons why a command cannot return a code, used in the table in place of a case."""

Case = Callable[[Any], list[str]] | str
TABLE: dict[tuple[str, ...], dict[int, Case]] = {
    ("demo",): {
        0: lambda w: [w.stub("budwood_demo.demo.main", lambda output, overwrite: {"accuracy": 1.0}), "--json"],
        2: lambda w: ["--output", w.run],  # holds another program's files
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
    ("check",): {
        0: lambda w: [w.recipe, "-o", f"output={w.new}"],
        2: lambda w: [w.recipe, "-o", "lora.rank=-1"],
        3: lambda w: [w.recipe, "-o", f"base.model={HUB}"],
        4: lambda w: [w.recipe, "-o", f"base.model={w.corrupt_base}"],
        5: NO_TRAINING,
    },
    ("compare",): {
        0: lambda w: [*w.runs, "--json"],
        2: lambda w: [w.runs[0], "nothing"],
        3: "reads small files alone",
        4: lambda w: [w.runs[0], w.damaged_run],
        5: NO_TRAINING,
    },
    ("sweep",): {
        0: "its own tests run whole sweeps",
        2: lambda w: [w.recipe, "-s", "lora.rnk=2,4"],
        3: lambda w: [w.recipe, "-s", "lora.rank=2,4", "--output", w.new, "--storage", "postgresql://no.where/x"],
        4: lambda w: [w.recipe, "-s", "lora.rank=2,4", "--output", w.new, "-o", f"base.model={w.corrupt_base}"],
        5: "a trial that diverges is one that failed",
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
    ("chat",): {
        0: lambda w: [w.base, "--max-new-tokens", "1", w.stub("sys.stdin", io.StringIO("x\n"))],
        2: lambda w: [w.base, "--adapter", "none=x"],
        3: lambda w: [w.base, "--device", "cuda:99"],
        4: lambda w: [w.base, "--adapter", f"a={w.corrupt}"],
        5: NO_TRAINING,
    },
    ("serve",): {
        0: lambda w: [w.base, "--port", "0", w.stub("budwood.serving.http.server.run", lambda *_: None)],
        2: lambda w: [w.base, "--host", "0.0.0.0"],
        3: lambda w: [w.base, "--device", "cuda:99"],
        4: lambda w: [w.corrupt_base],
        5: NO_TRAINING,
    },
    ("token",): {
        0: lambda w: [f"{w.new}.json", "acme"],
        2: lambda w: [f"{w.new}.json"],
        3: lambda w: [f"{w.rows}/x", "acme"],
        4: NO_ARTIFACT,
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
    ("adapter", "combine"): {
        0: lambda w: [w.adapter, w.adapter, w.new],
        2: lambda w: [w.adapter, w.adapter, w.run],
        3: lambda w: [w.adapter, w.adapter, w.new, "--device", "cuda:99"],
        4: lambda w: [w.adapter, w.corrupt, w.new],
        5: NO_TRAINING,
    },
    ("adapter", "shrink"): {
        0: lambda w: [w.adapter, w.new, "--rank", "1", "--force"],
        2: lambda w: [w.adapter, w.new, "--rank", "99"],
        3: lambda w: [w.adapter, w.new, "--rank", "1", "--device", "cuda:99"],
        4: lambda w: [w.corrupt, w.new, "--rank", "1"],
        5: NO_TRAINING,
    },
    ("adapter", "diff"): {
        0: lambda w: [w.adapter, w.adapter],
        2: lambda w: [w.adapter, "nothing"],
        3: lambda w: [w.adapter, w.unreadable],
        4: lambda w: [w.adapter, w.corrupt],
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
def test_a_command_returns_its_code(world, capsys, forked, words, code, case):
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
        assert sorted(Path().rglob("*")) == before, "partial output is left behind"


def altered(folder: Path, name: str, **changes: Any) -> Path:
    """Return a copy of a base or adapter with one JSON file changed."""
    copy = Path(shutil.copytree(folder, Path(f"copy-{len(list(Path().iterdir()))}")))
    values = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(values | changes))
    return copy


def without(folder: Path, *names: str, instead: str = "") -> Path:
    """Return a copy of a base or adapter without the files `names`; `instead` adds a file in their place."""
    copy = altered(folder, "config.json" if (folder / "config.json").exists() else "adapter_config.json")
    for name in names:
        (copy / name).unlink()
    if instead:
        (copy / instead).write_bytes(b"PK\x03\x04")
    return copy


def write_file(path: str, text: str) -> str:
    Path(path).write_text(text)
    return path


def new_rows() -> str:
    """Return a data file whose tokens are not in the cache."""
    return write_file("new.jsonl", json.dumps({"prompt": "new:", "completion": f" {os.getcwd()}"}) + "\n")


def gated(*_: Any, **__: Any) -> Any:
    raise hub.GatedRepoError.__new__(hub.GatedRepoError, "gated")


def denied(*_: Any) -> Any:
    raise PermissionError(13, "Permission denied")


def full(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device", "out")


STOCK = ("budwood.json", "golden.safetensors")
OTHER_TARGETS = {"target_modules": ["wq", "wk"]}
KINDS: dict[str, list[Callable[[Any], list[Any]]]] = {
    "a recipe, an option, a name or a data file that is missing, malformed or wrong": [
        lambda w: ["tune", "no.yaml"],
        lambda w: ["tune", write_file("bad.yaml", "base: [")],
        lambda w: ["data", write_file("bad.jsonl", '{"prompt"'), "--base", w.base],
        lambda w: ["data", write_file("empty.parquet", "x"), "--base", w.base],
        lambda w: ["data", "no.jsonl", "--base", w.base],
        lambda w: ["plan", w.recipe, "-o", "base.model=./no/base"],
        lambda w: ["adapter", "info", "no/adapter"],
    ],
    "an intact but unsupported file: pickled weights, a later format, a model type unknown to the installed "
    "transformers": [
        lambda w: ["plan", w.recipe, "-o", f"base.model={without(w.base, 'model.safetensors', instead='model.bin')}"],
        lambda w: ["adapter", "info", without(w.adapter, "adapter_model.safetensors", instead="adapter_model.bin")],
        lambda w: ["adapter", "info", altered(w.adapter, "budwood.json", format=99)],
        lambda w: ["plan", w.recipe, "-o", f"base.model={altered(w.base, 'config.json', model_type='brand_new')}"],
    ],
    "an adapter of another base; one of stock PEFT, which records no base, that does not fit the base": [
        lambda w: ["generate", w.other_base, "--prompt", "x", "--adapter", f"a={w.adapter}"],
        lambda w: ["generate", w.base, "--prompt", "x", "--adapter",
                   f"a={altered(without(w.adapter, *STOCK), 'adapter_config.json', **OTHER_TARGETS)}"],
        lambda w: ["generate", w.base, "--prompt", "x", "--adapter",
                   f"a={altered(without(w.adapter, *STOCK), 'adapter_config.json', target_modules=['q_proj'])}"],
    ],
    "a file that exists but cannot be read, a full disk, too little memory, no such device": [
        lambda w: ["data", w.rows, "--base", w.base, w.stub("budwood.data.sources.read_file", denied)],
        lambda w: ["adapter", "info", w.unreadable],
        lambda w: ["adapter", "export", w.adapter, "out", w.stub("budwood.adapters.export.save_file", full)],
        lambda w: ["tune", w.recipe, "-o", "base.device=cuda:99"],
    ],
    "the hub cannot be reached; a gated base or dataset": [
        lambda w: ["plan", w.recipe, "-o", f"base.model={HUB}"],
        lambda w: ["data", HUB, "--base", w.base],
        lambda w: ["plan", w.recipe, "-o", f"base.model={HUB}", w.stub("huggingface_hub.snapshot_download", gated)],
        lambda w: ["data", HUB, "--base", w.base, w.stub("huggingface_hub.snapshot_download", gated)],
    ],
    "a library that is missing; a plugin that cannot be imported, breaks the contract, or raises an error in its own "
    "code": [
        lambda w: ["plugins", w.plugin("absent", "import no_such_library")],
        lambda w: ["plugins", w.plugin("other", "class Broken: pass")],
        lambda w: ["tune", w.recipe, "-o", f"output={w.new}", "-o", "strategies=" + json.dumps(["lora", w.plugin(
            "fails", "class Broken(Strategy):\n    @hookimpl\n    def prepare_model(self):\n        1 / 0")])],
    ],
    "a base, an adapter or a checkpoint that is truncated, altered, or not of the type that its name suggests": [
        lambda w: ["plan", w.recipe, "-o", f"base.model={w.corrupt_base}"],
        lambda w: ["data", w.recipe, "-o", f"base.model={w.corrupt_tokenizer}"],
        lambda w: ["adapter", "info", w.corrupt],
        lambda w: ["adapter", "info", altered(w.adapter, "budwood.json", task="other")],
        lambda w: ["adapter", "info", without(w.adapter, "adapter_config.json")],
    ],
    "an adapter whose answers on its own base differ from those recorded": [
        lambda w: ["adapter", "verify", w.adapter, w.stub("budwood.serving.verify.TOLERANCE", -1.0)],
    ],
    "a loss or gradient that is not finite; a run that moved no tensor": [
        lambda w: ["tune", w.recipe, "-o", "train.learning_rate=1e-30", "-o", f"output={w.new}"],
    ],
    "an unexpected error in core, even if another plugin called it, or in a plugin that comes with Budwood": [
        lambda w: ["data", new_rows(), "--base", w.base, w.stub("budwood.data.build.recognise_rows", lambda *_: 1 / 0)],
        lambda w: ["data", new_rows(), "--base", w.base,
                   w.stub("budwood.data.chat_formats.PromptCompletion.item", lambda *_: 1 / 0)],
        lambda w: ["tune", w.recipe, "-o", f"output={w.new}", "-o", "strategies=" + json.dumps(["lora", w.plugin(
            "misuses", "from budwood.data.fields import read_weight\nclass Broken(Strategy):\n    @hookimpl\n"
            "    def prepare_model(self):\n        read_weight(None, '')")])],
    ],
}  # fmt: skip
GUIDE = (Path(__file__).parents[3] / "docs" / "guide.md").read_text(encoding="utf-8")


def documented() -> dict[str, int]:
    """Return the guide's table of errors and their codes."""
    section = GUIDE.partition("| error | code |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = [line.strip("| ").rpartition(" | ") for line in section.splitlines()]
    return {text: int(code) for text, _, code in rows}


def test_the_guides_table_names_these_errors():
    assert documented().keys() == KINDS.keys()
    assert {1, 2, 3, 4, 5} == set(documented().values())


@pytest.mark.parametrize(
    ("kind", "number"),
    [pytest.param(k, i, id=f"{k[:40]} {i}") for k, cases in KINDS.items() for i in range(len(cases))],
)
def test_an_error_has_the_code_that_the_guide_says(world, capsys, kind, number):
    arguments = [str(argument) for argument in KINDS[kind][number](world) if argument is not None]
    returned = cli.run(arguments)
    err = capsys.readouterr().err
    assert returned == documented()[kind], err
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert ("This is a bug" in err or "this is a bug" in err) == (returned == 1)
    assert ("to its author" in err) == ("fails" in " ".join(arguments)), err


@pytest.mark.parametrize("words", TABLE, ids=" ".join)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_every_command(world, monkeypatch, capsys, words, number, code):
    """The signal arrives while the command is running."""
    command = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]
    monkeypatch.setattr(command, "callback", lambda **options: os.kill(os.getpid(), number))
    monkeypatch.setattr(command, "params", [])
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
    other_base = Path(shutil.copytree(tiny_base, folder / "other-base"))
    weights = {name: torch.zeros_like(t) for name, t in load_file(tiny_base / "model.safetensors").items()}
    save_file(weights, other_base / "model.safetensors", metadata={"format": "pt"})
    for name, manifest in {
        "one": '{"budwood": "0"}',
        "two": '{"budwood": "0"}',
        "damaged": '{"budwood": "0", "metrics": 3}',
    }.items():
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text(manifest)
        (folder / name / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "loss": 1.0}\n')
        shutil.copy(folder / "recipe.json", folder / name / "recipe.yaml")
    demo = folder / "demo"
    demo.mkdir()
    (demo / "base").symlink_to(corrupt_base)
    return SimpleNamespace(
        base=tiny_base, rows=folder / "rows.jsonl", adapter=adapter, corrupt=corrupt, corrupt_base=corrupt_base,
        corrupt_tokenizer=corrupt_tokenizer, run=folder / "run", recipe=folder / "recipe.json",
        corrupt_demo=demo, other_base=other_base, runs=[folder / "one", folder / "two"], damaged_run=folder / "damaged",
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

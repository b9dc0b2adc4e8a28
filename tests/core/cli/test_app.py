"""The command line: no heavy imports at start, one line per error, the documented exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from budwood import CorruptError, DivergedError, InputError, PluginError, ResourceError
from budwood.cli import app as cli
from budwood.errors import Interrupted

COMMANDS = [
    "demo", "plugins", "plan", "check", "data", "tune", "sweep", "eval", "compare", "generate", "chat", "serve",
    "token", "doctor", "new", "recipe", "adapter",
]  # fmt: skip
SUBCOMMANDS = [
    ["recipe", "schema"],
    ["new", "strategy"],
    *(["adapter", name] for name in ("info", "verify", "merge", "export")),
]
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "peft",
    "accelerate",
    "numpy",
    "budwood_lora",
    "budwood_adalora",
    "budwood_adversarial",
    "budwood_averaging",
    "budwood_distillation",
    "budwood_grpo",
    "budwood_optimizers",
    "budwood_preference",
    "matplotlib",
    "sklearn",
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Keep the signal handlers and warning filters of the test process."""
    monkeypatch.setattr(cli, "silence_libraries", lambda debug: None)
    monkeypatch.delenv("BUDWOOD_DEBUG", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def fails(monkeypatch):
    """Return `fails(error)`, which makes every command raise `error`."""

    def install(error: BaseException) -> None:
        def get_command(app):
            raise error

        monkeypatch.setattr(typer.main, "get_command", get_command)

    return install


def loaded_by(*lines: list[str], code: int = 0) -> set[str]:
    """Return the heavy modules that a process imports when it runs these command lines, which exit with `code`."""
    script = (
        "import contextlib, io, json, sys\n"
        "from budwood.cli.app import run\n"
        "with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):\n"
        f"    codes = [run(line) for line in {list(lines)!r}]\n"
        f"print(json.dumps([codes, sorted({HEAVY!r} & set(sys.modules))]))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    codes, modules = json.loads(result.stdout)
    assert set(codes) == {code}, (codes, result.stderr)
    return set(modules)


def test_an_export_loads_no_model_and_the_library_of_none(tiny_base, tmp_path):
    """The adapter is read and written by torch alone; no compiler is loaded with bitsandbytes in any command."""
    folder = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    loaded = loaded_by(["adapter", "export", str(folder), str(tmp_path / "out")])
    assert loaded == {"torch", "numpy"}
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_the_compiler_is_not_loaded_with_bitsandbytes():
    code = (
        "import sys, torch, budwood.model.base, bitsandbytes.backends.default.ops\n"
        "print('torch._inductor.lowering' in sys.modules, torch.compile.__module__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "torch"]
    assert not result.stderr


def test_help_lists_the_commands(capsys):
    assert cli.run(["--help"]) == 0
    listed = capsys.readouterr().out.partition("Commands:\n")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in listed.splitlines()] == COMMANDS


def test_python_m_budwood_runs_the_command():
    done = subprocess.run([sys.executable, "-m", "budwood", "tnue"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: No such command 'tnue'. Did you mean 'tune'?")


def test_help_and_plugins_import_no_heavy_module_and_no_plugin():
    lines = [["--help"], *([name, "--help"] for name in COMMANDS), *([*names, "--help"] for names in SUBCOMMANDS)]
    assert loaded_by(*lines, [], ["--version"], ["plugins"], ["plugins", "--json"]) == set()


def test_a_recipe_is_refused_without_heavy_modules(tiny_base, tmp_path):
    """In a third of a second; torch alone would take seconds."""
    rows, recipe = tmp_path / "rows.jsonl", tmp_path / "recipe.yaml"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    recipe.write_text(f"base: {{model: {tiny_base}}}\ndata: {{train: {rows}}}\nstrategies: [lora]\n")
    bad = [
        ["nothere.yaml"], [str(tmp_path)], [str(recipe)], [str(recipe), "-o", "train.x=1"],
        [str(recipe), "-o", "lora.rnk=1"], [str(recipe), "-o", f"base.model={tmp_path}"], [str(rows)],
    ]  # fmt: skip
    lines = [[command, *arguments] for command in ("plan", "check") for arguments in bad]
    assert loaded_by(*lines, code=2) <= {"numpy", "budwood_lora"}


@pytest.mark.parametrize("names", [[], *([name] for name in COMMANDS), *SUBCOMMANDS], ids=" ".join)
def test_help_fits_a_screen(names, capsys):
    assert cli.run([*names, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


def test_no_command_shows_the_help(capsys):
    assert cli.run([]) == 0
    assert "Commands:" in capsys.readouterr().out
    assert cli.run(["adapter"]) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("recipe.yaml:7: x\ny"), 2, "error: recipe.yaml:7: x y"),
        (ResourceError("no disk"), 3, "error: no disk"),
        (PluginError("strategy 'a'"), 3, "error: strategy 'a'"),
        (CorruptError("truncated"), 4, "error: truncated"),
        (DivergedError("step 3"), 5, "error: step 3"),
        (Interrupted("stopped; the best adapter is in x"), 130, "error: stopped; the best adapter is in x"),
        (Interrupted("terminated.", 143), 143, "error: terminated."),
        (KeyboardInterrupt(), 130, "error: interrupted."),
        (typer.Abort(), 130, "error: interrupted."),
        (PermissionError(13, "Permission denied", "runs/x"), 3, "error: runs/x: Permission denied."),
        (OSError(28, "No space left on device"), 3, "error: system error: No space left on device."),
        (MemoryError(), 3, "error: out of memory: lower train.micro_tokens"),
        (TypeError("a bug"), 1, "error: unexpected TypeError: a bug. This is a bug; run again with --debug"),
        (AssertionError(), 1, "error: unexpected AssertionError. This is a bug"),
        (typer.Exit(7), 7, ""),
    ],
)
def test_an_error_prints_one_line_and_sets_the_exit_code(fails, capsys, error, code, line):
    fails(error)
    assert cli.run(["plugins"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == (1 if line else 0)


@pytest.mark.parametrize("via", ["option", "anywhere", "environment"])
def test_debug_shows_the_traceback(fails, capsys, monkeypatch, via):
    fails(InputError("what is wrong"))
    arguments = {"option": ["--debug", "plugins"], "anywhere": ["plugins", "--debug"], "environment": ["plugins"]}[via]
    monkeypatch.setenv("BUDWOOD_DEBUG", "1" if via == "environment" else "0")
    assert cli.run(arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: what is wrong\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["tnue"], "error: No such command 'tnue'. Did you mean 'tune'? See `budwood --help`.\n"),
        (["recipe", "shema"], "error: No such command 'shema'. Did you mean 'schema'? See `budwood recipe --help`.\n"),
        (["tune", "--overwrit", "r.yaml"], "--overwrite"),
        (["tune"], "error: Missing argument 'recipe'. See `budwood tune --help`.\n"),
        (["sing"], "error: No such command 'sing'."),
    ],
)
def test_usage_errors_suggest_the_closest_match(capsys, arguments, line):
    assert cli.run(arguments) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_sigterm_exits_with_143():
    code = (
        "import os, signal, typer.main\n"
        "from budwood.cli import app\n"
        "typer.main.get_command = lambda app: os.kill(os.getpid(), signal.SIGTERM)\n"
        "app.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "error: terminated.\n")


def test_a_closed_pipe_is_not_an_error():
    command = f"{sys.executable} -c 'from budwood.cli.app import main; main()' --help; echo $? >&2"
    done = subprocess.run(["bash", "-c", f"({command}) | true"], capture_output=True, text=True)
    assert done.stderr == "0\n"


def test_a_micro_batch_of_more_tokens_than_any_is_refused_at_once(capsys):
    """Rows of so many tokens would be written for minutes."""
    assert cli.run(["plan", "recipe.yaml", "--tokens", "999999999"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "4194304" in err

"""The installed commands as a user runs them: tune a file, inspect, evaluate, generate; and errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.forked import BUDWOOD, Popen, forking

ROOT = Path(__file__).parents[2]


def budwood(*arguments: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [str(BUDWOOD), *map(str, arguments)]
    with forking():
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def write(path: Path, count: int = 24) -> Path:
    words = ["games", "fonts", "mail"]
    rows = [{"prompt": f"{words[i % 3]} number {i}:", "completion": f" {words[i % 3]}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tuned(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which `budwood tune FILE --base DIR` has run, without a recipe."""
    folder = tmp_path_factory.mktemp("work")
    write(folder / "rows.jsonl")
    options = ["-o", "train.steps=6", "-o", "train.learning_rate=1e-2", "-o", "train.precision=fp32"]
    done = budwood("tune", "rows.jsonl", "--base", tiny_base, *options, cwd=folder)
    assert not done.stdout, "only results go to stdout"
    lines = [line for line in done.stderr.splitlines() if not line.startswith("step ")]
    assert len(lines) <= 15
    return folder


def test_a_run_saves_its_recipe_which_can_be_rerun(tuned: Path) -> None:
    run = tuned / "runs" / "rows"
    files = {"adapter", "checkpoints", "loss.png", "manifest.json", "metrics.jsonl", "recipe.yaml", "report.html"}
    assert {p.name for p in run.iterdir()} == files
    done = budwood("tune", "runs/rows/recipe.yaml", "-o", "output=again", "--json", cwd=tuned)
    assert json.loads(done.stdout)["metrics"]["loss"] > 0
    first, second = (p / "adapter" / "adapter_model.safetensors" for p in (run, tuned / "again"))
    assert first.read_bytes() == second.read_bytes()


def test_the_adapter_is_shown_verified_evaluated_and_prompted(tuned: Path, tiny_base: Path) -> None:
    adapter = "runs/rows/adapter"
    assert "lora" in budwood("adapter", "info", adapter, cwd=tuned).stdout
    verified = json.loads(budwood("adapter", "verify", adapter, "--json", cwd=tuned).stdout)
    assert verified
    measured = json.loads(budwood("eval", adapter, "--data", "rows.jsonl", "--json", cwd=tuned).stdout)
    assert measured["adapter"]["eval_loss"] < measured["base"]["eval_loss"]
    answer = budwood("generate", tiny_base, "--adapter", f"a={adapter}", "--prompt", "games number 3:", cwd=tuned)
    assert answer.stdout.strip()


def test_a_classifier_is_tuned_and_evaluated_from_the_command_line(tuned: Path, tiny_base: Path) -> None:
    rows = [{"text": f"{word} {i}", "label": word} for i in range(8) for word in ("games", "fonts")]
    (tuned / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["-o", "base.task=sequence-classification", "-o", "train.steps=4", "-o", "train.precision=fp32"]
    budwood("tune", "labelled.jsonl", "--base", tiny_base, *options, cwd=tuned)
    done = budwood("eval", "runs/labelled/adapter", "--data", "labelled.jsonl", cwd=tuned)
    assert "macro_f1" in done.stdout
    assert "precision" in done.stdout, "scikit-learn's report"


def test_the_combined_recipe_runs_and_its_adapter_is_evaluated_under_attack(tmp_path: Path) -> None:
    demo = ROOT / "examples" / "budwood_demo"
    held_out = (demo / "data" / "describe" / "eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "eval.jsonl").write_text("".join(held_out[:8]), encoding="utf-8")
    shorter = {
        "output": tmp_path / "run", "data.eval": tmp_path / "eval.jsonl", "train.steps": 3, "train.eval_generate": 0,
        "train.batch_tokens": 128, "adalora.interval": 1, "adalora.final_phase": 1,
    }  # fmt: skip
    options = [text for key, value in shorter.items() for text in ("-o", f"{key}={value}")]
    options += ["-o", "train.precision=bf16"]  # supported on any processor
    done = budwood("tune", demo / "recipes" / "combined.yaml", *options, cwd=ROOT)
    assert "teacher examples/budwood_demo/base: 11.8 MB in bf16, not quantised" in done.stderr
    assert "adalora: 224 of 336 ranks remain after step 2" in done.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if step["kind"] == "step"]
    assert len(steps) == 3
    terms = {"causal_lm", "distillation", "orthogonality", "adversarial_gain", "rank_budget"}
    assert all(terms <= step.keys() for step in steps)
    attacks = ["--attack", "pgd:epsilon=0.5,steps=2", "--attack", "typos:rate=0.2"]
    data = ["--data", tmp_path / "eval.jsonl", "--generate", 0]
    measured = json.loads(budwood("eval", tmp_path / "run/adapter", *data, *attacks, "--json", cwd=ROOT).stdout)
    assert set(measured["attacks"]) == {"pgd:epsilon=0.5,steps=2", "typos:rate=0.2"}
    assert measured["attacks"]["pgd:epsilon=0.5,steps=2"]["eval_loss"] > measured["adapter"]["eval_loss"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"\n', "rows.jsonl:1: malformed JSON"),
        (b'{"prompt": "a", "completion": null}\n', "rows.jsonl:1: field 'completion' must be text, not null"),
        (b'{"prompt": "caf\xe9", "completion": "x"}\n', "rows.jsonl:1: not UTF-8"),
        (b"", "rows.jsonl: the file is empty"),
        (b'{"prompt": "a", "completion": " "}\n', "its only row was dropped: empty completion"),
    ],
)
def test_bad_data_gives_one_line_without_importing_torch(
    tmp_path: Path, tiny_base: Path, content: bytes, message: str
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    code = (
        "import sys\nfrom budwood.cli.app import run\n"
        f"code = run(['tune', 'rows.jsonl', '--base', {str(tiny_base)!r}])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_all_invalid_options_are_named_without_importing_torch(tmp_path: Path, tiny_base: Path) -> None:
    write(tmp_path / "rows.jsonl")
    wrong = [part for option in ("lora.rank=0", "lora.alhpa=3") for part in ("-o", option)]
    code = (
        "import sys\nfrom budwood.cli.app import run\n"
        f"code = run(['tune', 'rows.jsonl', '--base', {str(tiny_base)!r}, *{wrong!r}])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "error: -o lora.alhpa=3: lora.alhpa: unknown key. Did you mean 'alpha'? "
        "-o lora.rank=0: lora.rank: must be greater than or equal to 1 (got 0).\n"
    )


def test_an_output_folder_with_a_run_is_refused(tuned: Path, tiny_base: Path) -> None:
    before = (tuned / "runs/rows/manifest.json").read_bytes()
    done = budwood("tune", "rows.jsonl", "--base", tiny_base, cwd=tuned, code=2)
    assert "--overwrite" in done.stderr
    assert (tuned / "runs/rows/manifest.json").read_bytes() == before


def heed_interrupts() -> None:
    """End the default way on SIGINT, which pytest's workers ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("start", "number", "code"), [(subprocess.Popen, signal.SIGINT, 130), (Popen, signal.SIGTERM, 143)]
)
def test_a_signal_ends_a_run_in_one_line_and_keeps_its_adapter(
    tmp_path: Path, tiny_base: Path, start: Any, number: int, code: int
) -> None:
    """The first is a new process, from the installed command's start to its end."""
    write(tmp_path / "rows.jsonl")
    options = ["-o", "train.steps=100000", "-o", "train.precision=fp32", "-o", "train.schedule=constant"]
    process = start(
        [str(BUDWOOD), "tune", "rows.jsonl", "--base", str(tiny_base), *options],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=heed_interrupts,
    )  # fmt: skip
    log, deadline = tmp_path / "runs/rows/metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.1)
    process.send_signal(number)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert "is kept in runs/rows/adapter" in errors.splitlines()[-1]
    assert (tmp_path / "runs/rows/adapter/adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "runs/rows/manifest.json").read_text())["finished"] is False

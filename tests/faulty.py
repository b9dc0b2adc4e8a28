"""Runs `budwood tune` in several processes, of which some have a fault."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tests.processes import end_of_processes

SCRIPT = """
import os, signal, sys
from importlib import metadata
from budwood.cli.app import run
from budwood.training import loop
from budwood.training.report import Report
Report.plot = lambda self, directory: None
rank, arguments = int(os.environ["RANK"]), {arguments!r}
os.chdir({folder!r})
def at(step, do):
    exchange = loop.sum_gradients
    def sum_gradients(run):
        if run.step == step: do()
        exchange(run)
    loop.sum_gradients = sum_gradients
def die(): os.kill(os.getpid(), signal.SIGKILL)
{fault}
code = run(["tune", "recipe.json", *arguments])
sys.stdout.flush()
if code: os._exit(code)
"""
"""A fault may use `rank`, change `arguments`, or call `at(step, function)`."""


@dataclass(frozen=True)
class Ended:
    """How the processes of a run ended: exit codes, error lines of each, and the whole output of the first."""

    codes: list[int | None]
    errors: list[list[str]]
    output: str


def write_recipe(folder: Path, base: Path, train: Mapping[str, Any], strategies: Sequence[Any] = ()) -> None:
    """Write recipe.json, whose data, train.jsonl, is named by a relative path."""
    values = {
        "base": {"model": str(base), "quantization": "none"},
        "data": {"train": "train.jsonl", "max_length": 128},
        "strategies": [*strategies] or [{"lora": {"rank": 4}}],
        "train": {
            "steps": 6, "batch_examples": 8, "micro_tokens": 128, "learning_rate": 1e-2, "precision": "fp32",
            "schedule": "linear", "warmup": 1, "save_every": 1, **train,
        },
        "output": "run",
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(values))


def tune_with(folder: Path, count: int, fault: str = "", arguments: Sequence[str] = ("--overwrite",)) -> Ended:
    """Run the folder's recipe in `count` processes with a fault, Python lines."""
    script = SCRIPT.format(arguments=[*arguments], folder=str(folder), fault=fault)
    ended = end_of_processes(script, folder / "processes", count)
    for _, output in ended:
        assert "Traceback" not in output, output
    errors = [[line for line in output.splitlines() if line.startswith("error:")] for _, output in ended]
    return Ended([code for code, _ in ended], errors, ended[0][1])


def adapter(folder: Path) -> bytes:
    """Return the bytes of a run's adapter."""
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def difference(one: Path, other: Path) -> float:
    """Return the largest difference of two runs' adapters, relative to the largest element of each tensor."""
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    return max(float((first[name] - second[name]).abs().max() / first[name].abs().max()) for name in first)

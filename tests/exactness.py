"""Checks that a change to the internals does not change runs: records short runs, and compares later code with them.

    python -m tests.exactness record DIR              # on the code before the change
    python -m tests.exactness compare DIR [RUN ...]   # on the code after it, on the same machine

Each run takes ten optimizer steps on the demo's base and a few hundred of its rows: on the CPU, on two threads, from a
fixed seed, and in fp32. Together they cover every first-party strategy, both tasks, an unquantized and an NF4 base,
dropout, and steps of several micro-batches. Runs go through the command line, and only their recipes, metrics.jsonl,
manifest.json and adapter folders are read, so that nothing here depends on Budwood's internals.

DIR holds everything a comparison needs: `inputs` (base, data and recipes, copied), `record.json` (every logged number
except the rates, at full precision; the final metrics; the SHA-256 of each adapter tensor) and `adapters`, their files.
`compare` reruns the recipes in DIR, prints a table, and lists every number that differs. It exits with code 1 if a run
fails, or if the loss of a step or of an evaluation differs by more than 1e-6 relative. Adapters and other metrics are
reported, not judged: summing in another order changes their last bits.

Processors round differently: record and compare on one machine. If nothing has changed, all adapters are identical.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors import deserialize
from safetensors.numpy import load_file

DEMO = Path(__file__).parents[1] / "examples" / "budwood_demo"
TOLERANCE = 1e-6
"""Largest relative difference between two losses."""
THREADS = "2"
ROWS = {"train": 200, "eval": 40}
TIMES = ("tokens_per_second",)
"""Logged numbers that measure the machine, not the run."""
OPPOSITE = {"none": "nf4", "nf4": "none"}

LORA = {"lora": {"rank": 8, "alpha": 16}}
# Ten steps: two before the budget falls, five while it falls, three after it is final.
ADALORA = {
    "adalora": {
        "initial_rank": 6, "target_rank": 4, "alpha": 24, "initial_phase": 2, "final_phase": 3, "interval": 2,
    }
}  # fmt: skip
FREELB = {"adversarial": {"method": "freelb", "epsilon": 0.5, "steps": 3}}
ON_BASE = {"distillation": {"teacher": "base", "divergence": "jensen-shannon", "weight": 0.5}}


def recipes() -> dict[str, dict[str, Any]]:
    """Return the recipe of every run, by the run's name; paths are relative to the working folder."""
    runs = {}
    for quantization in OPPOSITE:
        # The teacher is another model than the student's base, so that the divergence is not 0 at the first step.
        teacher = {
            "distillation": {
                "teacher": "./demo-base", "quantization": OPPOSITE[quantization], "temperature": 2.0,
                "hidden_weight": 0.1,
            }
        }  # fmt: skip
        cases: dict[str, list[dict[str, Any]]] = {
            "lora": [LORA],
            "adalora": [ADALORA],
            "freelb": [LORA, FREELB],
            "distillation": [LORA, teacher],
            "classification": [LORA],
            "together": [ADALORA, FREELB, ON_BASE],
        }
        for name, strategies in cases.items():
            runs[f"{name}-{quantization}"] = recipe(strategies, quantization, classify=name == "classification")
    cached = {"distillation": {"teacher": "base", "cache": "teacher-cache", "top_k": 16}}
    smart = {"adversarial": {"method": "smart", "epsilon": 0.01}}
    runs["dropout"] = recipe([{"lora": {**LORA["lora"], "dropout": 0.1}}], "nf4")
    runs["micro-batches"] = recipe([LORA, FREELB], "nf4", micro_tokens=256)
    runs["smart"] = recipe([LORA, smart], "nf4")
    runs["cached-teacher"] = recipe([LORA, cached], "nf4")
    return {name: {**body, "output": f"runs/{name}"} for name, body in runs.items()}


def recipe(
    strategies: list[dict[str, Any]], quantization: str, classify: bool = False, micro_tokens: int = 1024
) -> dict[str, Any]:
    """Return a recipe of ten steps, of one micro-batch each unless `micro_tokens` is below the 512 of a step."""
    data = "sections" if classify else "name"
    rate = 2e-2 if ADALORA in strategies else 5e-3  # high, so that ten steps move the losses
    task = "sequence-classification" if classify else "causal-lm"
    return {
        "base": {"model": "demo-base", "quantization": quantization, "task": task, "device": "cpu"},
        "data": {"train": f"data/{data}/train.jsonl", "eval": f"data/{data}/eval.jsonl", "max_length": 128},
        "strategies": strategies,
        "train": {
            "steps": 10, "batch_tokens": 512, "micro_tokens": micro_tokens, "learning_rate": rate, "warmup": 1,
            "precision": "fp32", "deterministic": True, "seed": 7, "eval_every": 5, "eval_generate": 24,
        },
    }  # fmt: skip


def write_inputs(folder: Path) -> None:
    """Copy the demo's base and the first rows of its data into `folder`, and write the recipes there."""
    shutil.copytree(DEMO / "base", folder / "demo-base")
    for data in ("name", "sections"):
        (folder / "data" / data).mkdir(parents=True)
        for part, rows in ROWS.items():
            lines = (DEMO / "data" / data / f"{part}.jsonl").read_bytes().splitlines(keepends=True)
            (folder / "data" / data / f"{part}.jsonl").write_bytes(b"".join(lines[:rows]))
    (folder / "recipes").mkdir()
    for name, body in recipes().items():
        (folder / "recipes" / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n")


def execute(name: str, folder: Path) -> tuple[dict[str, Any], Path]:
    """Run a recipe in a separate process; `folder`, a copy of the inputs, is its working folder.

    Returns:
        The run's log and metrics, and its adapter's file.

    Raises:
        RuntimeError: the run failed; the text gives its exit code and last line.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": THREADS, "MKL_NUM_THREADS": THREADS, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "HF_HOME": str(folder / "hub"), "BUDWOOD_CACHE": str(folder / "cache"),
    }  # fmt: skip
    command = [sys.executable, "-m", "budwood", "tune", f"recipes/{name}.json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    run = folder / "runs" / name
    manifest = json.loads((run / "manifest.json").read_text())
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    adapter = run / "adapter" / "adapter_model.safetensors"
    return {
        "log": [{key: value for key, value in line.items() if key not in TIMES} for line in log],
        "final": {
            "before": manifest["before"],
            "metrics": manifest["metrics"],
            "rows": {"packed": manifest.get("packed")},
        },
        "versions": {"python": manifest["python"], **manifest["versions"]},
        "file": hashlib.sha256(adapter.read_bytes()).hexdigest(),
        "tensors": tensor_hashes(adapter),
    }, adapter


def tensor_hashes(path: Path) -> dict[str, str]:
    """Return the SHA-256 of the raw bytes of every tensor in a safetensors file, by name."""
    return {name: hashlib.sha256(tensor["data"]).hexdigest() for name, tensor in sorted(deserialize(path.read_bytes()))}


def record(folder: Path) -> int:
    """Record all runs in `folder`, which must be new or empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        refuse(f"{folder} exists and is not an empty folder; name a new one.")
    write_inputs(folder / "inputs")
    runs = {}
    with tempfile.TemporaryDirectory(prefix="budwood-exactness-") as temporary:
        work = shutil.copytree(folder / "inputs", Path(temporary) / "work")
        for name in recipes():
            started = time.perf_counter()
            try:
                runs[name], adapter = execute(name, work)
            except RuntimeError as error:
                raise SystemExit(f"error: {name}: {error}") from None
            (folder / "adapters").mkdir(exist_ok=True)
            shutil.copyfile(adapter, folder / "adapters" / f"{name}.safetensors")
            losses = [line["loss"] for line in runs[name]["log"] if line["kind"] == "step"]
            print(
                f"{name:22} loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps; "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
    text = json.dumps({"machine": machine(), "runs": runs}, indent=1)
    (folder / "record.json").write_text(text + "\n")
    print(f"recorded in {folder}")
    return 0


def machine() -> str:
    """Return what determines rounding besides the versions: the processor and the instruction set that torch uses."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def compare(folder: Path, names: list[str]) -> int:
    """Rerun the recipes in `folder`, or those named, with this code; print the differences; return the exit code."""
    if not (folder / "record.json").is_file():
        refuse(f"{folder} holds no record.json; make one with `record`.")
    saved = json.loads((folder / "record.json").read_text())
    if unknown := [name for name in names if name not in saved["runs"]]:
        refuse(f"{folder} has no run {unknown[0]}; it has {', '.join(saved['runs'])}.")
    package = importlib.util.find_spec("budwood")
    print(f"comparing {Path(str(package and package.origin)).parent} with {folder}")
    if machine() != saved["machine"]:
        print(f"warning: recorded on another processor ({saved['machine']}; here {machine()})")
    print(f"{'run':22} {'step losses':>12} {'evaluations':>12}  {'metrics':9} adapter")
    failed: list[str] = []
    notes: list[str] = []
    versions: dict[str, tuple[str, str | None]] = {}
    with tempfile.TemporaryDirectory(prefix="budwood-exactness-") as temporary:
        work = shutil.copytree(folder / "inputs", Path(temporary) / "work")
        for name in names or saved["runs"]:
            old = saved["runs"][name]
            try:
                new, adapter = execute(name, work)
            except RuntimeError as error:
                print(f"{name:22} failed with {error}", flush=True)
                failed.append(name)
                continue
            steps, evaluations = (loss_difference(old["log"], new["log"], kind) for kind in ("step", "evaluation"))
            if max(steps, evaluations) > TOLERANCE:
                failed.append(name)
            notes += [f"{name}: {text}" for text in differences(old, new)]
            versions |= {key: (was, new["versions"].get(key)) for key, was in old["versions"].items()}
            metrics = "equal" if old["final"] == new["final"] else "differ"
            same = adapter_difference(old, new, folder / "adapters" / f"{name}.safetensors", adapter)
            print(f"{name:22} {steps:12.2g} {evaluations:12.2g}  {metrics:9} {same}", flush=True)
    for key, (was, now) in versions.items():
        if was != now:
            print(f"warning: recorded with {key} {was}; here {now}")
    print(*notes, sep="\n", end="\n" if notes else "")
    bad = f"failed, or losses differ by more than {TOLERANCE:g}: {', '.join(failed)}"
    print(bad if failed else f"all losses agree to {TOLERANCE:g}")
    return 1 if failed else 0


def numbers(run: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return every number of a run by name, then by place, such as `step 3` or `final metrics`."""
    places = {f"{line['kind']} {line['step']}": line for line in run["log"]}
    places |= {f"final {key}": values for key, values in run["final"].items()}
    found: dict[str, dict[str, Any]] = {}
    for place, values in places.items():
        for name, value in values.items():
            found.setdefault(name, {})[place] = value
    return found


def relative(old: Any, new: Any) -> float:
    """Return |old - new| over the larger magnitude; 0 for equal values, infinity unless both are finite numbers."""
    if old == new:
        return 0.0
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (old, new)):
        return float("inf")
    return abs(old - new) / max(abs(old), abs(new))


def loss_difference(old: list[dict[str, Any]], new: list[dict[str, Any]], kind: str) -> float:
    """Return the largest relative difference between the losses of two logs; infinity if their steps differ."""
    key = {"step": "loss", "evaluation": "eval_loss"}[kind]
    before, after = ({line["step"]: line.get(key) for line in log if line["kind"] == kind} for log in (old, new))
    return max((relative(before.get(step), after.get(step)) for step in before | after), default=float("inf"))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each name whose numbers differ: the largest relative difference, and its place and values."""
    before, after = numbers(old), numbers(new)
    for name in before | after:
        was, now = before.get(name, {}), after.get(name, {})
        largest, place = max((relative(was.get(place), now.get(place)), place) for place in was | now)
        if place not in now:
            yield f"{name} is missing ({place})"
        elif place not in was:
            yield f"{name} is new ({place})"
        elif largest:
            yield f"{name} differs by {largest:.2g} ({place}: {was[place]!r}, now {now[place]!r})"


def adapter_difference(old: Mapping[str, Any], new: Mapping[str, Any], before: Path, after: Path) -> str:
    """Return whether two adapters are identical, as text; if not, by how much their tensors differ."""
    if old["file"] == new["file"]:
        return "identical"
    if old["tensors"] == new["tensors"]:
        return "same tensors, different file"
    was, now = load_file(before), load_file(after)
    if was.keys() != now.keys() or any(was[name].shape != now[name].shape for name in was):
        return "different tensors or shapes"
    largest = max(float(np.max(np.abs(was[name].astype(np.float64) - now[name]))) for name in was)
    changed = sum(old["tensors"][name] != new["tensors"][name] for name in was)
    return f"differs by {largest:.2g} at most, in {changed} of {len(was)} tensors"


def refuse(text: str) -> NoReturn:
    """Print an error in one line, and exit with code 2."""
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(2)


def main() -> int:
    """Parse the command line, and record or compare."""
    parser = argparse.ArgumentParser(prog="python -m tests.exactness", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="record all runs with this code")
    comparing = commands.add_parser("compare", help="rerun the recorded runs with this code, and compare")
    for command in (recording, comparing):
        command.add_argument("folder", metavar="DIR", type=Path)
    comparing.add_argument("runs", metavar="RUN", nargs="*", help="only these runs")
    options = parser.parse_args()
    folder = options.folder.resolve()
    return record(folder) if options.command == "record" else compare(folder, options.runs)


if __name__ == "__main__":
    sys.exit(main())

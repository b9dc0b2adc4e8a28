"""`python -m benchmarks.grpo`: the memory of training on rewards.

The peak memory of a run of `grpo` (with a KL in the loss) relative to supervised fine-tuning, at the same number of
tokens per micro-batch: whole processes, so libraries and the base count in both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import workload as w
from benchmarks.train import machine, say

RESULTS = Path(__file__).parents[1] / "docs" / "benchmarks" / "grpo.json"
SIZE = w.Size(4, 512, 1376, 8, 8, 32_000)
LIMIT = 1.3
"""Largest allowed ratio of peak memory."""
MICRO_TOKENS = 2048


def tune(recipe: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """Run a recipe in a process of its own, and return its manifest."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**recipe, "output": str(folder / name)}), encoding="utf-8")
    command = [sys.executable, "-m", "budwood", "tune", str(path), "--overwrite"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    manifest: dict[str, Any] = json.loads((folder / name / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def memory(folder: Path, rounds: int) -> dict[str, Any]:
    """Return the peak memory of each run, in bytes, and the ratio of the medians."""
    workload = w.build(folder / "work", 4, SIZE)
    train = {
        "steps": 2, "batch_examples": 8, "micro_tokens": MICRO_TOKENS, "learning_rate": 1e-4, "precision": "fp32",
    }  # fmt: skip
    grpo = {
        "samples": 8,
        "max_new_tokens": 64,
        "kl": 0.04,
        "rewards": [{"length": {"target": 200, "unit": "characters"}}],
    }
    peaks: dict[str, list[int]] = {"sft": [], "grpo": []}
    for number in range(rounds):
        for name, others in (("sft", []), ("grpo", [{"grpo": grpo}])):
            recipe = {
                "base": {"model": str(workload.base), "quantization": "none"},
                "data": {"train": str(workload.data), "eval": "none", "max_length": w.MAX_LENGTH},
                "strategies": [{"lora": {"rank": w.RANK, "alpha": w.ALPHA}}, *others],
                "train": train,
            }
            peaks[name].append(tune(recipe, folder, f"{name}-{number}")["peak_memory_bytes"])
    ratio = statistics.median(peaks["grpo"]) / statistics.median(peaks["sft"])
    return {"peaks": peaks, "ratio": ratio, "micro_tokens": MICRO_TOKENS}


def main() -> None:
    """Run the benchmark, print the results, and write them to docs/benchmarks/grpo.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpo", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=2, help="runs per arm (default 2)")
    chosen = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="budwood-bench-") as temporary:
        found = memory(Path(temporary), chosen.rounds)
    sizes = ", ".join(f"{n} {statistics.median(p) / 2**20:,.0f} MiB" for n, p in found["peaks"].items())
    verdict = "met" if found["ratio"] <= LIMIT else "MISSED"
    say(f"{verdict}: peak memory {found['ratio']:.3f}× ({sizes}; target {LIMIT:.2f}×)")
    RESULTS.write_text(json.dumps({"machine": machine(), "memory": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

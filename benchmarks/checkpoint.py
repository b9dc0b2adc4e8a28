"""`python -m benchmarks.checkpoint`: the cost of saving checkpoints, for the adapter of an 8B base and its states.

LoRA of rank 16 on all linears of Llama-3-8B with AdamW's two moments: 503 MB. The foreground part, which blocks
training, is compared with a plain copy of the same tensors in memory, and the total with `torch.save` and fsync. During
the background write, another thread records the longest time that it was blocked: the longest stall of a training step.
The duration of a step of the 8B base is estimated from this machine's matmul rate. Runs on CUDA if available.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.train import matmul_rate

LAYERS, RANK = 32, 16
LINEARS = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
"""Inputs and outputs of a layer's linears in Llama-3-8B."""
PARAMETERS, TOKENS = 8.0e9, 4096
"""Parameters of the base, and tokens of a default optimizer step."""
TARGET = 2.0
"""Largest foreground time in plain copies; it must also not exceed the time of a step."""


def make_run(folder: Path, layers: int) -> tuple[Any, Any, Any]:
    """Return a run without a base after one optimizer step, its composition, and its progress."""
    import torch
    from torch import nn

    from budwood.contract.registry import Composition
    from budwood.contract.types import ParameterGroup, Run
    from budwood.recipe.schema import Recipe
    from budwood.training.progress import Progress

    recipe = Recipe.from_dict(
        {"base": {"model": "none"}, "data": {"train": "none.jsonl"}, "strategies": ["lora"], "output": str(folder)}
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(recipe, folder, device, torch.float32)
    parameters = {}
    for layer in range(layers):
        for number, (inputs, outputs) in enumerate(LINEARS):
            parameters[f"layers.{layer}.{number}.lora_A"] = nn.Parameter(torch.randn(RANK, inputs, device=device))
            parameters[f"layers.{layer}.{number}.lora_B"] = nn.Parameter(torch.randn(outputs, RANK, device=device))
    run.groups = [ParameterGroup("lora", parameters)]
    run.optimizer = torch.optim.AdamW(run.trainable, fused=True)
    for parameter in run.trainable:
        parameter.grad = torch.randn_like(parameter)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.scheduler = torch.optim.lr_scheduler.ConstantLR(run.optimizer)
    run.examples, run.base = SimpleNamespace(sha256=""), SimpleNamespace(fingerprint="")
    run.accelerator = SimpleNamespace(is_main_process=True)
    folder.mkdir(exist_ok=True)
    return run, Composition([]), Progress(torch.amp.GradScaler("cpu", enabled=False))


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


class Watch(threading.Thread):
    """Wakes up every millisecond, and records the longest delay."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.longest, self.stop = 0.0, False

    def run(self) -> None:
        last = time.perf_counter()
        while not self.stop:
            time.sleep(1e-3)
            now = time.perf_counter()
            self.longest, last = max(self.longest, now - last), now


def plain_save(state: Any, path: Path) -> None:
    """Save with `torch.save` and fsync."""
    import torch

    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5, help="(default 5)")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"layers of the base (default {LAYERS})")
    parser.add_argument("--folder", type=Path, default=None, help="output folder (default: the temporary folder)")
    chosen = parser.parse_args()
    import torch

    from budwood.training.durability.checkpoint import Saver

    times: dict[str, list[float]] = {name: [] for name in ("copy", "foreground", "background", "torch.save", "stall")}
    with tempfile.TemporaryDirectory(prefix="budwood-bench-", dir=chosen.folder) as folder:
        run, hooks, progress = make_run(Path(folder) / "run", chosen.layers)
        saver = Saver(run, hooks, progress)
        state = {"parameters": dict(enumerate(run.trainable)), "optimizer": run.optimizer.state_dict()}
        tensors = [t.detach() for t in run.trainable]
        tensors += [t for moments in run.optimizer.state.values() for t in moments.values()]
        for number in range(1, chosen.rounds + 2):
            run.step = number
            times["copy"].append(timed(lambda: [t.to("cpu", copy=True) for t in tensors]))
            times["foreground"].append(timed(lambda: saver.save(saver.snapshot())))
            watch = Watch()
            watch.start()
            times["background"].append(timed(saver.wait))
            watch.stop = True
            watch.join()
            times["stall"].append(watch.longest)
            times["torch.save"].append(timed(lambda: plain_save(state, Path(folder) / "plain.pt")))
        size = sum(t.nbytes for t in saver.snapshot().tensors.values())
        saver.close()
    median = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first is the warm-up
    speed = max(matmul_rate(torch.get_num_threads(), dtype) for dtype in ("bfloat16", "float32"))
    step, ratio = 4 * PARAMETERS * TOKENS / speed, median["foreground"] / median["copy"]
    print(f"{size / 1e6:,.0f} MB on {run.device}, {chosen.rounds} rounds, {torch.get_num_threads()} threads")
    print(f"plain copy in memory {median['copy']:.3f} s; torch.save and fsync {median['torch.save']:.2f} s")
    print(f"background {median['background']:.2f} s; longest stall of another thread {median['stall'] * 1e3:.0f} ms")
    print(f"estimated step of {TOKENS:,} tokens on an 8B base at {speed / 1e12:,.2f} TFLOP/s: {step:,.1f} s")
    verdict = "met" if ratio <= TARGET and median["foreground"] <= step else "MISSED"
    print(
        f"{verdict}: foreground {median['foreground']:.3f} s, {ratio:.2f} plain copies "
        f"(target {TARGET:.0f}, and at most a step)"
    )


if __name__ == "__main__":
    main()

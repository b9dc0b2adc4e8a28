"""`python -m benchmarks.objectives`: the cost of a loss on log-probabilities relative to supervised fine-tuning.

Arms: `sft`, the task's loss alone; `beside`, with an additional clipped ratio; `alone`, the ratio with a task weight of
0. All train LoRA with a frozen head of 32,000 tokens, on the same micro-batch. Reported, as ratios to `sft`: the time
of the head (logits, terms, and the gradient at the decoder's output), the median over rounds in which the arms
alternate in one process, the worse of wall time and processor time; and, on Linux, the growth of the peak memory in a
step, the median over separate processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import workload as w
from benchmarks.arms import install_strategy
from benchmarks.train import machine, say
from budwood import Options, Strategy, hookimpl

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood import LossTerm, Run, Step

SIZE = w.Size(2, 512, 1376, 8, 8, 32_000)
ARMS: dict[str, float | None] = {"sft": None, "beside": 1.0, "alone": 0.0}
"""The task's weight in addition to the ratio; None: without the ratio."""
TIME, MEMORY = 1.10, 1.15
"""Largest allowed ratios."""
PROCESSES = 3
"""Processes per arm in which peak memory is measured; single measurements vary by a fifth."""


class Ratio(Strategy):
    """PPO's clipped ratio (Schulman et al., 2017, equation 7) with an advantage of 1."""

    api = 2

    class Options(Options):
        task_weight: float = 1.0

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        run.task_weight *= self.options.task_weight
        return model

    @hookimpl
    def sequence_terms(self, step: Step, log_probs: Tensor) -> LossTerm:
        import torch

        from budwood import LossTerm

        ratio = (log_probs - log_probs.detach()).exp()
        return LossTerm("ratio", -torch.minimum(ratio, ratio.clamp(0.8, 1.2)))


class Arm:
    """A run before its first step, and the seconds of its head in each step."""

    def __init__(self, name: str, workload: w.Workload, output: Path, precision: str) -> None:
        from budwood.recipe.schema import Recipe
        from budwood.training.batches import optimizer_steps
        from budwood.training.report import Report
        from budwood.training.setup import prepare

        weight = ARMS[name]
        ratio = [] if weight is None else [{"ratio": {"task_weight": weight}}]
        recipe = {
            "base": {"model": str(workload.base), "quantization": "none"},
            "data": {"train": str(workload.data), "eval": "none", "max_length": w.MAX_LENGTH},
            "strategies": [{"lora": {"rank": w.RANK, "alpha": w.ALPHA}}, *ratio],
            "train": {
                "steps": 1000,
                "batch_examples": w.EXAMPLES_PER_STEP,
                "micro_tokens": 8192,
                "learning_rate": w.LEARNING_RATE,
                "precision": precision,
                "seed": w.SEED,
            },
            "output": str(output),
        }
        self.run, self.hooks, self.engine = prepare(Recipe.from_dict(recipe), Report(quiet=True), True)
        self.run.model.train()
        self.batches, self.run.counts = next(optimizer_steps(self.run, self.hooks))
        self.wall: list[float] = []
        self.processor: list[float] = []
        self._original_head: Callable[..., Any] = self.engine._head
        self.engine._head = self._head  # type: ignore[method-assign]

    def step(self) -> None:
        """Compute the gradients of one optimizer step, as in the training loop."""
        from budwood.training.memory import accumulate

        self.wall.append(0.0)
        self.processor.append(0.0)
        accumulate(self.run, self.hooks, self.engine, self.batches)
        self.engine.finish_step()
        self.run.optimizer.zero_grad(set_to_none=True)

    def _head(self, *args: Any) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        result = self._original_head(*args)
        self.wall[-1] += time.perf_counter() - wall
        self.processor[-1] += time.process_time() - processor
        return result


def peak(name: str, workload: w.Workload, output: Path, precision: str, threads: int, connection: Connection) -> None:
    """Entry point of a process: send the growth of its peak memory over three steps, in bytes."""
    import torch

    torch.set_num_threads(threads)
    install_strategy(output, "ratio", "benchmarks.objectives:Ratio")
    arm = Arm(name, workload, output / "run", precision)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak of loading
    before = _status("VmRSS")
    for _ in range(3):
        arm.step()
    connection.send(_status("VmHWM") - before)


def _status(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def memory(workload: w.Workload, folder: Path, precision: str, threads: int) -> dict[str, list[int]]:
    """Return the growth of the peak memory of each arm, for each of its processes."""
    context = multiprocessing.get_context("spawn")
    growth: dict[str, list[int]] = {name: [] for name in ARMS}
    for number, name in ((number, name) for number in range(PROCESSES) for name in ARMS):
        ours, theirs = context.Pipe()
        output = folder / f"memory-{name}-{number}"
        process = context.Process(target=peak, args=(name, workload, output, precision, threads, theirs))
        process.start()
        theirs.close()
        growth[name].append(ours.recv())
        process.join()
    return growth


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.objectives", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9, help="measured steps per arm (default 9)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32", help="(default fp32)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: all cores)")
    chosen = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(chosen.threads)
    names = list(ARMS)
    with tempfile.TemporaryDirectory(prefix="budwood-bench-") as temporary:
        folder = Path(temporary)
        workload = w.build(folder / "work", 1, SIZE)
        peaks = memory(workload, folder, chosen.precision, chosen.threads) if Path("/proc/self").exists() else {}
        install_strategy(folder, "ratio", "benchmarks.objectives:Ratio")
        arms = {name: Arm(name, workload, folder / name, chosen.precision) for name in names}
        for number in range(chosen.rounds + 1):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                arms[name].step()
    say(" · ".join(f"{name} {value}" for name, value in machine().items()))
    labels = sum(len(batch.labels) for batch in arms["sft"].batches.batches)
    say(f"{labels:,} labels, {SIZE.vocabulary:,} tokens, {chosen.precision}, {chosen.threads} threads")
    first = arms["sft"]
    say(
        f"sft: head {statistics.median(first.wall[1:]):.3f} s wall, "
        f"{statistics.median(first.processor[1:]):.3f} s processor; load average {os.getloadavg()[0]:.1f}"
    )
    for name, sizes in peaks.items():
        say(f"{name}: peak memory " + ", ".join(f"+{size / 1e6:,.0f}" for size in sorted(sizes)) + " MB")
    for name in names[1:]:
        arm = arms[name]
        wall, processor = (
            statistics.median(a / b for a, b in zip(times[1:], reference[1:], strict=True))
            for times, reference in ((arm.wall, first.wall), (arm.processor, first.processor))
        )
        verdict = "met" if max(wall, processor) <= TIME else "MISSED"
        say(f"{verdict}: {name}: head {wall:.3f}× wall, {processor:.3f}× processor (target {TIME:.2f}×)")
        if peaks:
            ratio = statistics.median(peaks[name]) / statistics.median(peaks["sft"])
            verdict = "met" if ratio <= MEMORY else "MISSED"
            say(f"{verdict}: {name}: peak memory {ratio:.3f}× (target {MEMORY:.2f}×)")


if __name__ == "__main__":
    main()

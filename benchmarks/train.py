"""`python -m benchmarks.train`: Budwood, the transformers Trainer and TRL train the same LoRA adapter, alternating.

Every arm is a separate process that pauses between its turns, so that noise of the machine affects all equally. The
arms of the Trainer and of TRL are measured in two groups, each with Budwood, since all together need over 24 GB. Before
each round the bf16 matmul rate of the machine is measured. Reported: real (non-padding) tokens per second; the median
over the rounds of Budwood's rate divided by the peer's; the peak memory of each process; the share of the matmul rate;
the largest difference of a step's loss from Budwood's.

On a machine with a GPU all arms train there, and memory is the peak of its allocator. `--size 1b` and `8b` need one:
bases in NF4, 8b with gradient checkpointing. All arms are then in memory at the same time, up to 140 GB. There,
`budwood-auto` lets the plan choose the layers that recompute, as on a card of 80 GB, and `unsloth` needs that package.

`--precision fp32` measures what machines without fast bf16 compute; ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 in
the environment makes this machine one of them. With a C++ compiler, `budwood-compile` is Budwood with `train.compile`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import workload as w
from benchmarks.arms import ARMS, Pace, work
from benchmarks.real_page import PRODUCTS

OURS = "budwood"
DEFAULT = {
    False: ["budwood", "trainer-1", "trainer-2", "trainer-4", "trainer-8", "trl", "trl-packed"],
    True: ["budwood", "trainer-4", "trainer-8", "trainer-16", "trl-packed"],
}
"""The default arms, by whether an optimizer step is one micro-batch."""
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
COMPILED = "budwood-compile"
DENSE = ("41m", "160m")
"""Sizes that have targets on a CPU."""
TARGET_FASTEST, TARGET_COMPILED, TARGET_EIGHT, TARGET_EIGHT_FP32, TARGET_MEMORY = 2.8, 3.0, 3.5, 3.0, 0.32
"""On a CPU: times the fastest Trainer and the one with 8 rows; share of the latter's memory."""


class Arm:
    """The process of an arm, and its measurements."""

    def __init__(self, name: str, workload: w.Workload, steps: int, threads: int) -> None:
        context = get_context("spawn")
        self.name, self.log = name, workload.folder / f"{name}.log"
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(name, workload, steps, threads, self.log, theirs))
        self.process.start()
        theirs.close()
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.losses: list[float] = []
        self.peak = self.loaded = 0
        self.notes: dict[str, Any] = {}

    def wait(self) -> None:
        """Wait until the arm is ready for its first step."""
        self.notes = self._receive()["notes"]
        self.loaded = self.peak

    def run(self, steps: int) -> float:
        """Run `steps` optimizer steps; return the seconds."""
        self.connection.send(steps)
        report = self._receive()
        self.seconds.append(report["seconds"])
        self.processor.append(report["processor"])
        self.losses += report["losses"]
        return self.seconds[-1]

    def stop(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):  # it is ending by itself, and its own error is to be seen
            if self.process.is_alive():
                self.connection.send(0)
        self.process.join()

    def _receive(self) -> dict[str, Any]:
        try:
            report: dict[str, Any] = self.connection.recv()
        except EOFError:
            tail = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise SystemExit(f"error: the arm {self.name} ended early:\n{tail}") from None
        self.peak = max(self.peak, report["peak"])
        return report


def matmul_rate(threads: int, dtype: str = "bfloat16") -> float:
    """Return the FLOPs per second of a large matmul on this machine, or its GPU; the best of six."""
    import torch

    torch.set_num_threads(threads)
    on_cuda = torch.cuda.is_available()
    size = 8192 if on_cuda else 2048
    device = "cuda" if on_cuda else "cpu"
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    wait = torch.cuda.synchronize if on_cuda else lambda: None
    best = 0.0
    for _ in range(6):
        wait()
        started = time.perf_counter()
        a @ b
        wait()
        best = max(best, 2.0 * size**3 / (time.perf_counter() - started))
    return best


def measure(
    names: list[str],
    rounds: int,
    steps: int,
    warmup: int,
    threads: int,
    folder: Path,
    size: str,
    precision: str = "bf16",
    examples: int | None = None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Run all arms; return the measurements. See `workload.build`."""
    total = warmup + rounds * steps
    workload = w.build(folder, total, w.SIZES[size], precision, examples, kept)
    tokens, flops = workload.step_sizes()
    arms = []
    rates: list[float] = []
    try:
        for name in names:
            arms.append(Arm(name, workload, total, threads))
        for arm in arms:
            arm.wait()
            say(f"ready: {arm.name}")
        for arm in arms:
            say(f"warming up {arm.name}: {arm.run(warmup):.1f} s")
            arm.seconds.clear()
            arm.processor.clear()
        for number in range(rounds):
            rates.append(matmul_rate(threads, DTYPES[precision]))
            order = arms[number % len(arms) :] + arms[: number % len(arms)]
            shown = [f"{arm.name} {arm.run(steps):.1f}" for arm in order]
            say(f"round {number + 1} of {rounds}, {rates[-1] / 1e9:.0f} GFLOP/s matmul, seconds: " + ", ".join(shown))
    finally:
        for arm in arms:
            arm.stop()
    # tokens and FLOPs of each round, the same for all arms
    per_round = tokens[warmup:].reshape(rounds, steps).sum(1)
    work_done = flops[warmup:].reshape(rounds, steps).sum(1)
    results: dict[str, Any] = {}
    for arm in arms:
        seconds = np.array(arm.seconds)
        results[arm.name] = {
            "tokens_per_second": statistics.median((per_round / seconds).tolist()),
            "tokens_per_second_by_round": (per_round / seconds).round(1).tolist(),
            "processor_seconds_by_round": [round(s, 3) for s in arm.processor],
            "peak_bytes": arm.peak,
            "peak_bytes_before_training": arm.loaded,
            "share_of_matmul_rate": statistics.median((work_done / seconds / np.array(rates)).tolist()),
            "losses": [round(loss, 5) for loss in arm.losses],
            **arm.notes,
        }
    compare(results)
    return {
        "arms": results,
        "matmul_flops_per_second": statistics.median(rates),
        "rounds": rounds,
        "steps_per_round": steps,
        "warmup_steps": warmup,
        "examples_per_step": workload.examples,
        "tokens_per_step": round(float(tokens[warmup:].mean()), 1),
        "mean_length": round(float(workload.lengths().mean()), 1),
        "threads": threads,
        "size": size,
        "precision": precision,
        "machine": machine(),
    }


def default_arms(whole_steps: bool) -> list[str]:
    """Return the arms of a size if none are named; the compiled one where there is a compiler, and no GPU."""
    import torch

    compiles = not torch.cuda.is_available() and any(map(shutil.which, ("g++", "clang++")))
    return [*DEFAULT[whole_steps], *[COMPILED] * (compiles and not whole_steps)]


class Profile(Pace):
    """Instead of turns: a step to warm up, then one in torch's profiler, and the end."""

    def __init__(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.profiler = profile(activities=[ProfilerActivity.CPU], with_flops=True)

    def ready(self) -> None:
        """Begin at once."""
        self.losses = []

    def stepped(self, loss: float) -> None:
        """Begin after the first step, and end after the second."""
        self.losses.append(loss)
        if len(self.losses) == 1:
            self.profiler.start()
            return
        self.profiler.stop()
        raise SystemExit(0)


def profile_step(size: str, precision: str, threads: int) -> None:
    """Print the shares of the operators in one of Budwood's steps on a CPU, and the rate of its products."""
    import torch

    with tempfile.TemporaryDirectory(prefix="budwood-bench-") as folder:
        workload = w.build(Path(folder), 2, w.SIZES[size], precision)
        torch.set_num_threads(threads)
        rate, pace = matmul_rate(threads, DTYPES[precision]), Profile()
        with contextlib.suppress(SystemExit):
            ARMS[OURS](workload, 2, pace)
    events = [event for event in pace.profiler.key_averages() if event.self_cpu_time_total > 0]
    total = sum(event.self_cpu_time_total for event in events)
    products = [event for event in events if PRODUCTS.match(event.key)]
    spent = sum(event.self_cpu_time_total for event in products)
    counted = [event for event in products if event.flops]  # torch knows those of most
    reached = sum(event.flops for event in counted) * 1e6 / sum(event.self_cpu_time_total for event in counted)
    say(f"{size}: products {spent / total:.0%} of the time, at {reached / rate:.0%} of {rate / 1e9:.0f} GFLOP/s")
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:14]:
        say(f"{event.self_cpu_time_total / total:6.1%}  {event.count:6}  {event.key}")


def together(names: list[str]) -> list[list[str]]:
    """Return the groups of arms measured together: Budwood with the Trainer's, and with TRL's."""
    peers = [[n for n in names if n.startswith(kind)] for kind in ("trainer", "trl", "unsloth")]
    ours = [name for name in names if name.startswith(OURS)]
    return [[*ours, *group] for group in peers if group] or [ours]


def rows_at_once(name: str) -> int:
    """Return how many padded rows an arm takes at once, which divide an optimizer step; 1: it packs them."""
    if name == "trl":
        return 8
    return int(name.removeprefix("trainer-")) if name.startswith("trainer-") else 1


def compare(results: dict[str, Any]) -> None:
    """Add the comparison with Budwood to the results of each peer."""
    if OURS not in results:
        return
    ours = results[OURS]
    for name, arm in results.items():
        if name == OURS:
            continue
        pairs = zip(ours["tokens_per_second_by_round"], arm["tokens_per_second_by_round"], strict=True)
        arm["budwood_is_faster_by"] = statistics.median(mine / theirs for mine, theirs in pairs)
        spent = zip(arm["processor_seconds_by_round"], ours["processor_seconds_by_round"], strict=True)
        arm["processor_time_ratio"] = statistics.median(theirs / mine for theirs, mine in spent)
        arm["budwood_memory_share"] = ours["peak_bytes"] / arm["peak_bytes"]
        if COMPILED in results and name != COMPILED:
            pairs = zip(results[COMPILED]["tokens_per_second_by_round"], arm["tokens_per_second_by_round"], strict=True)
            arm["compiled_budwood_is_faster_by"] = statistics.median(mine / theirs for mine, theirs in pairs)
        arm["largest_loss_difference"] = max(abs(a - b) for a, b in zip(ours["losses"], arm["losses"], strict=True))


def verdicts(results: dict[str, Any], precision: str = "bf16") -> list[tuple[str, bool]]:
    """Return the targets on a CPU of the arms that ran, and whether each is met."""
    trainers = {name: arm for name, arm in results.items() if name.startswith("trainer-") and OURS in results}
    lines = []
    if trainers and precision == "bf16":
        fastest = max(trainers, key=lambda name: trainers[name]["tokens_per_second"])
        factor = trainers[fastest]["budwood_is_faster_by"]
        lines.append(
            (f"{factor:.2f}× the fastest Trainer ({fastest}); target {TARGET_FASTEST}×", factor >= TARGET_FASTEST)
        )
        if COMPILED in results:
            factor = trainers[fastest]["compiled_budwood_is_faster_by"]
            lines.append((f"{factor:.2f}× it with train.compile; target {TARGET_COMPILED}×", factor >= TARGET_COMPILED))
    if "trainer-8" in trainers:
        eight = trainers["trainer-8"]
        factor, share = eight["budwood_is_faster_by"], eight["budwood_memory_share"]
        target = TARGET_EIGHT if precision == "bf16" else TARGET_EIGHT_FP32
        lines.append((f"{factor:.2f}× the Trainer with 8 rows; target {target}×", factor >= target))
        lines.append((f"{share:.0%} of its peak memory; target {TARGET_MEMORY:.0%}", share <= TARGET_MEMORY))
    return lines


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| arm | real tokens/s | Budwood's speedup | in CPU time | peak memory | share of matmul rate | loss difference |",  # noqa: E501
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, arm in results.items():
        faster = f"{arm['budwood_is_faster_by']:.2f}×" if "budwood_is_faster_by" in arm else ""
        spent = f"{arm['processor_time_ratio']:.2f}×" if "processor_time_ratio" in arm else ""
        loss = f"{arm['largest_loss_difference']:.4f}" if "largest_loss_difference" in arm else ""
        lines.append(
            f"| {name} | {arm['tokens_per_second']:.0f} | {faster} | {spent} | {arm['peak_bytes'] / 1e9:.2f} GB "
            f"| {arm['share_of_matmul_rate']:.0%} | {loss} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """Return processor, GPU and versions."""
    import torch

    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    packages = ("budwood", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl")
    installed = {d.metadata["Name"] for d in metadata.distributions()}
    versions = {name: metadata.version(name) for name in packages if name in installed}
    processor = names[0].split(":")[1].strip() if names else platform.processor()
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "processor": processor, "cores": str(os.cpu_count()), **gpu, "python": platform.python_version(), **versions
    }  # fmt: skip


def say(text: str) -> None:
    """Print a line immediately."""
    print(text, flush=True)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument(
        "--size", choices=list(w.SIZES), default="41m", help="size of the model; the larger ones need a GPU"
    )
    parser.add_argument(
        "--precision", choices=["bf16", "fp32"], default="bf16", help="compute dtype of all arms (default bf16)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns per arm (default 5)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps per turn (default 2)")
    parser.add_argument("--warmup", type=int, default=1, help="optimizer steps before the first round (default 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads per arm (default: all cores)")
    parser.add_argument(
        "--examples", type=int, default=w.EXAMPLES_PER_STEP, help="examples of an optimizer step (default %(default)s)"
    )
    parser.add_argument("--base", type=Path, help="folder that keeps the base for another call; made if it is missing")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--profile", action="store_true", help="only profile one of Budwood's steps, on a CPU")
    return parser


def main() -> None:
    """Run the benchmark, print and write the results."""
    parser = make_parser()
    chosen = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if chosen.profile:
        profile_step(chosen.size, chosen.precision, chosen.threads)
        return
    result: dict[str, Any] = {}
    whole_steps = w.SIZES[chosen.size].whole_steps
    arms = chosen.arms or default_arms(whole_steps)
    for name in arms:
        if chosen.examples < 1 or chosen.examples % rows_at_once(name):
            parser.error(f"--examples {chosen.examples}: {name} needs a multiple of {rows_at_once(name)}")
    for names in [arms] if whole_steps else together(arms):
        with tempfile.TemporaryDirectory(prefix="budwood-bench-") as folder:
            options = (chosen.rounds, chosen.steps, chosen.warmup, chosen.threads)
            rest = (chosen.size, chosen.precision, chosen.examples, chosen.base)
            measured = measure(names, *options, Path(folder), *rest)
        result = {**measured, **result, "arms": {**measured["arms"], **result.get("arms", {})}}
    result["arms"] = {name: result["arms"][name] for name in ARMS if name in result["arms"]}
    say("\n" + table(result["arms"]) + "\n")
    say(" · ".join(f"{name} {value}" for name, value in result["machine"].items()))
    say(f"matmul rate {result['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s, {result['threads']} threads")
    for text, met in verdicts(result["arms"], chosen.precision) if chosen.size in DENSE else ():
        say(f"{'met' if met else 'MISSED'}: {text}")
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        say(f"wrote {chosen.out}")


if __name__ == "__main__":
    main()

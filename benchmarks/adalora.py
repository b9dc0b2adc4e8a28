"""`python -m benchmarks.adalora`: the cost of a step of AdaLoRA relative to LoRA at its initial rank.

All arms run in separate processes and alternate step by step on the same examples: LoRA; AdaLoRA before its budget
decreases, while it decreases (allocating at every step, the most expensive interval), and once it is final; and PEFT's
LoRA and AdaLoRA with its allocator, in a plain loop over padded rows. Reported: the median over the rounds of an arm's
time divided by that of its LoRA in the same round, in wall time and in processor time, which is less affected by other
load on the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import workload as w
from benchmarks.train import machine, say
from budwood import Event, hookimpl

ALPHA = 24
TARGETS = {"adalora before": 1.05, "adalora during": 1.05, "adalora after": 1.0}
PEFT_ROWS = 4


class Arm:
    """A training process that pauses between its turns.

    Threads of one process would share oneDNN's compiled kernels, so that the second arm with a batch of the same shape
    would be faster.
    """

    def __init__(self, name: str, work: Callable[[Callable[[], None]], None], threads: int, folder: Path) -> None:
        context = get_context("spawn")
        self.name, self._log = name, folder / f"{name.replace(' ', '-')}.log"
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(work, threads, self._log, theirs))
        self._process.start()
        theirs.close()
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self._receive()

    def step(self) -> None:
        """Run one optimizer step, and record its time."""
        self._connection.send(True)
        seconds, processor = self._receive()
        self.seconds.append(seconds)
        self.processor.append(processor)

    def stop(self) -> None:
        """End the process; final checks and saving are not measured."""
        if self._process.is_alive():
            self._connection.send(False)
        self._process.join()

    def _receive(self) -> tuple[float, float]:
        try:
            times: tuple[float, float] = self._connection.recv()
        except EOFError:
            tail = self._log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise SystemExit(f"error: the arm {self.name} ended early:\n{tail}") from None
        return times


def _work(work: Callable[[Callable[[], None]], None], threads: int, log: Path, connection: Connection) -> None:
    """Entry point of an arm's process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(threads)
    started = (0.0, 0.0)

    def pause() -> None:
        nonlocal started
        connection.send((time.perf_counter() - started[0], time.process_time() - started[1]))
        if not connection.recv():
            raise SystemExit(0)
        started = (time.perf_counter(), time.process_time())

    work(pause)


def budwood(workload: w.Workload, strategy: dict[str, Any], steps: int, name: str, pause: Callable[[], None]) -> None:
    """Run a recipe, pausing before the first step and after each."""
    from budwood.recipe.schema import Recipe
    from budwood.training.loop import train
    from budwood.training.report import Report
    from budwood.training.setup import prepare

    class Pace:
        @hookimpl
        def on_event(self, event: Event) -> None:
            if event.kind in ("start", "step"):
                pause()

    recipe = Recipe.from_dict(
        {
            "base": {"model": str(workload.base), "quantization": "none"},
            "data": {"train": str(workload.data), "eval": "none", "max_length": w.MAX_LENGTH},
            "strategies": [strategy],
            "train": {
                "steps": steps, "batch_examples": w.EXAMPLES_PER_STEP, "learning_rate": w.LEARNING_RATE,
                "schedule": "constant", "warmup": 0, "precision": "bf16", "seed": w.SEED,
            },
            "output": str(workload.folder / name.replace(" ", "-")),
        }
    )  # fmt: skip
    run, hooks, engine = prepare(recipe, report := Report(quiet=True), False)
    hooks.register_core(Pace(), "pace")
    train(run, hooks, engine, report)


def peft(
    workload: w.Workload, adaptive: bool, initial_rank: int, target_rank: int, steps: int, pause: Callable[[], None]
) -> None:
    """Train PEFT's model in a plain loop; its AdaLoRA allocates at every step."""
    import torch
    from peft import AdaLoraConfig, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    common: dict[str, Any] = {"lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    phases = {"total_step": steps, "tinit": 0, "tfinal": 1, "deltaT": 1}
    ranks = {"init_r": initial_rank, "target_r": target_rank}
    config = AdaLoraConfig(**common, **phases, **ranks) if adaptive else LoraConfig(r=initial_rank, **common)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(workload.base, dtype=torch.bfloat16), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=w.LEARNING_RATE, weight_decay=0.0, fused=True)
    pause()
    for number, batches in enumerate(padded_steps(workload), start=1):
        labels = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            (loss * int((batch["labels"] != -100).sum()) / labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, w.CLIP)
        optimizer.step()
        if adaptive:
            model.base_model.update_and_allocate(number)
        optimizer.zero_grad(set_to_none=True)
        pause()


def padded_steps(workload: w.Workload) -> Iterator[list[dict[str, Any]]]:
    """Yield the micro-batches of each optimizer step: tensors of `PEFT_ROWS` padded rows."""
    import torch

    examples = workload.tokens()
    for start in range(0, len(examples), w.EXAMPLES_PER_STEP):
        batches = []
        for at in range(start, start + w.EXAMPLES_PER_STEP, PEFT_ROWS):
            rows = examples[at : at + PEFT_ROWS]
            longest = max(len(ids) for ids, _ in rows)
            pads = [longest - len(ids) for ids, _ in rows]
            columns = {
                "input_ids": [ids + [0] * pad for (ids, _), pad in zip(rows, pads, strict=True)],
                "attention_mask": [[1] * len(ids) + [0] * pad for (ids, _), pad in zip(rows, pads, strict=True)],
                "labels": [
                    [-100] * prompt + ids[prompt:] + [-100] * pad for (ids, prompt), pad in zip(rows, pads, strict=True)
                ],
            }
            batches.append({name: torch.tensor(values) for name, values in columns.items()})
        yield batches


def measure(
    folder: Path, initial_rank: int, target_rank: int, rounds: int, warmup: int, threads: int, with_peft: bool
) -> list[Arm]:
    """Run all arms. At the end of the warm-up the third AdaLoRA prunes its ranks."""
    steps = warmup + rounds + 1
    workload = w.build(folder, steps)
    ranks = {"initial_rank": initial_rank, "target_rank": target_rank, "alpha": ALPHA, "interval": 1}
    strategies = {
        "lora": {"lora": {"rank": initial_rank, "alpha": ALPHA}},
        "adalora before": {"adalora": ranks | {"initial_phase": steps - 2, "final_phase": 1}},
        "adalora during": {"adalora": ranks | {"initial_phase": 0, "final_phase": 1}},
        "adalora after": {"adalora": ranks | {"initial_phase": 0, "final_phase": steps - warmup}},
    }
    works = {name: partial(budwood, workload, strategy, steps, name) for name, strategy in strategies.items()}
    if with_peft:
        works |= {
            f"peft {name}": partial(peft, workload, name == "adalora", initial_rank, target_rank, steps)
            for name in ("lora", "adalora")
        }
    arms: list[Arm] = []
    try:
        for name, work in works.items():
            say(f"starting {name}")
            arms.append(Arm(name, work, threads, folder))
        for number in range(warmup + rounds):
            for arm in arms[number % len(arms) :] + arms[: number % len(arms)]:
                arm.step()
            shown = ", ".join(f"{arm.name} {arm.seconds[-1]:.2f}" for arm in arms)
            say(f"{'warm-up' if number < warmup else f'round {number - warmup + 1} of {rounds}'}, seconds: {shown}")
    finally:
        for arm in arms:
            arm.stop()
    for arm in arms:
        del arm.seconds[:warmup], arm.processor[:warmup]
    return arms


def ratio(values: list[float], base: list[float]) -> float:
    """Return the median over rounds of the ratios."""
    return statistics.median(value / reference for value, reference in zip(values, base, strict=True))


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adalora", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--initial-rank", type=int, default=12, help="initial rank of AdaLoRA, rank of LoRA (default 12)"
    )
    parser.add_argument("--target-rank", type=int, default=8, help="final mean rank of AdaLoRA (default 8)")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps per arm (default 9)")
    parser.add_argument("--warmup", type=int, default=4, help="steps before the first round, at least 2 (default 4)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads per arm (default: all cores)")
    parser.add_argument("--no-peft", action="store_true", help="skip PEFT's arms, the slowest")
    chosen = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="budwood-bench-") as folder:
        arms = measure(
            Path(folder), chosen.initial_rank, chosen.target_rank, chosen.rounds, max(chosen.warmup, 2),
            chosen.threads, not chosen.no_peft,
        )  # fmt: skip
    by_name = {arm.name: arm for arm in arms}
    say("\n| arm | seconds per step | relative to LoRA | in processor time |\n|---|---:|---:|---:|")
    verdicts = []
    for name, arm in by_name.items():
        base = by_name["peft lora" if name.startswith("peft") else "lora"]
        wall, processor = ratio(arm.seconds, base.seconds), ratio(arm.processor, base.processor)
        say(f"| {name} | {statistics.median(arm.seconds):.2f} | {wall:.3f}× | {processor:.3f}× |")
        if name in TARGETS:
            verdicts.append((f"{name}: {wall:.3f}× a LoRA step; target {TARGETS[name]}×", wall <= TARGETS[name]))
    say("\n" + " · ".join(f"{name} {value}" for name, value in machine().items()))
    for text, met in verdicts:
        say(f"{'met' if met else 'MISSED'}: {text}")


if __name__ == "__main__":
    main()

"""`python -m benchmarks.adversarial`: the cost of an optimizer step of each adversarial method, in plain steps.

All arms run in one process and alternate on the same batches, so that noise of the machine affects all equally.
Reported: the ratio of the median step to that of the plain arm, in wall time and processor time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import workload as w

STEPS = 3
"""K of pgd and freelb."""
ARMS: dict[str, tuple[dict[str, Any] | None, float]] = {
    "plain": (None, 1.0),
    "fgm": ({"method": "fgm"}, 2.1),
    "pgd": ({"method": "pgd", "steps": STEPS}, STEPS + 1.1),
    "freelb": ({"method": "freelb", "steps": STEPS}, STEPS + 0.1),
    "smart": ({"method": "smart"}, 3.2),
    "vat": ({"method": "vat"}, 3.2),
    "neftune": ({"method": "neftune"}, 1.03),
}
"""Options and the largest allowed cost of each arm, in plain steps."""


class Arm:
    """A run before its first step, and the seconds of its steps."""

    def __init__(self, options: dict[str, Any] | None, workload: w.Workload, output: Path, examples: int) -> None:
        from budwood.recipe.schema import Recipe
        from budwood.training.batches import optimizer_steps
        from budwood.training.report import Report
        from budwood.training.setup import prepare

        strategies: list[Any] = [{"lora": {"rank": w.RANK, "alpha": w.ALPHA}}]
        recipe = {
            "base": {"model": str(workload.base), "quantization": "none"},
            "data": {"train": str(workload.data), "eval": "none", "max_length": w.MAX_LENGTH},
            "strategies": strategies if options is None else [*strategies, {"adversarial": options}],
            "train": {
                "steps": 1000,
                "batch_examples": examples,
                "learning_rate": w.LEARNING_RATE,
                "schedule": "constant",
                "warmup": 0,
                "clip": w.CLIP,
                "precision": "bf16",
                "seed": w.SEED,
            },
            "output": str(output),
        }
        self.run, self.hooks, self.engine = prepare(Recipe.from_dict(recipe), Report(quiet=True), True)
        self.run.model.train()
        self.batches, self.run.counts = next(optimizer_steps(self.run, self.hooks))
        self.wall: list[float] = []
        self.processor: list[float] = []

    def step(self) -> None:
        """Run and time one optimizer step on the arm's batches, as in the training loop."""
        import torch

        from budwood.training.memory import accumulate

        run, hooks = self.run, self.hooks
        wall, processor = time.perf_counter(), time.process_time()
        accumulate(run, hooks, self.engine, self.batches)
        loss = self.engine.finish_step()["loss"]
        norm = torch.nn.utils.clip_grad_norm_(run.trainable, w.CLIP)
        hooks.call("before_clip", run=run)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        if not torch.isfinite(loss + norm):
            raise SystemExit("error: the loss is not finite")
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.process_time() - processor)


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adversarial", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps per arm (default 7)")
    parser.add_argument("--examples", type=int, default=8, help="examples per step (default 8)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: all cores)")
    chosen = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(chosen.threads)
    names = ["plain", *(name for name in chosen.arms if name != "plain")]
    with tempfile.TemporaryDirectory(prefix="budwood-bench-") as folder:
        workload = w.build(Path(folder), 1)
        arms = {name: Arm(ARMS[name][0], workload, Path(folder) / name, chosen.examples) for name in names}
        for number in range(chosen.rounds + 1):
            order = names[number % len(names) :] + names[: number % len(names)]
            for name in order:
                arms[name].step()
    tokens = arms["plain"].run.counts["token"]
    print(
        f"{tokens:,} tokens per step, K = {STEPS}, {chosen.rounds} rounds, {chosen.threads} threads, "
        f"torch {torch.__version__}"
    )
    wall, processor = (
        {name: statistics.median(getattr(arm, kind)[1:]) for name, arm in arms.items()}
        for kind in ("wall", "processor")
    )
    print(f"plain: {wall['plain']:.3f} s per step, {processor['plain']:.3f} s of processor time")
    for name in names[1:]:
        limit = ARMS[name][1]
        ratios = wall[name] / wall["plain"], processor[name] / processor["plain"]
        verdict = "met" if max(ratios) <= limit else "MISSED"
        print(f"{verdict}: {name} {ratios[0]:.2f}× wall, {ratios[1]:.2f}× processor (target {limit:.2f}×)")


if __name__ == "__main__":
    main()

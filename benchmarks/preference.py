"""`python -m benchmarks.preference`: does `dpo` after a short SFT improve on that start? Five seeds on the demo's base.

Pairs are made of the demo's package descriptions: the chosen answer is the package's section, the rejected another
section. Each seed trains LoRA on the chosen answers for a few steps, and continues that adapter with
`dpo`; as a control, it continues it with the same number of further steps of SFT. Reported on held-out pairs, as mean
and standard deviation over the seeds: how often the chosen answer has the larger log-probability, the mean difference
of the log-probabilities, and the loss of the chosen answers.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from budwood import Run, Strategy, hookimpl

ROOT = Path(__file__).parents[1] / "examples" / "budwood_demo"
SFT_STEPS, STEPS = 40, 60
TRAIN, HELD_OUT = 960, 200
ARMS: dict[str, list[Any]] = {"more SFT": [], "dpo": [{"dpo": {"beta": 0.1}}]}


class Order(Strategy):
    """Measures the order of held-out pairs by log-probability alone, which is also defined at the start."""

    api = 2
    trains_on = ("", "preference pairs")

    @hookimpl
    def evaluate(self, run: Run) -> dict[str, float]:
        import torch

        from budwood import eval_results, label_log_probs

        def differences(batch: Any) -> list[float]:
            log_probs = label_log_probs(run, batch).double()
            sums = log_probs.new_zeros(len(batch.keys)).index_add(0, batch.example_of_label, log_probs)
            return (sums[0::2] - sums[1::2]).tolist()

        values = torch.tensor([value for part in eval_results(run, differences) for value in part])
        return {"eval_order": float((values > 0).float().mean()), "eval_difference": float(values.mean())}


def pairs(name: str, count: int, seed: int) -> list[dict[str, str]]:
    """Return pairs of the right section of a package and another one."""
    rows = [json.loads(line) for line in (ROOT / "data" / "sections" / f"{name}.jsonl").read_text().splitlines()]
    draw = random.Random(f"{name} {seed}")
    labels = [row["label"] for row in rows]
    result = []
    for row in draw.sample(rows, count):
        other = draw.choice([label for label in labels if label != row["label"]])
        result.append({"prompt": f"{row['text']}\nSection:", "chosen": f" {row['label']}", "rejected": f" {other}"})
    return result


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def main() -> int:
    """Run the arms for each seed, and print the means."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preference", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--base", default=str(ROOT / "base"))
    options = parser.parse_args()
    started = time.perf_counter()
    found: dict[str, list[dict[str, float]]] = {"start": [], **{arm: [] for arm in ARMS}}
    with tempfile.TemporaryDirectory(prefix="budwood-preference-") as folder:
        for seed in range(options.seeds):
            for arm, metrics in one_seed(Path(folder), options.base, seed).items():
                found[arm].append(metrics)
            orders = ", ".join(f"{arm} {runs[-1]['eval_order']:.3f}" for arm, runs in found.items())
            print(f"seed {seed}: right order {orders}; {time.perf_counter() - started:.0f} s", flush=True)
    names = {"eval_order": "right order", "eval_difference": "difference (nats)", "eval_loss": "loss of the chosen"}
    print(f"| | {' | '.join(names.values())} |\n|{'---|' * (len(names) + 1)}")
    for arm, runs in found.items():
        cells = []
        for name in names:
            values = [run[name] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        print(f"| {arm} | {' | '.join(cells)} |")
    return 0


def one_seed(folder: Path, base: str, seed: int) -> dict[str, dict[str, float]]:
    """Return the metrics of the start and of each arm."""
    from budwood import tune
    from budwood.recipe.schema import Recipe
    from budwood.testing.bench import register

    order = register(Order, "order")
    train, held_out = pairs("train", TRAIN, seed), pairs("eval", HELD_OUT, seed)
    files = {"train": write(folder / "pairs.jsonl", train), "eval": write(folder / "held-out.jsonl", held_out)}
    chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in train]
    answers = write(folder / "chosen.jsonl", chosen)

    def run(name: str, data: dict[str, str], strategies: list[Any], steps: int, adapter: Path | None) -> Run:
        recipe = {
            "base": {"model": base, "quantization": "none"},
            "data": {**data, "max_length": 128},
            "strategies": [{"lora": {"rank": 8}}, *strategies],
            "train": {"steps": steps, "batch_examples": 16, "micro_tokens": 4096, "seed": seed, "eval_generate": 0},
            "output": str(folder / f"{seed}-{name.replace(' ', '-')}"),
            **({"adapter": str(adapter)} if adapter else {}),
        }
        return tune(Recipe.from_dict(recipe), quiet=True)

    start = run("start", {"train": answers, "eval": "none"}, [], SFT_STEPS, None)
    metrics: dict[str, dict[str, float]] = {}
    for arm, strategies in ARMS.items():
        data = files if strategies else {**files, "train": answers}
        done = run(arm, data, [*strategies, order], STEPS, start.directory / "adapter")
        metrics |= {"start": dict(done.before), arm: dict(done.metrics)}
    return metrics


if __name__ == "__main__":
    raise SystemExit(main())

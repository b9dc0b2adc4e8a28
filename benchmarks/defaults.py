"""`python -m benchmarks.defaults`: do the defaults learn as well as the best settings of a sweep?

Each cell is a kind of data, a number of rows and a strategy, on a base: the small one of the demo, SmolLM2-135M or an
encoder of 23 M. One run names nothing and takes the defaults; a sweep trains at every learning rate of `RATES` with
every length of `LENGTHS`, relative to the default's, with its batches and evaluations. All are evaluated on the same
rows, which none of them trains on, and keep the best adapter. The score is the accuracy, the share of exact answers, or
(chat, long text) the likelihood of a token.

The best of many runs is partly luck. So the default and the setting that won its cell run again with the seeds of
`CONFIRMED`, and the ratio is that of their means over these seeds. Held to: at least 0.95 in nine cells of ten, never
below 0.8, and never what an untrained adapter scores, or a guess of the most frequent class. Results are written as
runs finish, and a run that is already there is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.defaults_page import CONFIRMED, KINDS, SEED, group, holds, split, table, verdict, winner
from benchmarks.evidence import ROOT, start_worker
from benchmarks.train import machine, say

DEMO = ROOT / "examples" / "budwood_demo"
JSON = ROOT / "docs" / "benchmarks" / "defaults.json"
RATES = (1 / 3, 1.0, 3.0)
"""Learning rates, as multiples of the default's."""
LENGTHS = (0.5, 1.0, 2.0)
"""Numbers of optimizer steps, as multiples of the default's."""
BASES: dict[str, tuple[Callable[[], Path], str]] = {
    "demo": (lambda: DEMO / "base", "fp32"),
    "smollm2": (models.smollm2, "bf16"),
    "encoder": (models.minilm, "fp32"),
}
"""Folder and precision of each base; the encoder only classifies."""
ROWS = (50, 500, 5000)
STRATEGIES: dict[str, list[Any]] = {
    "lora": ["lora"],
    "adalora": ["adalora"],
    "fgm": ["lora", {"adversarial": {"method": "fgm"}}],
}
HELD = 300
SWEPT = 2 / 3
"""Share of the time after which the sweep starts no more runs, so that its results can be confirmed."""
Cell = tuple[str, int, str]
"""Kind of data, with the base in front of it unless that is the demo's ("smollm2 chat"); rows; strategy."""


def read(name: str) -> list[dict[str, str]]:
    """Return all rows of a set of the demo, those of its evaluation last."""
    parts = [(DEMO / "data" / name / f"{part}.jsonl").read_text(encoding="utf-8") for part in ("train", "eval")]
    return [json.loads(line) for part in parts for line in part.splitlines()]


def rows_of(kind: str) -> list[dict[str, Any]]:
    """Return the rows of a kind of data; the last `HELD` are for evaluation."""
    if kind == "classification":
        return list(read("sections"))
    if kind == "short answers":
        return list(read("name"))
    if kind == "chat":
        return [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"].strip()},
                ]
            }
            for row in read("describe")
        ]
    texts = [row["text"] for row in read("sections")]
    return [{"text": "\n".join(texts[i : i + 25])} for i in range(0, len(texts), 5)]


def job(
    kind: str, count: int, strategy: str, setting: dict[str, Any] | None, folder: Path, seed: int = SEED
) -> dict[str, Any] | None:
    """Return a run of a cell; without a `setting`, it names nothing. None if there are too few rows."""
    base, data = split(kind)
    rows = rows_of(data)
    train, held = rows[:-HELD][:count], rows[-HELD:]
    if len(train) < count * 0.7:
        return None
    stem = f"{kind.replace(' ', '-')}-{count}"
    for name, part in (("train", train), ("eval", held)):
        path = folder / f"{stem}-{name}.jsonl"
        if not path.exists():
            path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    key = f"{kind}/{count}/{strategy}/" + (json.dumps(setting, sort_keys=True) if setting else "default")
    key += f"/{seed}" if seed != SEED else ""
    task = "sequence-classification" if data == "classification" else "causal-lm"
    model, precision = BASES[base]
    recipe = {
        "base": {"model": str(model()), "quantization": "none", "task": task},
        "data": {"train": str(folder / f"{stem}-train.jsonl"), "eval": str(folder / f"{stem}-eval.jsonl")},
        "strategies": STRATEGIES[strategy],
        "train": {"precision": precision, "seed": seed, **(setting or {})},
    }
    return {"key": key, "recipe": recipe, "output": str(folder / f"run-{abs(hash(key))}")}


def work(task: dict[str, Any]) -> dict[str, Any]:
    """Train; return the final score, the settings that were used, and the time."""
    import budwood
    from budwood.errors import BudwoodError
    from budwood.recipe.schema import Recipe

    started, output = time.process_time(), Path(task["output"])
    try:
        run = budwood.tune(Recipe.from_dict({**task["recipe"], "output": str(output)}), overwrite=True, quiet=True)
    except BudwoodError as error:
        return {"key": task["key"], "score": 0.0, "error": str(error)}
    metrics = json.loads((output / "adapter" / "budwood.json").read_text(encoding="utf-8"))["metrics"]
    used = {
        name: getattr(run.recipe.train, name)
        for name in ("learning_rate", "epochs", "batch_examples", "eval_every", "warmup")
    }
    shutil.rmtree(output)
    return {
        "key": task["key"], "score": score(task["key"].split("/")[0], metrics), "metrics": metrics,
        "untrained": score(task["key"].split("/")[0], run.before), "steps": run.steps, "used": used,
        "seconds": round(time.process_time() - started, 1),
    }  # fmt: skip


def score(kind: str, metrics: dict[str, float]) -> float:
    """Return a number to compare: higher is better, and its ratio to another has a meaning."""
    name = {"classification": "eval_accuracy", "short answers": "eval_exact_match"}.get(split(kind)[1])
    return metrics[name] if name else math.exp(-metrics["eval_loss"])


def guess(kind: str) -> float:
    """Return the score of the same answer to all rows for evaluation: the share of their most frequent class, or 0."""
    data = split(kind)[1]
    if data != "classification":
        return 0.0
    counts = Counter(row["label"] for row in rows_of(data)[-HELD:])
    return max(counts.values()) / HELD


class Sweep:
    """The results so far, and the folder of the data and runs.

    Args:
        out: the JSON file, which is read first.
    """

    def __init__(self, folder: Path, out: Path, workers: int) -> None:
        self.folder, self.out = folder, out
        self.results: dict[str, dict[str, Any]] = {}
        self.floors: dict[str, float] = {}
        if out.exists():
            saved = json.loads(out.read_text(encoding="utf-8"))
            self.results, self.floors = saved["runs"], saved.get("floors", {})
        self.pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)

    def measure_floors(self, cells: list[Cell]) -> None:
        """Score what has not been trained, on each kind of data: the evaluation before the first step of a run."""
        for kind in sorted({kind for kind, *_ in cells} - self.floors.keys()):
            task = job(kind, 50, "lora", {"steps": 1, "batch_examples": 1}, self.folder)
            if task is not None:
                found = self.pool.submit(work, task).result()
                if "untrained" not in found:
                    raise SystemExit(f"error: {kind}: {found['error']}")
                self.floors[kind] = max(found["untrained"], guess(kind))
                say(f"{kind}: {self.floors[kind]:.4f} without training")
                self._save()

    def run(self, cells: list[Cell], seconds: float) -> None:
        """Run the defaults of all cells, then the sweep around what they chose, until the time is over."""
        ends = time.monotonic() + seconds
        self._work([job(*cell, None, self.folder) for cell in cells], ends)
        grid = [point for point in itertools.product(RATES, LENGTHS) if point != (1.0, 1.0)]
        grid.sort(key=lambda point: sum(abs(math.log(factor)) for factor in point))
        for rate, length in grid:
            settings = [self._setting(cell, rate, length) for cell in cells]
            self._work([job(*cell, s, self.folder) for cell, s in zip(cells, settings, strict=True) if s], ends)

    def confirm(self, cells: list[Cell], seconds: float) -> None:
        """Run the default and the best setting of every cell with other seeds, until the time is over."""
        ends = time.monotonic() + seconds
        by_cell = group(self.results)
        for seed in CONFIRMED:
            jobs = []
            for cell in cells:
                runs = by_cell.get("/".join(map(str, cell)), {})
                best = winner(runs)
                if best not in (None, "default"):
                    jobs += [job(*cell, s, self.folder, seed) for s in (None, json.loads(best))]
            self._work(jobs, ends)

    def _setting(self, cell: Cell, rate: float, length: float) -> dict[str, Any] | None:
        result = self.results.get("/".join(map(str, cell)) + "/default")
        if result is None or "used" not in result:
            return None
        used, steps = result["used"], max(1, round(result["steps"] * length))
        return {
            "learning_rate": float(f"{used['learning_rate'] * rate:.2g}"), "steps": steps,
            "batch_examples": used["batch_examples"], "eval_every": used["eval_every"], "warmup": 0.1,
        }  # fmt: skip

    def _work(self, jobs: list[dict[str, Any] | None], ends: float) -> None:
        todo = [job for job in jobs if job is not None and job["key"] not in self.results]
        if not todo or time.monotonic() > ends:
            return
        for future in as_completed([self.pool.submit(work, job) for job in todo]):
            result = future.result()
            self.results[result["key"]] = result
            say(f"{result['key']}: {result['score']:.4f} in {result.get('seconds', 0):.0f} s {result.get('error', '')}")
            self._save()

    def _save(self) -> None:
        text = json.dumps({"machine": machine(), "floors": self.floors, "runs": self.results}, indent=1)
        self.out.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", choices=BASES, default="demo", help="(default demo)")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--strategies", nargs="*", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--minutes", type=float, default=360.0, help="no new runs after so many minutes (default 360)")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time, of one thread each (default 2)")
    parser.add_argument("--out", type=Path, default=JSON, help="JSON file of the results")
    chosen = parser.parse_args()
    kinds = chosen.kinds if chosen.base != "encoder" else KINDS[:1]
    prefix = "" if chosen.base == "demo" else f"{chosen.base} "
    cells = list(itertools.product([prefix + kind for kind in kinds], chosen.rows, chosen.strategies))
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(Path(folder), chosen.out, chosen.workers)
        started = time.monotonic()
        sweep.measure_floors(cells)
        sweep.run(cells, chosen.minutes * 60 * SWEPT)
        sweep.confirm(cells, chosen.minutes * 60 - (time.monotonic() - started))
        sweep.pool.shutdown()
    lines, ratios, gains = table(sweep.results, sweep.floors)
    say("\n".join(lines))
    if not ratios:
        return 1
    say(verdict(ratios, gains))
    return 0 if holds(ratios, gains) else 1


if __name__ == "__main__":
    sys.exit(main())

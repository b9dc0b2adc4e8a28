"""`python -m benchmarks.transfer`: does masked language modelling on texts without labels help a classification?

For each seed, an adapter of `masked-lm` is trained on all descriptions of the demo's sections, without their labels;
then `sequence-classification` continues it on a few labelled rows, beside a new adapter on the same rows. Results are
written as runs finish, to docs/benchmarks/transfer.json; `python -m benchmarks.evidence --render` shows them in
docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.evidence import draw
from benchmarks.train import machine, say
from benchmarks.transfer_page import ARMS, best_rate, section

JSON = Path(__file__).parent.parent / "docs" / "benchmarks" / "transfer.json"
SETTINGS: dict[str, Any] = {
    "rows": 128, "steps": 96, "batch": 16, "epochs": 2, "rank": 16, "rates": [6e-4, 1.8e-3, 5.4e-3], "heldout": 400,
    "unlabelled_batch": 32, "precision": "fp32", "quantization": "none",
}  # fmt: skip
QUICK = {"rows": 32, "steps": 6, "epochs": 1, "rates": [1.8e-3], "heldout": 40, "texts": 64, "eval": 40}
TUNING_SEED = 1000
"""Seed of the trials, which continue the adapter of seed 0; final runs use others."""


def save_base(encoder: Path, folder: Path) -> None:
    """Save an encoder with a new head for masked tokens, and with the pooler that it has."""
    import torch
    from transformers import AutoTokenizer, BertForPreTraining

    from budwood.model.quiet import silence_libraries

    silence_libraries()
    torch.manual_seed(0)
    BertForPreTraining.from_pretrained(encoder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)


class Benchmark:
    """The results so far, and the folder of data and runs.

    Args:
        base: a base with a head for masked tokens.
        save: called after each run with all results.
    """

    def __init__(
        self, result: dict[str, Any], folder: Path, base: Path, save: Callable[[dict[str, Any]], None]
    ) -> None:
        self.result, self.folder, self.base, self.save = result, folder, base, save
        settings = self.settings = result["settings"]
        train, held = models.sections("train"), models.sections("eval")
        heldout = draw(train, settings["heldout"], "heldout")
        taken = {id(row) for row in heldout}
        self.pool = [row for row in train if id(row) not in taken]
        texts = random.Random("texts").sample(train, settings.setdefault("texts", len(train)))
        scored = random.Random("eval").sample(held, settings.setdefault("eval", len(held)))
        self._write("unlabelled", [{"text": row["text"]} for row in texts])
        self._write("unlabelled-eval", [{"text": row["text"]} for row in scored])
        self._write("heldout", heldout)
        self._write("eval", scored)

    def run(self, seeds: int, seconds: float) -> bool:
        """Run what is missing, and return whether everything is there."""
        ends = time.monotonic() + seconds
        arms = [(arm, TUNING_SEED, rate) for rate in self.settings["rates"] for arm in ARMS]
        jobs = [(f"trial/{arm}/{rate:g}", arm, seed, rate) for arm, seed, rate in arms]
        jobs += [(f"final/{arm}/{seed}", arm, seed, None) for seed in range(seeds) for arm in ARMS]
        for key, arm, seed, rate in jobs:
            if key in self.result["runs"]:
                continue
            if time.monotonic() > ends:
                return False
            parent = self._pretrained(0 if seed == TUNING_SEED else seed) if arm == "with" else None
            if time.monotonic() > ends:
                return False
            rate = best_rate(self.result, arm) if rate is None else rate
            self._done(key, self._classify(arm, seed, rate, parent, "heldout" if key.startswith("trial") else "eval"))
        return True

    def _pretrained(self, seed: int) -> Path:
        """Return the adapter of masked-lm of a seed."""
        output = self.folder / f"pretraining-{seed}"
        if f"pretraining/{seed}" not in self.result["runs"] or not (output / "adapter").is_dir():
            strategies = [{"lora": {"rank": self.settings["rank"], "alpha": 32, "modules_to_save": ["transform"]}}]
            train = {"epochs": self.settings["epochs"], "batch_examples": self.settings["unlabelled_batch"]}
            train["eval_every"] = 10**6  # before the first step and after the last
            data = {"train": self._file("unlabelled"), "eval": self._file("unlabelled-eval")}
            self._done(f"pretraining/{seed}", self._tune("masked-lm", data, strategies, train, seed, output))
        return output / "adapter"

    def _classify(self, arm: str, seed: int, rate: float, parent: Path | None, scored: str) -> dict[str, float]:
        from budwood.training.evaluate import evaluate_adapter

        started, output = time.process_time(), self.folder / f"{arm}-{seed}"
        self._write(f"train-{seed}", draw(self.pool, self.settings["rows"], f"train {seed}"))
        strategies = ["lora" if parent else {"lora": {"rank": self.settings["rank"], "alpha": 32}}]
        train = {"steps": self.settings["steps"], "batch_examples": self.settings["batch"], "learning_rate": rate}
        data = {"train": self._file(f"train-{seed}"), "eval": "none"}
        self._tune("sequence-classification", data, strategies, train, seed, output, parent)
        precision = self.settings["precision"]
        found = evaluate_adapter(output / "adapter", self._file(scored), precision=precision, quiet=True).adapter
        scores = {name: found[f"eval_{name}"] for name in ("accuracy", "macro_f1")}
        return {**scores, "seconds": round(time.process_time() - started, 1)}

    def _tune(
        self, task: str, data: dict[str, str], strategies: list[Any], train: dict[str, Any], seed: int, output: Path,
        parent: Path | None = None,
    ) -> dict[str, float]:  # fmt: skip
        import budwood
        from budwood.recipe.schema import Recipe

        started, settings = time.process_time(), self.settings
        recipe = {
            "base": {"model": str(self.base), "quantization": settings["quantization"], "task": task},
            "data": data, "strategies": strategies, "output": str(output),
            "train": {"precision": settings["precision"], "seed": seed, **train},
            **({"adapter": str(parent)} if parent else {}),
        }  # fmt: skip
        run = budwood.tune(Recipe.from_dict(recipe), overwrite=True, quiet=True)
        losses = {"after": run.metrics["eval_loss"]} if "eval_loss" in run.metrics else {}
        if losses:
            first = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            losses["before"] = next(row["eval_loss"] for row in map(json.loads, first) if "eval_loss" in row)
        return {**losses, "seconds": round(time.process_time() - started, 1)}

    def _done(self, key: str, values: dict[str, float]) -> None:
        self.result["runs"][key] = values
        say(f"{key}: {', '.join(f'{name} {value:.4g}' for name, value in values.items())}")
        self.save(self.result)

    def _file(self, name: str) -> str:
        return str(self.folder / f"{name}.jsonl")

    def _write(self, name: str, rows: list[dict[str, str]]) -> None:
        Path(self._file(name)).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=5, help="final runs of each arm (default 5)")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no runs after so many minutes (default 60)")
    parser.add_argument("--folder", type=Path, help="keep data and runs here, to go on later (default: temporary)")
    parser.add_argument("--quick", action="store_true", help="few rows, short runs: a smoke test, not evidence")
    parser.add_argument(
        "--out", type=Path, default=JSON, help="JSON file of the results; what is in it is not repeated"
    )
    chosen = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    settings = {**SETTINGS, **(QUICK if chosen.quick else {})}
    result: dict[str, Any] = {"settings": settings, "machine": machine(), "runs": {}}
    if chosen.out.exists():
        result = json.loads(chosen.out.read_text(encoding="utf-8"))
        if any(result["settings"][name] != value for name, value in settings.items()):
            raise SystemExit(f"error: {chosen.out} was made with other settings: name another file with --out.")

    def save(result: dict[str, Any]) -> None:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        base = folder / "base"
        if not base.is_dir():
            save_base(models.minilm(), base)
        complete = Benchmark(result, folder, base, save).run(chosen.seeds, chosen.minutes * 60)
    say(section(result) if complete else f"{chosen.out} has the finished runs: run again to go on")


if __name__ == "__main__":
    main()

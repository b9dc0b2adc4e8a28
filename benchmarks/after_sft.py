"""`python -m benchmarks.after_sft`: what do preferences and rewards add to an adapter that a short SFT has trained?

The rows are Debian's package descriptions with the package's section as the answer, on the demo's base or on
SmolLM2-135M-Instruct. Each seed trains LoRA on some rows with their answers: the start. Three arms continue that
adapter on the same further rows, with as many optimizer steps of as many rows: `sft` on the answers, as the control;
`dpo` on pairs of the answer and a wrong one; and `grpo` on answers that the model samples, with `exact-match` as
the reward.

Each arm's learning rate and options are tried first, one run each, with rows that a separate seed draws, and scored on
rows of train that no other run uses; the setting with the most right answers is taken. The seeds are then scored on
rows of eval, which nothing else uses: the share of right answers (greedy), how often the answer is likelier than
another section, and the mean difference of the two log-probabilities.

Results are written as runs finish, and a run that is already there is not repeated; several processes may work on one
file, each on its own seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks import models
from benchmarks.after_sft_page import key_of, page, show
from benchmarks.real_tasks import PROMPT, write_rows
from benchmarks.train import machine, say
from budwood import Run, Strategy, hookimpl

JSON = models.ROOT / "docs" / "benchmarks" / "after-sft.json"
DEV, DEV_SEED = 300, 1000
"""Rows of train that are only used to choose settings, and the seed of those runs."""
TOKENS, SAMPLES = 8, 4
"""Maximum tokens of an answer, and the answers to a prompt among which a wrong one is looked for."""
CRITERION = "eval_right"
COLUMNS = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected"), "grpo": ("prompt", "answer")}
"""Columns of the rows that an arm reads."""
WRONG = "wrong.json"
"""File of wrong answers in the folder of a start."""
PAIRS, ANSWERS = ("prompt", "chosen", "rejected", "answer"), ("prompt", "completion", "answer")
"""Columns of the held-out rows; `grpo` takes no pairs."""
Row = dict[str, Any]
Metrics = dict[str, float]


@dataclass(frozen=True)
class Base:
    """A base, the size of the runs on it, and the settings to try.

    Attributes:
        folder: returns its folder.
        precision: of the runs.
        shown: rows of the start, each seen once.
        rate: learning rate of the start.
        steps: optimizer steps of every arm.
        held_out: rows of eval that are scored.
        trials: by arm, learning rates with the options of its strategy.
        batch: rows of an optimizer step.
    """

    folder: Callable[[], Path]
    precision: str
    shown: int
    rate: float
    steps: int
    held_out: int
    trials: dict[str, list[dict[str, Any]]]
    batch: int = 16


def rewarded(rate: float, **options: Any) -> dict[str, Any]:
    """Return a setting of `grpo`."""
    return {"rate": rate, "samples": 8, "temperature": 1.0, "zero_variance": "drop", **options}


def paired(rate: float, rejected: str = "sampled") -> dict[str, Any]:
    """Return a setting of `dpo`; the rejected answer is a wrong one that the start samples, or a random section."""
    return {"rate": rate, "beta": 0.1, "rejected": rejected}


BASES = {
    "demo": Base(
        lambda: models.ROOT / "examples" / "budwood_demo" / "base", "fp32", 400, 2e-3, 60, 600,
        {
            "sft": [{"rate": 7e-4}, {"rate": 2e-3}],
            "dpo": [
                paired(2e-4, "random"), paired(7e-4, "random"), paired(2e-3, "random"), paired(2e-4), paired(7e-4),
                paired(2e-3),
            ],
            "grpo": [
                rewarded(5e-4), rewarded(1.5e-3), rewarded(4e-3), rewarded(1.5e-3, temperature=1.5),
                rewarded(1.5e-3, samples=16),
            ],
        },
    ),
    "smollm2": Base(
        models.smollm2, "bf16", 256, 1.2e-3, 20, 300,
        {
            "sft": [{"rate": 4e-4}, {"rate": 1.2e-3}],
            "dpo": [paired(1.2e-4), paired(4e-4)],
            "grpo": [rewarded(4e-4), rewarded(1.2e-3)],
        },
    ),
}  # fmt: skip


class Score(Strategy):
    """Measures greedy answers to held-out prompts, and for pairs how the model orders the two answers."""

    api = 2
    trains_on = ("", "preference pairs", "prompts without answers")

    @hookimpl
    def evaluate(self, run: Run) -> Metrics:

        examples = run.eval_examples
        assert examples is not None
        pairs = "chosen" in examples.rows[examples[0].row]
        prompts = [examples[index] for index in range(0, len(examples), 1 + pairs)]
        answers = run.generate(prompts, max_new_tokens=TOKENS, temperature=0, stop=["\n"])
        expected = [examples.rows[prompt.row]["answer"] for prompt in prompts]
        right = [answer.text.strip() == text for (answer,), text in zip(answers, expected, strict=True)]
        return {"eval_right": statistics.fmean(right), **(self._order(run) if pairs else {})}

    def _order(self, run: Run) -> Metrics:
        from budwood import eval_results, label_log_probs

        def differences(batch: Any) -> list[float]:
            log_probs = label_log_probs(run, batch).double()
            sums = log_probs.new_zeros(len(batch.keys)).index_add(0, batch.example_of_label, log_probs)
            result: list[float] = (sums[0::2] - sums[1::2]).tolist()
            return result

        values = [value for part in eval_results(run, differences) for value in part]
        return {"eval_order": statistics.fmean(v > 0 for v in values), "eval_difference": statistics.fmean(values)}


def draw(base: Base, seed: int) -> tuple[list[Row], list[Row], list[Row]]:
    """Return the rows of the start, those of the arms, and those that are scored, with the columns of all arms."""
    train = random.Random("development").sample(models.sections("train"), len(models.sections("train")))
    held = train[:DEV] if seed == DEV_SEED else random.Random("held out").sample(models.sections("eval"), base.held_out)
    labels = [row["label"] for row in train]
    chance = random.Random(f"rows {seed}")
    drawn = chance.sample(train[DEV:], base.shown + base.steps * base.batch)
    rows = []
    for row in [*drawn, *held]:
        wrong = chance.choice([label for label in labels if label != row["label"]])
        answer = f" {row['label']}"
        rows.append(
            {
                "prompt": PROMPT.format(text=row["text"]), "completion": answer,
                "chosen": answer, "rejected": f" {wrong}", "answer": row["label"],
            }
        )  # fmt: skip
    return rows[: base.shown], rows[base.shown : len(drawn)], rows[len(drawn) :]


def wrong_answers(run: Run, rows: list[Row]) -> dict[str, str]:
    """Return, by prompt, a wrong answer that a run's model samples; prompts for which it samples none are left out."""
    answers = run.generate([row["prompt"] for row in rows], max_new_tokens=TOKENS, stop=["\n"], samples=SAMPLES)
    found = {}
    for row, samples in zip(rows, answers, strict=True):
        wrong = [text for sample in samples if (text := sample.text.strip()) not in ("", row["answer"])]
        found |= {row["prompt"]: f" {wrong[0]}"} if wrong else {}
    return found


class Runs:
    """The runs on one base.

    Args:
        folder: for data and runs.
        out: the JSON file, which is read first.
    """

    def __init__(self, name: str, folder: Path, out: Path) -> None:
        self.name, self.base, self.folder, self.out = name, BASES[name], folder, out
        self.lock = FileLock(f"{out}.lock")
        self.settings = {k: v for k, v in asdict(self.base).items() if k != "folder"}

    def run(self, arms: list[str], seeds: list[int]) -> None:
        """Try the settings of the arms, then run the seeds with the best ones."""
        for arm in arms:
            for setting in self.base.trials[arm]:
                if key_of(setting) not in self._saved().get("trials", {}).get(arm, {}):
                    self._one(arm, setting, DEV_SEED, ("trials", arm, key_of(setting)))
        for seed in seeds:
            for arm in arms:
                saved = self._saved()
                if arm not in saved.get("finals", {}).get(str(seed), {}):
                    tried = saved["trials"][arm]
                    best = max(self.base.trials[arm], key=lambda setting: tried[key_of(setting)][CRITERION])
                    self._one(arm, best, seed, ("finals", str(seed), arm))

    def _one(self, arm: str, setting: dict[str, Any], seed: int, place: tuple[str, str, str]) -> None:
        """Run an arm, from the start of its seed, which is trained first if necessary, and save the metrics."""
        shown, more, held = draw(self.base, seed)
        start = self.folder / f"start-{seed}"
        if not start.exists():
            done = self._tune("sft", shown, [], {"rate": self.base.rate}, seed, start)
            wrong = wrong_answers(done, more) if "dpo" in self.base.trials else {}
            (start / WRONG).write_text(json.dumps(wrong), encoding="utf-8")
        if setting.get("rejected") == "sampled":
            wrong = json.loads((start / WRONG).read_text(encoding="utf-8"))
            more = [{**row, "rejected": wrong.get(row["prompt"], row["rejected"])} for row in more]
        began = time.process_time()
        done = self._tune(arm, more, held, setting, seed, self.folder / "arm", start / "adapter")
        metrics = {name: value for name, value in done.metrics.items() if name.startswith("eval_")}
        metrics["processor_seconds"] = round(time.process_time() - began, 1)
        before = {name: value for name, value in done.before.items() if name.startswith("eval_")}
        say(f"{self.name}, {place[0]}, {place[1]}, {place[2]}: {show(metrics)} (start: {show(before)})")
        with self.lock:
            content = self._read()
            result = content.setdefault(self.name, {"settings": self.settings, "trials": {}, "finals": {}})
            result["machine"] = machine()
            result[place[0]].setdefault(place[1], {})[place[2]] = metrics
            if seed == DEV_SEED:
                result["start of the trials"] = result.get("start of the trials", {}) | before
            else:
                result["finals"][str(seed)]["start"] = result["finals"][str(seed)].get("start", {}) | before
            self.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _tune(
        self, arm: str, rows: list[Row], held: list[Row], setting: dict[str, Any], seed: int, output: Path,
        adapter: Path | None = None,
    ) -> Run:  # fmt: skip
        from budwood import tune
        from budwood.recipe.schema import Recipe
        from budwood.testing.bench import register

        train, held_out = self.folder / "train.jsonl", self.folder / "held-out.jsonl"
        write_rows(rows, COLUMNS[arm], train)
        write_rows(held, ANSWERS if arm == "grpo" else PAIRS, held_out)
        options = {name: value for name, value in setting.items() if name not in ("rate", "rejected")}
        if arm == "grpo":
            options = {"max_new_tokens": TOKENS, "stop": ["\n"], "rewards": ["exact-match"], **options}
        strategies = [{arm: options}] if arm != "sft" else []
        recipe = {
            "base": {"model": str(self.base.folder()), "quantization": "none"},
            "data": {"train": str(train), "eval": str(held_out) if held else "none", "max_length": 128},
            "strategies": [
                {"lora": {"rank": 8, "alpha": 16}}, *strategies, *([register(Score, "score")] if held else []),
            ],
            "train": {
                "steps": len(rows) // self.base.batch, "batch_examples": self.base.batch, "micro_tokens": 2048,
                "learning_rate": setting["rate"], "precision": self.base.precision, "seed": seed, "eval_generate": 0,
            },
            "output": str(output),
            **({"adapter": str(adapter)} if adapter else {}),
        }  # fmt: skip
        return tune(Recipe.from_dict(recipe), overwrite=True, quiet=True)

    def _read(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.out.read_text(encoding="utf-8")) if self.out.exists() else {}
        settings = content.get(self.name, {}).get("settings", self.settings)
        if settings != json.loads(json.dumps(self.settings)):
            raise SystemExit(f"error: {self.out}: the results of {self.name} have other settings; remove them.")
        return content

    def _saved(self) -> dict[str, Any]:
        with self.lock:
            saved: dict[str, Any] = self._read().get(self.name, {})
        return saved


def main() -> None:
    """Run what is missing, and print the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.after_sft", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--base", choices=BASES, default="demo", help="(default demo)")
    parser.add_argument("--arms", nargs="+", choices=COLUMNS, default=list(COLUMNS), help="(default: all)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="(default 0 to 4)")
    parser.add_argument("--out", type=Path, default=JSON, help="JSON file of the results")
    chosen = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="budwood-after-sft-") as folder:
        Runs(chosen.base, Path(folder), chosen.out).run(chosen.arms, chosen.seeds)
    say(page(json.loads(chosen.out.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()

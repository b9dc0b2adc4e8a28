"""Formats the results of `benchmarks.transfer` as a section of docs/evidence.md."""

from __future__ import annotations

import statistics
from textwrap import fill
from typing import Any

from benchmarks.evidence_page import Difference, spread

ARMS = {"without": "a new adapter", "with": "the adapter of masked-lm, continued"}
READING = (
    "This base was trained on pairs of sentences, and it had to learn its head for masked tokens from these short "
    "texts. The result says nothing about a base that keeps its own head, or a longer corpus: measure both arms on "
    "rows of your own before you keep such a step."
)
METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1"}


def best_rate(result: dict[str, Any], arm: str) -> float:
    """Return the learning rate of an arm's best trial, the lowest of equal ones."""
    scores = {
        float(key.rpartition("/")[2]): values["accuracy"]
        for key, values in result["runs"].items()
        if key.startswith(f"trial/{arm}/")
    }
    return min(scores, key=lambda rate: (-scores[rate], rate))


def finals(result: dict[str, Any], arm: str) -> dict[int, dict[str, float]]:
    """Return the final runs of an arm, by seed."""
    start = f"final/{arm}/"
    return {int(key.rpartition("/")[2]): v for key, v in result["runs"].items() if key.startswith(start)}


def section(result: dict[str, Any]) -> str:
    """Return the section of docs/evidence.md."""
    settings, machine = result["settings"], result["machine"]
    versions = ", ".join(f"{k} {machine[k]}" for k in ("python", "torch", "transformers", "peft") if k in machine)
    trained = [v for key, v in result["runs"].items() if key.startswith("pretraining/")]
    without, continued = finals(result, "without"), finals(result, "with")
    rows = [
        f"| {ARMS[arm]} | {best_rate(result, arm):g} | {len(runs)} | "
        + " | ".join(spread(runs, metric) for metric in METRICS)
        + " |"
        for arm, runs in (("without", without), ("with", continued))
    ]
    differences = " | ".join(str(Difference(continued, without, metric)) for metric in METRICS)
    seconds = sum(values["seconds"] for values in result["runs"].values())
    loss = " to ".join(f"{statistics.fmean(each[key] for each in trained):.2f}" for key in ("before", "after"))
    text = (
        "Does it help to train an encoder's adapter on texts without labels first? The base is MiniLM (22.7 million "
        "parameters, all-MiniLM-L6-v2) with a new head for masked tokens, since it has none. For each seed, "
        f"`masked-lm` trains a LoRA of rank {settings['rank']} and the head for {settings['epochs']} epochs on all "
        f"{settings['texts']:,} descriptions of `sections`' train, without their labels; the loss of masked tokens of "
        f"held-out descriptions falls from {loss}. Then `sequence-classification` continues that adapter (`adapter:`) "
        f"with a new head, on {settings['rows']} labelled rows that the seed draws, for {settings['steps']} steps; the "
        "other arm trains a new adapter on the same rows with as many steps. The learning rate of each arm is that of "
        f"{len(settings['rates'])} which scored best with another seed on {settings['heldout']} rows of train "
        f"whose labels no final run sees. The score is that of all {settings['eval']} rows of eval, 15 classes. "
        "Percent, mean ± standard deviation over seeds; the difference is paired by seed, with a verdict as above."
    )
    return f"""## (g) Masked language modelling before a classification

By `python -m benchmarks.transfer`; raw results in [benchmarks/transfer.json](benchmarks/transfer.json).
{machine["processor"]}, one thread; {versions}; {seconds / 60:.0f} minutes of processor time.

{fill(text, 120, break_on_hyphens=False)}

| adapter | rate | seeds | accuracy | macro F1 |
|---|---|---|---|---|
{chr(10).join(rows)}
| difference |  |  | {differences} |

{fill(READING, 120, break_on_hyphens=False)}
"""

"""Formats the results of `benchmarks.after_sft` as Markdown."""

from __future__ import annotations

import math
import statistics
from typing import Any

from benchmarks.evidence_page import spread

NAMES = {"sft": "more SFT", "dpo": "`dpo`", "grpo": "`grpo`"}
BASES = {"demo": "the demo's base (6 million parameters)", "smollm2": "SmolLM2-135M-Instruct"}
Finals = dict[str, dict[str, dict[str, float]]]
"""Metrics by seed and arm."""


def key_of(setting: dict[str, Any]) -> str:
    """Return a setting as text."""
    return ", ".join(f"{k} {v:g}" if isinstance(v, int | float) else f"{k} {v}" for k, v in setting.items())


def show(metrics: dict[str, float]) -> str:
    """Format metrics in a line."""
    return ", ".join(f"{name.removeprefix('eval_')} {value:.4g}" for name, value in metrics.items())


def difference(finals: Finals, arm: str, other: str, metric: str, scale: float = 1.0) -> str:
    """Format the mean difference of two arms, paired by seed, and its standard error."""
    pairs = [(done[arm], done[other]) for done in finals.values() if arm in done and other in done]
    values = [scale * (one[metric] - two[metric]) for one, two in pairs if metric in one and metric in two]
    if len(values) < 2:
        return "too few seeds" if values else ""
    return f"{statistics.fmean(values):+.1f} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def page(result: dict[str, Any]) -> str:
    """Return the results of all bases."""
    return "\n\n".join(_base(name, result[name]) for name in BASES if name in result)


def section(result: dict[str, Any]) -> str:
    """Return the section of docs/evidence.md."""
    return f"""## (e) Preferences and rewards after a short SFT

By `python -m benchmarks.after_sft --base demo` (`smollm2`); raw results in
[benchmarks/after-sft.json](benchmarks/after-sft.json). Debian's package descriptions, each with the package's section
as the answer. Each seed trains LoRA of rank 8 on some rows with their answers, each seen once: the start. Three arms
continue that adapter on the same further rows, with as many optimizer steps of as many rows: SFT on the answers, as
the control; `dpo` on pairs of the answer and a wrong one, with β = 0.1; and `grpo` on answers that the model samples,
with `exact-match` as the reward. The wrong answer of a pair is one that the start samples (of four; if all are right, a
random section), or always a random section. `grpo` learns less per row, since it sees no answer, only whether a sample
is one, and its samples cost several times the computation.

Settings were tried on rows of train that no other run uses, one run each, and the one with the most right answers was
taken; the tables list all. Right: the share of greedy answers that are exactly the section. Order: how often the answer
is likelier than a random other section; not measured for `grpo`, which takes no pairs. Mean ± standard deviation over
the seeds; differences are paired by seed, in percentage points, mean ± standard error.

{page(result)}
"""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _base(name: str, result: dict[str, Any]) -> str:
    settings, finals, machine = result["settings"], result["finals"], result["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine.items() if k not in ("processor", "cores"))
    arms = [arm for arm in NAMES if any(arm in done for done in finals.values())]
    rows = [
        "| | right | order | right − start | right − more SFT | order − start | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in ("start", *arms):
        runs = {int(seed): done[arm] for seed, done in finals.items() if arm in done}
        ordered = {seed: run for seed, run in runs.items() if "eval_order" in run}  # not measured for grpo
        cells = [spread(runs, "eval_right"), spread(ordered, "eval_order") if ordered else ""]
        cells += [
            "" if arm == "start" else difference(finals, arm, "start", "eval_right", 100),
            "" if arm in ("start", "sft") else difference(finals, arm, "sft", "eval_right", 100),
            "" if arm == "start" else difference(finals, arm, "start", "eval_order", 100),
            str(len(runs)),
        ]
        rows.append(f"| {NAMES.get(arm, arm)} | {' | '.join(cells)} |")
    start = result["start of the trials"]
    tried = [
        f"| {NAMES[arm]} | {key} | {100 * metrics['eval_right']:.1f} | {_percent(metrics.get('eval_order'))} |"
        for arm in NAMES
        for key, metrics in result["trials"].get(arm, {}).items()
    ]
    return "\n".join(
        [
            f"**{BASES[name]}**, {settings['precision']}: {settings['shown']} rows for the start at a rate of "
            f"{settings['rate']:g}; {settings['steps']} steps of {settings['batch']} rows in every arm; "
            f"{settings['held_out']} held-out rows. {machine['processor']}, one thread; {versions}.",
            "",
            *rows,
            "",
            f"Tried, from a start with {100 * start['eval_right']:.1f} right and the order right in "
            f"{100 * start['eval_order']:.1f}:",
            "",
            "| arm | setting | right | order |",
            "|---|---|---|---|",
            *tried,
        ]
    )

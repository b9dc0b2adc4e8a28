"""Formats the results of `benchmarks.defaults`: the default of each cell beside the best setting of its sweep."""

from __future__ import annotations

from typing import Any

BASES = ("demo", "smollm2", "encoder")
KINDS = ("classification", "short answers", "chat", "long text")
STRATEGIES = ("lora", "adalora", "fgm")
GOOD, LEAST, SHARE = 0.95, 0.8, 0.9
SETTINGS = 5
"""Fewest settings of a cell that is shown: the default, and both directions of rate and length."""
SEED = 0
CONFIRMED = (1, 2, 3)
"""Seeds of the comparison of the default with the setting that won with `SEED`."""


def split(kind: str) -> tuple[str, str]:
    """Return the base and the kind of data of a cell's first part."""
    base, _, data = kind.partition(" ")
    return (base, data) if base in BASES else ("demo", kind)


def group(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """Return the runs by cell, setting and seed."""
    cells: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for key, result in results.items():
        kind, count, strategy, setting, *seed = key.split("/")
        runs = cells.setdefault(f"{kind}/{count}/{strategy}", {})
        runs.setdefault(setting, {})[int(seed[0]) if seed else SEED] = result
    return cells


def winner(runs: dict[str, dict[int, dict[str, Any]]]) -> str | None:
    """Return the setting with the best score, of equal ones the default; None if the sweep has not begun."""
    scores = {setting: seeds[SEED]["score"] for setting, seeds in runs.items() if SEED in seeds}
    if "default" not in scores or len(scores) < 2:
        return None
    return max(scores, key=lambda setting: (scores[setting], setting == "default"))


def table(results: dict[str, dict[str, Any]], floors: dict[str, float]) -> tuple[list[str], list[float], list[float]]:
    """Return a Markdown table of each cell's default beside the best setting; and two lists.

    Args:
        floors: the score of what has learned nothing, by the kind of data, see `Sweep.measure_floors`.

    Returns:
        The lines; the default's scores divided by the best ones; and what the default gains over no training, divided
        by what the best setting gains.
    """
    lines = [
        "| data | rows | strategy | settings | best (rate, steps) | seeds | best | default | ratio | untrained "
        "| gain |",
        "| --- | ---: | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    ratios, gains = [], []
    for cell, runs in sorted(group(results).items(), key=lambda item: _order(item[0])):
        best = winner(runs)
        if best is None or len(runs) < SETTINGS:
            continue
        seeds = [seed for seed in CONFIRMED if seed in runs[best] and seed in runs["default"]]
        seeds = seeds or [SEED]
        means = [sum(runs[setting][seed]["score"] for seed in seeds) / len(seeds) for setting in (best, "default")]
        ratios.append(means[1] / means[0] if means[0] else 0.0)
        first = runs[best][SEED]
        shown = f"{first['used']['learning_rate']:.2g}, {first['steps']}" if best != "default" else "the default"
        scores = " | ".join(f"{mean:.3f}" for mean in means)
        floor, gained = floors.get(cell.split("/")[0]), "not measured | "
        if floor is not None:
            gains.append((means[1] - floor) / (means[0] - floor) if means[0] > floor else 0.0)
            gained = f"{floor:.3f} | {gains[-1]:.2f}"
        lines.append(
            f"| {cell.replace('/', ' | ')} | {len(runs)} | {shown} | {len(seeds)} | {scores} | {ratios[-1]:.3f} "
            f"| {gained} |"
        )
    return lines, ratios, gains


def _order(cell: str) -> tuple[Any, ...]:
    kind, count, strategy = cell.split("/")
    base, data = split(kind)
    return BASES.index(base), KINDS.index(data), int(count), STRATEGIES.index(strategy)


def share(ratios: list[float]) -> float:
    """Return the share of cells whose default reaches `GOOD` of the best."""
    return sum(ratio >= GOOD for ratio in ratios) / len(ratios)


def holds(ratios: list[float], gains: list[float]) -> bool:
    """Return whether the defaults hold what is promised."""
    learned = len(gains) == len(ratios) and min(gains) > 0
    return share(ratios) >= SHARE and min(ratios) >= LEAST and learned


def verdict(ratios: list[float], gains: list[float]) -> str:
    """Return what the defaults reach and what is due."""
    gained = "What they gain over no training was not measured."
    if gains:
        gained = (
            f"Of what the best gains over no training, the default reaches {GOOD} in {share(gains):.0%} of the cells;\n"
            f"the lowest share is {min(gains):.2f} (due: above 0)."
        )
    return (
        f"The default reaches {GOOD} of the best in {share(ratios):.0%} of {len(ratios)} cells (due: {SHARE:.0%});\n"
        f"the lowest ratio is {min(ratios):.3f} (due: {LEAST}).\n{gained}"
    )


def section(content: dict[str, Any]) -> str:
    """Return the section of docs/evidence.md."""
    lines, ratios, gains = table(content["runs"], content.get("floors", {}))
    rows = "\n".join(lines)
    return f"""## (f) The defaults against a sweep

By `python -m benchmarks.defaults`; raw results in [benchmarks/defaults.json](benchmarks/defaults.json). In each cell a
run names nothing of its training, and a sweep varies the default's learning rate and number of steps. All name the rows
that are scored as `data.eval`, train in 16 or 32 bit, and keep the adapter with the lowest loss on those rows. A run
that names nothing at all differs: it trains on a base in 4 bit; holds out 5 % of the rows; and with fewer than 100 rows
holds out none, and keeps its last adapter. The score is the accuracy, the
share of exact answers, or the likelihood of a token, exp(-loss) (chat, long text). The data is the demo's, and so is
the base, unless the first column names another. Not all sweeps are complete: the fourth column counts the settings
that ran, and cells with fewer than {SETTINGS} are left out. The winner of a sweep and the default ran again with other
seeds, and the ratio is that of their means over these; where the sixth column says 1, the default won, or only one seed
has run. A winner at the largest or smallest rate or length of its sweep may have better neighbours that were not tried.
Where the table says 5000 rows, the data has 4,371 besides those for evaluation.
The last columns are the score without training, or that of the most frequent class, and what the default gains over it
as a share of what the winner gains. The demo's base was made from texts like the long ones, so there is next to nothing
to gain there, and their ratios say little.

{verdict(ratios, gains)}

{rows}
"""

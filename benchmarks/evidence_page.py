"""Generates docs/evidence.md from the raw results of `benchmarks.evidence`: tables, paired differences, verdicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

METHODS = ("fgm", "pgd", "freelb", "smart", "vat", "neftune")
ATTACKED = ("plain", *METHODS)
"""Arms that are also measured under attacks, and tuned for the mean of the three accuracies."""
METRICS = ("clean", "pgd", "typos")
NAMES = {
    "lora-4": "LoRA, rank 4",
    "adalora": "AdaLoRA, rank 8 to 4",
    "plain": "plain",
    "taught": "with a teacher",
    **{method: method for method in METHODS},
}
SETS = {
    "sections": "`sections`: which of 15 sections a package belongs to, given its description",
    "order": "`order`: whether the words of a description are shuffled",
}


def score(values: dict[str, Any], by: str) -> float:
    """Return the clean accuracy (`by="clean"`), or its mean with those under the attacks (`by="robust"`)."""
    return statistics.fmean(values[m] for m in METRICS) if by == "robust" else float(values["clean"])


def best_trial(result: dict[str, Any], name: str, arm: str, by: str) -> int:
    """Return the number of the arm's best trial on a set, the first of equal ones."""
    scores = {}
    for key, values in result["trials"].items():
        trial_set, trial_arm, number, _ = key.split("/")
        if (trial_set, trial_arm) == (name, arm):
            scores[int(number)] = score(values, by)
    return min(scores, key=lambda number: (-scores[number], number))


def finals(result: dict[str, Any], name: str, arm: str, by: str) -> dict[int, dict[str, Any]]:
    """Return the final runs of an arm on a set, by seed."""
    start = f"{name}/{arm}/{best_trial(result, name, arm, by)}/"
    return {int(key.rpartition("/")[2]): v for key, v in result["finals"].items() if key.startswith(start)}


class Difference:
    """An arm against another, seed by seed, in percentage points, with the 95 % interval of Student's t."""

    def __init__(self, arm: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]], metric: str) -> None:
        from scipy.stats import t

        self.values = [100 * (arm[seed][metric] - other[seed][metric]) for seed in sorted(arm.keys() & other.keys())]
        count = len(self.values)
        self.mean = statistics.fmean(self.values) if self.values else math.nan
        self.deviation = statistics.stdev(self.values) if count > 1 else math.nan
        self.half = float(t.ppf(0.975, count - 1)) * self.deviation / math.sqrt(count) if count > 1 else math.nan

    @property
    def verdict(self) -> str:
        """The difference in a word; "not shown" if the interval contains zero."""
        if math.isnan(self.half):
            return "too few seeds"
        return "better" if self.mean > self.half else "worse" if self.mean < -self.half else "not shown"

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.deviation:.1f}, {self.verdict}"


def spread(runs: dict[int, dict[str, Any]], metric: str) -> str:
    """Format mean ± standard deviation in percent."""
    values = [100 * run[metric] for run in runs.values()]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}" if values else "not run"


def counts(runs: dict[int, dict[str, Any]], key: str) -> str:
    """Format the count that all runs share, or the range."""
    values = sorted({run[key] for run in runs.values()})
    return "not run" if not values else f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def describe(trial: dict[str, Any]) -> str:
    """Format the options of a trial that the grid varies."""
    shown = [f"rate {trial['learning_rate']:g}"]
    for strategy in trial["strategies"]:
        for options in strategy.values():
            shown += [f"{key} {options[key]:g}" for key in ("epsilon", "weight") if key in options]
            shown += [f"alpha {options['alpha']:g}"] if options.get("method") == "neftune" else []
    return ", ".join(shown)


def write_page(result: dict[str, Any]) -> str:
    """Return the complete page."""
    parts = [_head(result), _summary(result), _adalora(result), _adversarial(result), _distillation(result)]
    return "\n\n".join(parts) + "\n\n" + _tuning(result) + "\n"


def _seeds(result: dict[str, Any]) -> str:
    """Format the number of seeds per arm, and whether some are missing."""
    seeds = [
        len(finals(result, name, arm, by))
        for name in SETS
        for arm, by in [("lora-4", "clean"), ("adalora", "clean"), ("plain", "clean"), ("taught", "clean")]
        + [(arm, "robust") for arm in ATTACKED]
    ]
    if min(seeds) == max(seeds):
        return f"{max(seeds)} seeds for every arm."
    return (
        f"**Incomplete**: {max(seeds)} seeds for some arms, {min(seeds)} for others; paired differences are over "
        "the seeds that both arms have. `--continue` resumes from here."
    )


def _head(result: dict[str, Any]) -> str:
    s, machine = result["settings"], result["machine"]
    runs = [*result["trials"].values(), *result["finals"].values(), *result["teachers"].values()]
    seconds = sum(run["processor_seconds"] for run in runs)
    versions = ", ".join(f"{k} {v}" for k, v in machine.items() if k not in ("processor", "cores"))
    sets = "\n".join(f"- {text}." for text in SETS.values())
    trials = len(next(iter(s["trials"].values())))
    return f"""# Evidence

Generated by `python -m benchmarks.evidence`; raw results in [benchmarks/evidence.json](benchmarks/evidence.json).

Do AdaLoRA, adversarial training or a teacher help on a tiny base (6 million parameters) with few rows and short runs?
The results do not carry over to large models or long runs.

{machine["processor"]}, {machine["cores"]} cores; {versions}.
{len(runs)} runs, {seconds / 60:.0f} minutes of processor time. {_seeds(result)}

**Sets.** Both are classified by a new head on the demo's base, {s["quantization"]} quantization, {s["precision"]}:

{sets}

Both are derived from `examples/budwood_demo/data/sections`. For `order` the benchmark shuffles the words of each
description with probability 1/2. Descriptions of fewer than four words are omitted. No source package appears in both
train and eval.

**Runs.** Each seed draws {s["rows"]} rows of train, at least one per class, the same for all arms; {s["epochs"]}
epochs, {s["batch_examples"]} examples per step, defaults otherwise. The first warm-up step of
these runs still had a rate of zero, not its share of the peak. The seed also determines initialisation, order and
noise.

**Tuning.** {trials} trials per arm, one run each, trained on rows drawn with a separate seed and scored on
{s["heldout_rows"]} rows of train that no other run uses: by clean accuracy in (a) and (c), by the mean of clean
accuracy and the two accuracies under attack in (b), including plain training. The rows of eval ({s["eval_rows"]}, the
same for all) are used once per final run. Pilot runs on rows of eval determined two settings that are the same for
every arm: the size of the PGD attack (at four times the size little accuracy was left), and the second set (two
candidates were dropped because the base was near chance on them).

**Reading.** Accuracy in percent, mean ± standard deviation over seeds. Differences are paired by seed, in percentage
points, mean ± standard deviation; "better" or "worse" if the 95 % interval of Student's t over the seeds excludes zero,
otherwise "not shown". The interval covers variation over seeds, not over evaluation rows. Of 20 comparisons without a
true difference, one would exclude zero on average."""


def _compare(result: dict[str, Any], arm: str, other: str, by: str, metric: str) -> dict[str, Difference]:
    return {name: Difference(finals(result, name, arm, by), finals(result, name, other, by), metric) for name in SETS}


def _summary(result: dict[str, Any]) -> str:
    lines = ["## Summary", ""]
    lines.append("- AdaLoRA against LoRA: " + _format(_compare(result, "adalora", "lora-4", "clean", "clean")))
    labels = {"clean": "clean accuracy", "pgd": "accuracy under PGD", "typos": "accuracy under typos"}
    for metric, label in labels.items():
        for name in SETS:
            differences = {m: _compare(result, m, "plain", "robust", metric)[name] for m in METHODS}
            parts = []
            for verdict in ("better", "worse", "not shown", "too few seeds"):
                methods = [method for method, d in differences.items() if d.verdict == verdict]
                parts += [f"{verdict}: {', '.join(methods)}"] if methods else []
            lines.append(f"- Adversarial methods against plain training, {label} on `{name}`: {'; '.join(parts)}.")
    lines.append(
        "- Student with a teacher against without: " + _format(_compare(result, "taught", "plain", "clean", "clean"))
    )
    return "\n".join(lines)


def _format(differences: dict[str, Difference]) -> str:
    return "; ".join(f"`{name}` {difference}" for name, difference in differences.items()) + "."


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _adalora(result: dict[str, Any]) -> str:
    rows = []
    for name in SETS:
        plain = finals(result, name, "lora-4", "clean")
        for arm in ("lora-4", "adalora"):
            runs = finals(result, name, arm, "clean")
            row = [name, NAMES[arm], counts(runs, "parameters"), counts(runs, "file_parameters"), spread(runs, "clean")]
            rows.append([*row, "" if arm == "lora-4" else str(Difference(runs, plain, "clean"))])
    table = _table(["set", "arm", "final parameters", "as saved", "accuracy", "AdaLoRA − LoRA"], rows)
    return f"""## (a) AdaLoRA against LoRA, at an equal final number of parameters

Targets are the attention's four projections, which have equal sizes, so a rank costs the same in each. Both have
scale 2; AdaLoRA allocates every second step. Parameters are counted in the adapter's file, without the classification
head. AdaLoRA is counted as exported to LoRA, which computes the same function; as saved, it has one additional singular
value per remaining rank.

{table}"""


def _adversarial(result: dict[str, Any]) -> str:
    attacks = result["settings"]["attacks"]
    tables = []
    for name in SETS:
        plain = finals(result, name, "plain", "robust")
        rows = []
        for arm in ATTACKED:
            runs = finals(result, name, arm, "robust")
            row = [arm, *(spread(runs, metric) for metric in METRICS)]
            rows.append(row + ["" if arm == "plain" else str(Difference(runs, plain, m)) for m in METRICS])
        milder = finals(result, name, "plain", "clean")
        row = ["plain, chosen by clean accuracy", *(spread(milder, metric) for metric in METRICS)]
        rows.insert(1, row + [str(Difference(milder, plain, m)) for m in METRICS])
        head = ["method", "clean", "PGD", "typos", "clean − plain", "PGD − plain", "typos − plain"]
        tables.append(f"`{name}`\n\n" + _table(head, rows))
    shown = "\n\n".join(tables)
    return f"""## (b) Adversarial training against plain training

LoRA of rank 8 on all linears. Attacks: `budwood eval --attack {attacks["pgd"]} --attack {attacks["typos"]}`. pgd and
freelb use two steps; a step of a method costs up to three plain ones, and all runs have the same number of steps. If
the plain rate scores worse here than the one chosen by clean accuracy, that is tuning noise, and it favours the
methods.

{shown}"""


def _distillation(result: dict[str, Any]) -> str:
    s = result["settings"]
    rows = []
    for name in SETS:
        without = finals(result, name, "plain", "clean")
        for arm in ("plain", "taught"):
            runs = finals(result, name, arm, "clean")
            shown = "without" if arm == "plain" else "with"
            rows.append(
                [name, shown, spread(runs, "clean"), "" if arm == "plain" else str(Difference(runs, without, "clean"))]
            )
        teacher = result["teachers"].get(f"{name}/teacher")
        rows.append(
            [name, "the teacher itself", f"{100 * teacher['clean']:.1f} (one run)" if teacher else "not run", ""]
        )
    table = _table(["set", "student", "accuracy", "with − without"], rows)
    return f"""## (c) A student with and without a teacher

The student is LoRA of rank 8 on {s["rows"]} rows. The teacher is `base+DIR`: LoRA of rank {s["teacher_rank"]}, trained
on all rows of train except those held out for tuning, epochs: {s["teacher_epochs"]}, rate {s["teacher_rate"]:g}. It was
trained on more rows than the student, including all of the student's, and teaches only on those. Temperature 2, forward
KL.

{table}"""


def _tuning(result: dict[str, Any]) -> str:
    tried: dict[str, list[dict[str, Any]]] = result["settings"]["trials"]
    rows = []
    shown: list[tuple[str, str, Callable[[str], str]]] = []
    for arm in tried:
        for by in ("clean", "robust") if arm == "plain" else ("robust",) if arm in ATTACKED else ("clean",):
            shown.append((arm, by, lambda name, arm=arm, by=by: _chosen(result, name, arm, by)))  # type: ignore[misc]
    for arm, by, chosen in shown:
        label = "the mean of the three" if by == "robust" else "clean accuracy"
        rows.append([NAMES[arm], label, "; ".join(describe(t) for t in tried[arm]), *(chosen(name) for name in SETS)])
    head = ["arm", "chosen by", "trials", *(f"chosen on {name}" for name in SETS)]
    note = (
        "The score of the trial on the held-out rows is in brackets. Arms with additional options try two rates, the "
        "others four.\nIf the best trial is at the edge of its grid, a wider grid might do better."
    )
    return f"## Trials\n\n{note}\n\n{_table(head, rows)}"


def _chosen(result: dict[str, Any], name: str, arm: str, by: str) -> str:
    number = best_trial(result, name, arm, by)
    values = result["trials"][f"{name}/{arm}/{number}/{_tuning_seed(result)}"]
    return f"{describe(result['settings']['trials'][arm][number])} ({100 * score(values, by):.1f})"


def _tuning_seed(result: dict[str, Any]) -> str:
    return next(iter(result["trials"])).rpartition("/")[2]

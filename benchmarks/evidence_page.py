"""docs/evidence.md from the raw numbers of `benchmarks.evidence`: tables, paired differences, and verdicts by rule."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

METHODS = ("fgm", "pgd", "freelb", "smart", "vat", "neftune")
ATTACKED = ("plain", *METHODS)
"""Arms that are measured under attacks too, and tuned for the mean of the three accuracies."""
METRICS = ("clean", "pgd", "typos")
NAMES = {
    "lora-4": "LoRA, rank 4",
    "adalora": "AdaLoRA, rank 8 to 4",
    "plain": "plain",
    "taught": "with a teacher",
    **{method: method for method in METHODS},
}
SETS = {
    "sections": "`sections`: which of 15 sections is a package of, by its description",
    "order": "`order`: is a description as it was written, or are its words shuffled",
}


def score(values: dict[str, Any], by: str) -> float:
    """By "clean" the clean accuracy, by "robust" its mean with those under the attacks."""
    return statistics.fmean(values[m] for m in METRICS) if by == "robust" else float(values["clean"])


def best_trial(result: dict[str, Any], name: str, arm: str, by: str) -> int:
    """Number of the arm's best trial on a set; of equal ones the first."""
    scores = {}
    for key, values in result["trials"].items():
        part, its_arm, number, _ = key.split("/")
        if (part, its_arm) == (name, arm):
            scores[int(number)] = score(values, by)
    return min(scores, key=lambda number: (-scores[number], number))


def finals(result: dict[str, Any], name: str, arm: str, by: str) -> dict[int, dict[str, Any]]:
    """The final runs of an arm on a set, by seed."""
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
        """In a word; where the interval has zero in it, nothing is shown."""
        if math.isnan(self.half):
            return "too few seeds"
        return "better" if self.mean > self.half else "worse" if self.mean < -self.half else "not shown"

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.deviation:.1f}, {self.verdict}"


def spread(runs: dict[int, dict[str, Any]], metric: str) -> str:
    """Mean ± standard deviation in percent."""
    values = [100 * run[metric] for run in runs.values()]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}" if values else "not run"


def counts(runs: dict[int, dict[str, Any]], key: str) -> str:
    """The number that all runs share, or their range."""
    found = sorted({run[key] for run in runs.values()})
    return "not run" if not found else f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def describe(trial: dict[str, Any]) -> str:
    """Options of a trial that the grid varies."""
    shown = [f"rate {trial['learning_rate']:g}"]
    for strategy in trial["strategies"]:
        for options in strategy.values():
            shown += [f"{key} {options[key]:g}" for key in ("epsilon", "weight") if key in options]
            shown += [f"alpha {options['alpha']:g}"] if options.get("method") == "neftune" else []
    return ", ".join(shown)


def write_page(result: dict[str, Any]) -> str:
    """The whole page."""
    parts = [_head(result), _summary(result), _adalora(result), _adversarial(result), _distillation(result)]
    return "\n\n".join(parts) + "\n\n" + _tuning(result) + "\n"


def _seeds(result: dict[str, Any]) -> str:
    """How many seeds the arms have, told truthfully where some lack."""
    have = [
        len(finals(result, name, arm, by))
        for name in SETS
        for arm, by in [("lora-4", "clean"), ("adalora", "clean"), ("plain", "clean"), ("taught", "clean")]
        + [(arm, "robust") for arm in ATTACKED]
    ]
    if min(have) == max(have):
        return f"{max(have)} seeds for every arm."
    return (
        f"**Not finished**: {max(have)} seeds for some arms, {min(have)} for others; paired differences are over "
        "the seeds that both arms have. `--continue` goes on from here."
    )


def _head(result: dict[str, Any]) -> str:
    s, machine = result["settings"], result["machine"]
    runs = [*result["trials"].values(), *result["finals"].values(), *result["teachers"].values()]
    seconds = sum(run["processor_seconds"] for run in runs)
    versions = ", ".join(f"{k} {v}" for k, v in machine.items() if k not in ("processor", "cores"))
    sets = "\n".join(f"- {text}." for text in SETS.values())
    trials = len(next(iter(s["trials"].values())))
    return f"""# Evidence

Written by `python -m benchmarks.evidence`; raw numbers in [benchmarks/evidence.json](benchmarks/evidence.json).

Does AdaLoRA, adversarial training or a teacher help, on a tiny base (6 million parameters), few rows and short runs?
That is all that is measured here: nothing follows for large models or long runs.

{machine["processor"]}, {machine["cores"]} cores; {versions}.
{len(runs)} runs, {seconds / 60:.0f} minutes of processor time. {_seeds(result)}

**Sets.** Both are classified by a new head on the demo's base, {s["quantization"]} quantization, {s["precision"]}:

{sets}

Both come from `examples/budwood_demo/data/sections`. For `order` the benchmark draws a coin for each description and
puts its words in another order or not; descriptions of less than four words are left out. No source package stands in
both train and eval.

**Runs.** {s["rows"]} rows of train, drawn anew by each seed with at least one of each class, the same for all arms;
{s["epochs"]} epochs, {s["batch_examples"]} examples a step, defaults otherwise. The seed also decides initialisation,
order and noise.

**Tuning.** {trials} trials for every arm, one run each, trained on rows that a seed of their own draws and scored on
{s["heldout_rows"]} rows of train that nothing else sees: by clean accuracy in (a) and (c), by the mean of clean
accuracy and the two attacked ones in (b), for plain training too. The rows of eval ({s["eval_rows"]}, the same for
all) are used once a final run. Before that, pilots on rows of eval set two things that are the same for every arm: the
size of the PGD attack (at four times the size little accuracy was left), and the second set (two others were dropped,
on which the base was near chance).

**Reading.** Accuracy in percent, mean ± standard deviation over seeds. Differences are taken seed by seed, in
percentage points, mean ± standard deviation; "better" or "worse" where the 95 % interval of Student's t over the seeds
leaves out zero, else "not shown". The interval is of seeds, not of other rows for
evaluation. Of 20 comparisons without any real difference one would leave out zero."""


def _compare(result: dict[str, Any], arm: str, other: str, by: str, metric: str) -> dict[str, Difference]:
    return {name: Difference(finals(result, name, arm, by), finals(result, name, other, by), metric) for name in SETS}


def _summary(result: dict[str, Any]) -> str:
    lines = ["## Summary", ""]
    lines.append("- AdaLoRA against LoRA: " + _told(_compare(result, "adalora", "lora-4", "clean", "clean")))
    for metric, said in (("clean", "clean accuracy"), ("pgd", "accuracy under PGD"), ("typos", "accuracy under typos")):
        for name in SETS:
            found = {m: _compare(result, m, "plain", "robust", metric)[name] for m in METHODS}
            words = []
            for verdict in ("better", "worse", "not shown", "too few seeds"):
                methods = [method for method, d in found.items() if d.verdict == verdict]
                words += [f"{verdict}: {', '.join(methods)}"] if methods else []
            lines.append(f"- Adversarial methods against plain training, {said} on `{name}`: {'; '.join(words)}.")
    lines.append(
        "- Student with a teacher against without: " + _told(_compare(result, "taught", "plain", "clean", "clean"))
    )
    return "\n".join(lines)


def _told(found: dict[str, Difference]) -> str:
    return "; ".join(f"`{name}` {difference}" for name, difference in found.items()) + "."


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
    table = _table(["set", "arm", "final parameters", "in its own form", "accuracy", "AdaLoRA − LoRA"], rows)
    return f"""## (a) AdaLoRA against LoRA, at an equal final number of parameters

On the attention's four projections, whose sizes are all the same, so that the budget costs the same wherever it goes.
Both have scale 2; AdaLoRA allocates every second step. Parameters are counted in the adapter's file, without the
classification head: AdaLoRA's as exported to LoRA, which is the same function; in its own form it has one singular
value more for each rank that is left.

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

LoRA of rank 8 on all linears. Attacks as `budwood eval --attack {attacks["pgd"]} --attack {attacks["typos"]}`. pgd and
freelb with two steps; a method's step costs up to three plain ones, and all have the same number of steps. A plain
rate that does worse here than the one chosen by clean accuracy is the tuning's noise, and flatters the methods.

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
on all rows of train but those held out for tuning, epochs: {s["teacher_epochs"]}, rate {s["teacher_rate"]:g}. It has
seen more rows than the student, and teaches on the student's rows alone, which are among its own. Temperature 2,
forward KL.

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
    told = (
        "In brackets the score of the trial on the held-out rows. Arms with options of their own try two rates, the "
        "others four.\nWhere the best trial stands at the edge of its grid, a wider one might do better."
    )
    return f"## What was tried, and chosen\n\n{told}\n\n{_table(head, rows)}"


def _chosen(result: dict[str, Any], name: str, arm: str, by: str) -> str:
    number = best_trial(result, name, arm, by)
    values = result["trials"][f"{name}/{arm}/{number}/{_tuning_seed(result)}"]
    return f"{describe(result['settings']['trials'][arm][number])} ({100 * score(values, by):.1f})"


def _tuning_seed(result: dict[str, Any]) -> str:
    return next(iter(result["trials"])).rpartition("/")[2]

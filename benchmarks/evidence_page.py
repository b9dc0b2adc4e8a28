"""Generates docs/evidence.md from the raw results of `benchmarks.evidence`: tables, paired differences, verdicts."""

from __future__ import annotations

import math
import statistics
from typing import Any

METHODS = ("fgm", "pgd", "freelb", "smart", "vat", "neftune")
ATTACKED = ("plain", *METHODS)
"""Arms that are also measured under attacks, and tuned for the mean of the three accuracies."""
METRICS = ("clean", "pgd", "typos")
NAMES = {
    "lora": "LoRA, rank 8",
    "adalora": "AdaLoRA, rank 12 to 8",
    "adalora-7": "AdaLoRA, rank 12 to 7",
    "plain": "plain",
    "taught": "with a teacher",
    **{method: method for method in METHODS},
}
NEAR = 0.01
"""Accuracy above the share of the most frequent class from which a run has learned something."""
RANKED = ("adalora", "adalora-7")
"""Arms that are compared with LoRA of rank 8."""


def score(values: dict[str, Any], by: str) -> float:
    """Return the clean accuracy (`by="clean"`), or its mean with those under the attacks (`by="robust"`)."""
    return statistics.fmean(values[m] for m in METRICS) if by == "robust" else float(values["clean"])


def best_trial(result: dict[str, Any], name: str, arm: str, by: str) -> int:
    """Return the number of the arm's best trial on a set, the first of equal ones; of a single one, 0."""
    scores = {0: 0.0} if len(result["settings"]["trials"][name][arm]) == 1 else {}
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
        for options in strategy.values() if isinstance(strategy, dict) else ():
            shown += [f"size {options['relative_epsilon']:g}"] if "relative_epsilon" in options else []
            shown += [f"weight {options['weight']:g}"] if "weight" in options else []
            shown += [f"alpha {options['alpha']:g}"] if options.get("method") == "neftune" else []
    return ", ".join(shown)


def write_page(result: dict[str, Any]) -> str:
    """Return the complete page."""
    parts = [_head(result), _summary(result), _adalora(result), _adversarial(result), _distillation(result)]
    return "\n\n".join(parts) + "\n\n" + _tuning(result) + "\n"


def _sets(result: dict[str, Any]) -> list[str]:
    """Return the sets of which every arm has run at least once."""
    arms = [(name, arm) for name in result["settings"]["sets"] for arm in result["settings"]["trials"][name]]
    missing = {name for name, arm in arms if not any(key.startswith(f"{name}/{arm}/") for key in result["finals"])}
    return [name for name in result["settings"]["sets"] if name not in missing]


def _tuned(result: dict[str, Any]) -> list[str]:
    """Return those of `_sets` that have more than AdaLoRA's arms."""
    return [name for name in _sets(result) if "plain" in result["settings"]["trials"][name]]


def _attacked(result: dict[str, Any], name: str) -> list[str]:
    """Return the arms of a set that are measured under attacks."""
    return [arm for arm in ATTACKED if arm in result["settings"]["trials"][name]]


def criteria(arm: str) -> tuple[str, ...]:
    """Return by what the best trial of an arm is chosen; the plain arm's by either."""
    return ("clean", "robust") if arm == "plain" else ("robust",) if arm in ATTACKED else ("clean",)


def _two_rates(result: dict[str, Any], name: str) -> bool:
    """Return whether the plain arm's two criteria chose different trials of a set."""
    return best_trial(result, name, "plain", "clean") != best_trial(result, name, "plain", "robust")


def _seeds(result: dict[str, Any]) -> str:
    """Format the number of seeds per arm, and whether some are missing."""
    seeds = [
        len(finals(result, name, arm, by))
        for name in _sets(result)
        for arm in result["settings"]["trials"][name]
        for by in criteria(arm)
    ]
    if not seeds:
        return "**Incomplete**: no set has run with every arm."
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
    sets = "\n".join(
        f"- `{name}`: {each['title']}; {each['model']}, {each['precision']}, {each['rows']} rows"
        for name, each in s["sets"].items()
    )
    missing = [f"`{name}`" for name in s["sets"] if name not in _sets(result)]
    trials = max(len(arm) for arms in s["trials"].values() for arm in arms.values())
    return f"""# Evidence

Generated by `python -m benchmarks.evidence`; raw results in [benchmarks/evidence.json](benchmarks/evidence.json).

Do AdaLoRA, adversarial training or a teacher help on small real models with few rows? The results need not carry over
to large models or long runs.

{machine["processor"]}, {machine["cores"]} cores; {versions}.
{len(runs)} runs, {seconds / 60:.0f} minutes of processor time. {_seeds(result)}{
        f" Not run: {', '.join(missing)}." if missing else ""
    }

**Sets.** Each is classified by a new head. The bases are packages on PyPI, as in (d); the sections are Debian's package
descriptions, in which no source package appears in both train and eval; tweets and products are the human ratings of
Hutto & Gilbert (ICWSM 2014), in classes as in (d), with a fifth of the tweets, and of the reviews, for eval.

{sets}

**Runs.** Each seed draws its rows from train, at least one per class, the same for all arms. In (a) nothing but the
strategy is named, so that rows and base determine the rest; in (b) and (c) the arm's learning rate, and {
        s["epochs"]
    } epochs.
The seed also determines initialisation, order and noise. The adapter of the last step is measured.

**Tuning.** Nothing is tuned in (a). In (b) and (c) {trials} trials per arm, one run each, trained on rows drawn with a
separate seed and scored on {s["heldout_rows"]} rows of train that no other run uses: by clean accuracy in (c), by the
mean of clean accuracy and the two accuracies under attack in (b), including plain training. The rows of eval
({s["eval_rows"]} or all, the same for all runs) are used once per final run.

**Reading.** Accuracy in percent, mean ± standard deviation over seeds. Differences are paired by seed, in percentage
points, mean ± standard deviation; "better" or "worse" if the 95 % interval of Student's t over the seeds excludes zero,
otherwise "not shown". The interval covers variation over seeds, not over evaluation rows. Of 20 comparisons without a
true difference, one would exclude zero on average."""


def _compare(result: dict[str, Any], names: list[str], arm: str, other: str, by: str = "clean") -> str:
    """Format the difference of two arms' clean accuracy on each of some sets; `by` chooses the other's trial."""
    found = {
        name: Difference(finals(result, name, arm, "clean"), finals(result, name, other, by), "clean") for name in names
    }
    return "; ".join(f"`{name}` {difference}" for name, difference in found.items()) + "."


def _summary(result: dict[str, Any]) -> str:
    lines = ["## Summary", ""]
    for arm in RANKED:
        lines.append(f"- {NAMES[arm]}, against LoRA: " + _compare(result, _sets(result), arm, "lora"))
    labels = {"clean": "clean accuracy", "pgd": "accuracy under PGD", "typos": "accuracy under typos"}
    for metric, label in labels.items():
        for name in _tuned(result):
            plain = finals(result, name, "plain", "robust")
            differences = {
                m: Difference(finals(result, name, m, "robust"), plain, metric)
                for m in _attacked(result, name)
                if m != "plain"
            }
            parts = []
            for verdict in ("better", "worse", "not shown", "too few seeds"):
                methods = [method for method, d in differences.items() if d.verdict == verdict]
                parts += [f"{verdict}: {', '.join(methods)}"] if methods else []
            lines.append(f"- Adversarial methods against plain training, {label} on `{name}`: {'; '.join(parts)}.")
    lines.append("- Student with a teacher against without: " + _compare(result, _tuned(result), "taught", "plain"))
    two = [name for name in _tuned(result) if _two_rates(result, name)]
    if two:
        compared = _compare(result, two, "taught", "plain", "robust")
        lines.append(f"- Student with a teacher against without at the rate chosen in (b): {compared}")
    return "\n".join(lines)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _adalora(result: dict[str, Any]) -> str:
    rows = []
    for name in _sets(result):
        plain = finals(result, name, "lora", "clean")
        for arm in ("lora", *RANKED):
            runs = finals(result, name, arm, "clean")
            row = [name, NAMES[arm], counts(runs, "parameters"), counts(runs, "file_parameters"), spread(runs, "clean")]
            rows.append([*row, "" if arm == "lora" else str(Difference(runs, plain, "clean"))])
    table = _table(["set", "arm", "final parameters", "as saved", "accuracy", "AdaLoRA − LoRA"], rows)
    failed = _failed(result)
    table += f"\n\n{failed}" if failed else ""
    return f"""## (a) AdaLoRA against LoRA, with the defaults

Recipes name the strategy and these ranks; all linears are adapted. Linears differ in shape, so a rank costs more in
some than in others, and which ones AdaLoRA keeps decides about the number of parameters: with a mean rank of 8 it has
more than LoRA of rank 8 here, with 7 about as many. They are counted in the adapter's file, without the classification
head, and as exported to LoRA, which computes the same function; as saved, AdaLoRA has one additional singular value per
rank.

{table}"""


def _failed(result: dict[str, Any]) -> str:
    """Return which runs answer no better than the most frequent class, and the differences without their seeds."""
    lines = []
    for name, share in result.get("frequent", {}).items():
        arms = {arm: finals(result, name, arm, "clean") for arm in ("lora", *RANKED)} if name in _sets(result) else {}
        bad = {arm: {seed for seed, run in runs.items() if run["clean"] <= share + NEAR} for arm, runs in arms.items()}
        if not any(bad.values()):
            continue
        shown = ", ".join(f"{len(seeds)} of {NAMES[arm]}" for arm, seeds in bad.items() if seeds)
        without = "; ".join(
            f"{NAMES[arm]} {Difference(_but(arms[arm], seeds), _but(arms['lora'], seeds), 'clean')}"
            for arm in RANKED
            for seeds in [bad["lora"] | bad[arm]]
        )
        lines.append(
            f"- `{name}`: the most frequent class is {100 * share:.1f} % of the rows; at most a point above it are "
            f"{shown}. Without the seeds of these runs, against LoRA: {without}."
        )
    head = "**Runs that learned little more than which class is the most frequent**, all with the defaults:\n\n"
    return head + "\n".join(lines) if lines else ""


def _but(runs: dict[int, dict[str, Any]], seeds: set[int]) -> dict[int, dict[str, Any]]:
    return {seed: run for seed, run in runs.items() if seed not in seeds}


def _adversarial(result: dict[str, Any]) -> str:
    attacks = result["settings"]["attacks"]
    tables = []
    for name in _tuned(result):
        plain = finals(result, name, "plain", "robust")
        rows = []
        for arm in _attacked(result, name):
            runs = finals(result, name, arm, "robust")
            row = [arm, *(spread(runs, metric) for metric in METRICS)]
            rows.append(row + ["" if arm == "plain" else str(Difference(runs, plain, m)) for m in METRICS])
        if _two_rates(result, name):
            milder = finals(result, name, "plain", "clean")
            row = ["plain, chosen by clean accuracy", *(spread(milder, metric) for metric in METRICS)]
            rows.insert(1, row + [str(Difference(milder, plain, m)) for m in METRICS])
        head = ["method", "clean", "PGD", "typos", "clean − plain", "PGD − plain", "typos − plain"]
        tables.append(f"`{name}`\n\n" + _table(head, rows))
    shown = "\n\n".join(tables)
    steps = "; ".join(
        f"`{name}` {counts(finals(result, name, 'plain', 'robust'), 'steps')} steps, in (a) "
        f"{counts(finals(result, name, 'lora', 'clean'), 'steps')}"
        for name in _tuned(result)
    )
    return f"""## (b) Adversarial training against plain training

LoRA of rank 8 on all linears. Attacks: `budwood eval --attack {attacks["pgd"]} --attack {attacks["typos"]}`. pgd and
freelb use two steps; a step of a method costs up to three plain ones, and all runs of a set have the same number of
steps. If the plain rate scores worse here than the one chosen by clean accuracy, that is tuning noise, and it favours
the methods. Runs are as long as these epochs, not as the defaults would make them, and plain training differs from (a)
by that: {steps}.

{shown}"""


def _distillation(result: dict[str, Any]) -> str:
    s = result["settings"]
    rows = []
    for name in _tuned(result):
        taught = finals(result, name, "taught", "clean")
        second = [("without, at the rate chosen in (b)", "robust")] if _two_rates(result, name) else []
        for shown, by in [("without", "clean"), *second]:
            without = finals(result, name, "plain", by)
            rows.append([name, shown, spread(without, "clean"), str(Difference(taught, without, "clean"))])
        rows.append([name, "with", spread(taught, "clean"), ""])
        teacher = result["teachers"].get(f"{name}/teacher")
        rows.append(
            [name, "the teacher itself", f"{100 * teacher['clean']:.1f} (one run)" if teacher else "not run", ""]
        )
    table = _table(["set", "student", "accuracy", "with a teacher − this"], rows)
    return f"""## (c) A student with and without a teacher

The student is LoRA of rank 8 on the rows of its seed. The teacher is `base+DIR`: LoRA of rank {s["teacher_rank"]},
trained on all rows of train except those held out for tuning, epochs: {s["teacher_epochs"]}, defaults otherwise. It was
trained on more rows than the student, including all of the student's, and teaches only on those. Temperature 2, forward
KL.

{table}"""


def _tuning(result: dict[str, Any]) -> str:
    rows = []
    for name in _sets(result):
        for arm, tried in result["settings"]["trials"][name].items():
            for by in criteria(arm) if len(tried) > 1 else ():
                label = "the mean of the three" if by == "robust" else "clean accuracy"
                shown = "; ".join(_trial(result, name, arm, number, by) for number in range(len(tried)))
                best = describe(tried[best_trial(result, name, arm, by)])
                rows.append([name, NAMES[arm], label, shown, best])
    head = ["set", "arm", "chosen by", "trials", "chosen"]
    note = (
        "The scores of the trials on the held-out rows are in brackets; of equal ones the first is chosen. Sizes are "
        "relative\nto the embeddings. Two trials are few: a wider grid might do better."
    )
    return f"## Trials\n\n{note}\n\n{_table(head, rows)}"


def _trial(result: dict[str, Any], name: str, arm: str, number: int, by: str) -> str:
    values = result["trials"][f"{name}/{arm}/{number}/{_tuning_seed(result)}"]
    return f"{describe(result['settings']['trials'][name][arm][number])} ({100 * score(values, by):.1f})"


def _tuning_seed(result: dict[str, Any]) -> str:
    return next(iter(result["trials"])).rpartition("/")[2]

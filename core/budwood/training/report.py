"""Prints and records a run: lines, a progress bar, metrics.jsonl, loss.png, and the trackers."""

from __future__ import annotations

import io
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from budwood.contract.calls import Cost
from budwood.contract.types import Run
from budwood.errors import ResourceError
from budwood.training.records import MetricsFile, Trackers
from budwood.training.runs import curve, records, running_mean
from budwood.training.terminal import Terminal
from budwood.untrusted.files import complete_file
from budwood.untrusted.redaction import redact, redact_values

PLAIN_LINES = 4
"""Number of progress lines per run without a terminal."""


class Report:
    """The output of one run. All processes but the first are `mute`: they print and write nothing.

    Lines and progress go to stderr unless `quiet`. A failing terminal, log, tracker or plot never stops the run: the
    failure is reported once, and losses are counted.
    """

    mute = False

    def __init__(self, quiet: bool = False, console: Console | None = None, before: float = 0.0) -> None:
        self.quiet = quiet
        self._terminal = Terminal()
        self.console = console or Console(file=self._terminal, highlight=False, soft_wrap=True)  # type: ignore[arg-type]
        self.started = time.perf_counter() - before
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._metrics: MetricsFile | None = None
        self._trackers: Trackers | None = None
        self._tokens = 0
        self._clock = 0.0
        self._total = self._first = 0
        self._shown: Sequence[str] = ()

    def say(self, text: str) -> None:
        """Print one line."""
        if not (self.quiet or self.mute):
            self.console.print(redact(text), markup=False)

    def open(
        self, directory: Path, accelerator: Any, trackers: Sequence[str], config: Mapping[str, Any], step: int = 0
    ) -> None:
        """Create metrics.jsonl in `directory`, or continue it after `step`, and start the trackers."""
        if self.mute:
            return
        path = directory / "metrics.jsonl"
        if step and path.exists():
            complete_file(path, b"".join(_kept_lines(step, path.read_bytes().splitlines(keepends=True))))
        self._metrics = MetricsFile(path, self.say, append=step > 0)
        if trackers:
            self._trackers = Trackers(accelerator, config, self.say)

    def start(self, total: int, done: int = 0, shown: Sequence[str] = ()) -> None:
        """Start the progress bar for `total` optimizer steps, `done` of them complete; tokens/s count from here.

        Args:
            shown: metrics of a step that are shown after the loss.
        """
        self._total, self._first, self._shown, self._clock = total, done, shown, time.perf_counter()
        if not (self.quiet or self.mute) and self.console.is_terminal:
            self._progress = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
                TimeRemainingColumn(), console=self.console, transient=True,
            )  # fmt: skip
            self._progress.start()
            self._bar = self._progress.add_task("training", total=total, completed=done, state="")

    def step(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Record one optimizer step of `tokens` real tokens."""
        self._tokens += tokens
        rate = self._tokens / max(time.perf_counter() - self._clock, 1e-9)
        self.record("step", step, {**values, "tokens": tokens, "tokens_per_second": rate})
        if self.quiet or self.mute:
            return
        state = "".join(
            f"{name.replace('_', ' ')} {values[name]:.4f} · " for name in ("loss", *self._shown) if name in values
        )
        state += f"{rate:,.0f} tokens/s · {peak_memory() / 2**30:.2f} GiB"
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=step, state=state)
        elif step == self._first + 1 or step * PLAIN_LINES // self._total > (step - 1) * PLAIN_LINES // self._total:
            left = (time.perf_counter() - self._clock) / (step - self._first) * (self._total - step)
            self.say(f"step {step}/{self._total} · {state} · {duration(left)} left")

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since `before` seconds before the report was created."""
        return time.perf_counter() - self.started

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second since `start`, evaluations included."""
        return self._tokens / max(time.perf_counter() - self._clock, 1e-9)

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one record to metrics.jsonl and, unless it holds answers, to the trackers."""
        if self._metrics is None:
            return
        finite = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        self._metrics.write({"kind": kind, "step": step, **redact_values(finite)})
        if self._trackers is not None and kind != "answers":
            self._trackers.log(finite, step)

    def stop(self) -> None:
        """End the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        """Close metrics.jsonl and the trackers, and report lost records."""
        self.stop()
        for kept in (self._metrics, self._trackers):
            if kept is not None:
                kept.close()
        self._metrics = self._trackers = None

    def plot(self, run: Run) -> None:
        """Draw loss.png from metrics.jsonl in the run's folder."""
        best = run.best_metric
        metric = best.name if best is not None and best.owner != str(run.task) else ""
        if not self.mute:
            try:
                draw_loss(run.directory / "metrics.jsonl", run.directory / "loss.png", metric)
            except (OSError, ValueError, ResourceError) as error:
                self.say(f"warning: loss.png was not drawn: {error}")

    @property
    def lost(self) -> dict[str, int]:
        """Counts of losses so far: terminal lines, records of metrics.jsonl and of each tracker."""
        lines = self._metrics.lost if self._metrics is not None else 0
        trackers = self._trackers.lost if self._trackers is not None else {}
        counts = {"terminal lines": self._terminal.lost, "metrics.jsonl records": lines}
        counts |= {f"{name} records": count for name, count in trackers.items()}
        return {name: count for name, count in counts.items() if count}


def _kept_lines(step: int, lines: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the lines of metrics.jsonl to keep when a run resumes after `step`.

    An evaluation at that step is repeated. An incomplete line of a killed process is dropped.
    """
    for line in lines:
        for record in records([line]):
            if "kind" in record and record["step"] <= step - (record["kind"] != "step") and line.endswith(b"\n"):
                yield line


def draw_loss(metrics: Path, picture: Path, metric: str = "") -> None:
    """Draw the training loss (each step and its running mean) and the evaluation loss over optimizer steps.

    Args:
        metric: that of an objective, drawn in place of the evaluation loss, which is then not of the training's kind.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = list(records(metrics.read_bytes().splitlines()))
    train = curve([record for record in found if record.get("kind") == "step"], "loss")
    evaluated = curve([record for record in found if record.get("kind") == "evaluation"], metric or "eval_loss")
    two = bool(metric and evaluated)
    figure = Figure(figsize=(7, 6 if two else 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1 + two, sharex=True, squeeze=False)[:, 0]
    if train:
        panels[0].plot(*zip(*train, strict=True), color="#9ecae1", linewidth=1, label="training, each step")
        smooth = zip(*running_mean(train), strict=True)
        panels[0].plot(*smooth, color="#2171b5", linewidth=2, label="training, running mean")
    if evaluated:
        panels[-1].plot(*zip(*evaluated, strict=True), color="#d94801", marker="o", label="evaluation")
    panels[-1].set_xlabel("optimizer step")
    panels[0].set_ylabel("loss" if metric else "loss (nats per label)")
    if all(loss >= 0 for _, loss in train):
        panels[0].set_ylim(bottom=0)
    if two:
        panels[1].set_ylabel(metric.removeprefix("eval_").replace("_", " "))
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    complete_file(picture, drawn.getvalue())


def profile_table(costs: Sequence[Cost], seconds: float) -> list[str]:
    """Return the lines of a table of the costs of hooks and core's parts, most expensive first, with the rest last.

    Args:
        costs: costs of a profiled run, sorted.
        seconds: duration of the complete run.
    """
    head = ("owner", "hook", "calls", "own time", "share", "total time", "peak growth")
    rows = [
        (
            cost.owner, cost.hook, f"{cost.calls:,}", f"{cost.own_seconds:.3f} s",
            f"{cost.own_seconds / max(seconds, 1e-9):.1%}", f"{cost.seconds:.3f} s",
            f"+{cost.peak_growth / 2**20:,.1f} MiB" if cost.peak_growth else "",
        )
        for cost in costs
    ]  # fmt: skip
    rest = max(seconds - sum(cost.own_seconds for cost in costs), 0.0)
    rows.append(("core", "everything else", "", f"{rest:.3f} s", f"{rest / max(seconds, 1e-9):.1%}", "", ""))
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def process_age() -> float:
    """Return the seconds since the process started; 0 if the system does not say (it does on Linux)."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def peak_memory() -> int:
    """Return the peak memory in bytes: the CUDA allocator's if it is in use, else the process's resident peak."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return resident_peak()


def resident_peak() -> int:
    """Return the process's resident peak in bytes; takes a microsecond."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def duration(seconds: float) -> str:
    """Return a human-readable duration: "42 s", "3 min 05 s", "2 h 10 min"."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"

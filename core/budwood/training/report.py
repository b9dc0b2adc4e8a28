"""What a run shows and writes: lines, a progress bar, metrics.jsonl, loss.png, and the trackers."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from budwood.adapters.files import complete_file
from budwood.redaction import redact, redact_values

PLAIN_LINES = 4
"""Progress lines of a whole run where there is no terminal."""


class Report:
    """Speaks and writes for one run; every process but the first is `mute` and does neither.

    Lines and progress go to stderr unless `quiet`. A tracker or a plot that fails is said once and never stops the run.
    """

    mute = False

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.quiet = quiet
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.started = time.perf_counter()
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._metrics: TextIO | None = None
        self._accelerator: Any = None
        self._tracking = False
        self._tokens = 0
        self._clock = 0.0
        self._total = self._first = 0

    def say(self, text: str) -> None:
        """Show one line."""
        if not (self.quiet or self.mute):
            self.console.print(redact(text), markup=False)

    def open(
        self, directory: Path, accelerator: Any, trackers: Sequence[str], config: Mapping[str, Any], step: int = 0
    ) -> None:
        """Begin metrics.jsonl in `directory`, or go on with it after `step`, and start the trackers."""
        if self.mute:
            return
        path = directory / "metrics.jsonl"
        if step and path.exists():
            complete_file(path, b"".join(_until(step, path.read_bytes().splitlines(keepends=True))))
        self._metrics = path.open("a" if step else "w", encoding="utf-8")
        self._accelerator = accelerator
        if trackers:
            self._safely("start", lambda: accelerator.init_trackers("budwood", config=_flat(config)))
            self._tracking = True

    def start(self, total: int, done: int = 0) -> None:
        """Begin the progress of `total` optimizer steps, `done` of them before; tokens/s are counted from here."""
        self._total, self._first, self._clock = total, done, time.perf_counter()
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
        state = f"loss {values['loss']:.4f} · {rate:,.0f} tokens/s · {peak_memory() / 2**30:.2f} GiB"
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=step, state=state)
        elif step == self._first + 1 or step * PLAIN_LINES // self._total > (step - 1) * PLAIN_LINES // self._total:
            left = (time.perf_counter() - self._clock) / (step - self._first) * (self._total - step)
            self.say(f"step {step}/{self._total} · {state} · {duration(left)} left")

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the report was made."""
        return time.perf_counter() - self.started

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second since `start`, evaluations included."""
        return self._tokens / max(time.perf_counter() - self._clock, 1e-9)

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one line of metrics.jsonl, and tell the trackers."""
        if self._metrics is None:
            return
        finite = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        try:
            self._metrics.write(json.dumps({"kind": kind, "step": step, **redact_values(finite)}) + "\n")
            self._metrics.flush()
        except OSError as error:
            self.say(f"warning: metrics.jsonl cannot be written ({error.strerror}); the run goes on")
            self._metrics = None
        if self._tracking:
            self._safely("log", lambda: self._accelerator.log(dict(finite), step=step))

    def stop(self) -> None:
        """End the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        """Close metrics.jsonl and the trackers."""
        self.stop()
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._tracking:
            self._safely("finish", self._accelerator.end_training)
            self._tracking = False

    def plot(self, directory: Path) -> None:
        """Draw loss.png from metrics.jsonl in `directory`."""
        if not self.mute:
            try:
                draw_loss(directory / "metrics.jsonl", directory / "loss.png")
            except (OSError, ValueError) as error:
                self.say(f"warning: loss.png was not drawn: {error}")

    def _safely(self, doing: str, call: Any) -> None:
        try:
            call()
        except Exception as error:
            self._tracking = False
            self.say(f"warning: tracking stopped ({doing}: {type(error).__name__}: {error}); the run goes on")


def _until(step: int, lines: Sequence[bytes]) -> Iterator[bytes]:
    """The lines of metrics.jsonl that stand as they are when a run goes on after `step`.

    An evaluation of that very step is made again. A line that a killed process left half written is dropped.
    """
    for line in lines:
        try:
            record = json.loads(line)
            kept = record["step"] <= step - (record["kind"] != "step")
        except (ValueError, KeyError, TypeError):
            continue
        if kept and line.endswith(b"\n"):
            yield line


def draw_loss(metrics: Path, picture: Path) -> None:
    """Draw the training loss (each step and its running mean) and the evaluation loss over optimizer steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    train = [(r["step"], r["loss"]) for r in records if r["kind"] == "step" and "loss" in r]
    evaluated = [(r["step"], r["eval_loss"]) for r in records if r["kind"] == "evaluation" and "eval_loss" in r]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="training, each step")
        mean, smooth = losses[0], []
        for loss in losses:
            mean = 0.9 * mean + 0.1 * loss
            smooth.append(mean)
        axes.plot(steps, smooth, color="#2171b5", linewidth=2, label="training, running mean")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), color="#d94801", marker="o", label="evaluation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per label)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(picture)


def peak_memory() -> int:
    """Peak memory in bytes: of the CUDA allocator where there is one in use, else the process's resident peak."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def duration(seconds: float) -> str:
    """Seconds as people say them: "42 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = (
                value if isinstance(value, int | float | str | bool) else json.dumps(value, default=str)
            )
    return flat

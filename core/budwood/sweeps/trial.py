"""Runs one trial, `budwood tune` in a process of its own, and follows its evaluations. Imports no torch."""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from budwood.errors import InputError, did_you_mean
from budwood.training.durability.lock import holder
from budwood.training.output import read_manifest
from budwood.training.runs import records

_LIBC = ctypes.CDLL(None)
POLL = 0.2
"""Seconds between two looks at a trial."""
PATIENCE = 120
"""Seconds in which a trial that is told to end saves and ends."""
DOES_NOT_FIT = "memory: the run needs"
"""Beginning of the message with which a plan refuses a run."""
WHOLE = 1000
"""The end of a run, in the thousandths of it at which evaluations are compared."""


@dataclass
class Outcome:
    """How a trial ended.

    Attributes:
        state: "complete", "pruned", "does not fit", "diverged" or "failed".
        value: the metric of the written adapter, if complete.
        code: exit code of the process; negative: the signal that ended it.
        error: its error, if it failed.
    """

    state: str
    value: float | None = None
    code: int = 0
    error: str = ""
    seconds: float = 0.0


@dataclass
class Watch:
    """The evaluations of a running trial.

    Attributes:
        report: called with the fraction of the run in thousandths, and the value; returns whether to prune.
        beat: called at every look, with the last record of a step and the number of steps.
    """

    metric: str
    report: Callable[[int, float], bool]
    beat: Callable[[dict[str, Any], int], None]
    seen: set[int] = field(default_factory=set)
    offset: int = 0

    def look(self, directory: Path, started: float) -> bool:
        """Read new records; return whether to prune.

        Raises:
            InputError: the run evaluates nothing, or not the metric; the message has those that it gives.
        """
        manifest = read_manifest(directory) or {}
        examples = manifest.get("examples") or {"eval": None}
        if self.metric.startswith("eval_") and "eval" not in examples:
            raise InputError(
                f"--metric {self.metric}: the runs evaluate nothing, since data.eval says none or the data is too "
                "small for a held-out part: name rows to evaluate on, -o data.eval=FILE."
            )
        total = int(manifest.get("steps") or 0)
        last: dict[str, Any] = {}
        for record in self._new(directory / "metrics.jsonl", started):
            if record.get("kind") == "step":
                last = record
            if record.get("kind") != "evaluation":
                continue
            if self.metric not in record:
                self._check(record, manifest)
                continue
            step = record["step"]
            share = round(WHOLE * step / total) if total else 0
            if step == 0 or share in self.seen:
                continue
            self.seen.add(share)
            if self.report(share, float(record[self.metric])) and share < WHOLE:
                return True
        self.beat(last, total)
        return False

    def _new(self, path: Path, started: float) -> Iterator[dict[str, Any]]:
        try:
            if path.stat().st_mtime < started - 1:  # of the run that is resumed, which is about to be cut
                return
            with path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self.offset:
                    self.offset = 0
                file.seek(self.offset)
                data = file.read()
        except OSError:
            return
        data = data[: data.rfind(b"\n") + 1]
        self.offset += len(data)
        yield from records(data.splitlines())

    def _check(self, record: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Refuse a metric that evaluations do not give; records leave out values that are not finite."""
        best = manifest.get("best_metric") or {}
        if record["step"] == 0 and best.get("name") != self.metric:
            given = [name for name in record if name.startswith("eval_")]
            near = did_you_mean(self.metric, given)
            raise InputError(f"--metric {self.metric}: no evaluation gives it.{near} They give {', '.join(given)}.")


def run_trial(
    recipe: Path, overrides: Sequence[str], directory: Path, log: Path, watch: Watch, allow_code: bool = False
) -> Outcome:
    """Run `budwood tune` with the overrides in `directory`, resuming a run that is there.

    The process ends with this one, however it ends; its output is in `log`.

    Raises:
        InputError: see `Watch.look`.
    """
    given = [part for override in [*overrides, f"output={json.dumps(str(directory))}"] for part in ("-o", override)]
    command = [sys.executable, "-P", "-m", "budwood", "tune", str(recipe), *given]
    command += ["--resume"] if directory.exists() else []
    command += ["--allow-code"] if allow_code else []
    started = time.time()
    while holder(directory) and time.time() - started < PATIENCE:  # the process of a worker that was killed still saves
        time.sleep(POLL)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True,
            preexec_fn=_end_with_parent,
        )  # fmt: skip
    pruned = False
    try:
        while process.poll() is None:
            if watch.look(directory, started):
                pruned = True
                _end(process)
            time.sleep(POLL)
        watch.look(directory, started)
    finally:
        _end(process)
    seconds = time.time() - started
    if pruned:
        return Outcome("pruned", seconds=seconds)
    if process.returncode == 0:
        return _result(directory, watch.metric, seconds)
    error = _last_error(log)
    if process.returncode < 0:
        error = f"killed by {signal.Signals(-process.returncode).name}"
        error += ": the machine may be out of memory" if process.returncode == -signal.SIGKILL else ""
    states = {5: "diverged", 3: "does not fit" if error.startswith(DOES_NOT_FIT) else "failed"}
    return Outcome(states.get(process.returncode, "failed"), None, process.returncode, error, seconds)


def _result(directory: Path, metric: str, seconds: float) -> Outcome:
    metrics = (read_manifest(directory) or {}).get("metrics") or {}
    value = metrics.get(metric)
    if not isinstance(value, int | float) or not math.isfinite(value):
        given = ", ".join(name for name in metrics if name.startswith("eval_"))
        code = InputError.exit_code if metric not in metrics else 0
        return Outcome("failed", None, code, f"{metric} is {value}; the run has {given or 'no evaluation'}", seconds)
    return Outcome("complete", float(value), seconds=seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Tell a process to save and end, and wait for it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """Ask Linux to send SIGTERM when the parent ends, even if it is killed."""
    _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _last_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = next((line for line in reversed(lines) if line.startswith("error: ")), "")
    return found.removeprefix("error: ") or (lines[-1] if lines else "no output")

"""Writes a run's records to metrics.jsonl and the trackers. Failures never stop a run; lost records are counted."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from budwood.errors import describe

Say = Callable[[str], None]


class MetricsFile:
    """metrics.jsonl, one JSON object per line. A failed write leaves no partial line."""

    def __init__(self, path: Path, say: Say, append: bool = False) -> None:
        self.path, self._say, self.lost = path, say, 0
        self._mode, self._end = "ab" if append else "wb", 0
        self._file: Any = None
        try:
            self._open()
        except OSError as error:
            self._warn(error)

    def _open(self) -> None:
        self._file = self.path.open(self._mode, buffering=0)
        self._end = self._file.seek(0, 2)

    def _warn(self, error: OSError) -> None:
        reason = error.strerror or error
        self._say(f"warning: {self.path} cannot be written ({reason}); the run continues and counts the lost records")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line, or count it as lost; only the first loss is reported."""
        line = json.dumps(record).encode() + b"\n"
        try:
            if self._file is None:
                self._open()
            while line:
                line = line[self._file.write(line) :]
            self._end = self._file.tell()
        except OSError as error:
            self.lost += 1
            if self.lost == 1 and self._file is not None:
                self._warn(error)
            self._truncate()

    def _truncate(self) -> None:
        """Remove a partly written line, so that the next record starts on a new line."""
        with contextlib.suppress(OSError, AttributeError):  # readers skip a line that is not JSON
            self._file.truncate(self._end)
            self._file.seek(self._end)

    def close(self) -> None:
        """Close the file and report lost records."""
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:
            self._say(f"warning: {self.path} may be missing its last lines ({error.strerror or error})")
        if self.lost:
            self._say(f"warning: {self.path} is missing {self.lost} records that could not be written")


class Trackers:
    """The trackers of a run, independent of each other. One that fails is retried after 1, 2, 4, … records."""

    def __init__(self, accelerator: Any, config: Mapping[str, Any], say: Say) -> None:
        self._say = say
        self.lost: dict[str, int] = {}
        self._wait: dict[str, int] = {}
        self._failures: dict[str, int] = {}
        self._trackers: dict[str, Any] = {}
        try:
            accelerator.init_trackers("budwood", config=flat(config))
        except Exception as error:
            say(f"warning: the trackers did not start ({describe(error)}); the run continues without them")
            return
        self._trackers = {tracker.name: tracker for tracker in accelerator.trackers}

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send a record to every tracker; only the first failure of each is reported."""
        for name, tracker in self._trackers.items():
            if self._wait.get(name, 0) > 0:
                self._wait[name] -= 1
                self.lost[name] = self.lost.get(name, 0) + 1
                continue
            try:
                tracker.log(dict(values), step=step)
                self._failures[name] = 0
            except Exception as error:
                if name not in self.lost:
                    self._say(
                        f"warning: tracker {name} failed ({describe(error)}); the run continues and counts the lost "
                        "records"
                    )
                self.lost[name] = self.lost.get(name, 0) + 1
                self._wait[name] = 2 ** self._failures.get(name, 0)
                self._failures[name] = self._failures.get(name, 0) + 1

    def close(self) -> None:
        """Finish the trackers and report lost records."""
        for name, tracker in self._trackers.items():
            try:
                tracker.finish()
            except Exception as error:
                self._say(f"warning: tracker {name} did not finish ({describe(error)})")
            if name in self.lost:
                self._say(f"warning: tracker {name} is missing {self.lost[name]} records")
        self._trackers = {}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to "section.field" keys; each value is a number, a string, or JSON text."""
    flattened: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flattened |= flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, int | float | str | bool)
            flattened[prefix + key] = value if plain else json.dumps(value, default=str)
    return flattened

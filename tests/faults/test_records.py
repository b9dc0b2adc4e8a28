"""The log, trackers, the terminal or the clock fail: the run continues, and losses are reported and counted."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from budwood.errors import ResourceError
from budwood.training import records, report
from budwood.training.loop import tune

from .disk import Disk
from .test_memory import distance, tensors

Make = Callable[..., Any]


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device that is always full, in place of metrics.jsonl."""
    (tmp_path / "full").symlink_to("/dev/full")
    original = records.MetricsFile
    monkeypatch.setattr(report, "MetricsFile", lambda path, say, append: original(tmp_path / "full", say, append))
    return tmp_path / "full"


def test_a_full_disk_for_the_log_does_not_stop_the_run(make_recipe: Make, full_disk: Path, capsys: Any) -> None:
    run = tune(make_recipe(evaluate=True))
    said = capsys.readouterr().err
    assert said.count("cannot be written (No space left on device); the run continues") == 1
    assert "is missing 6 records" in said  # four steps and two evaluations
    assert json.loads((run.directory / "manifest.json").read_text())["lost"] == {"metrics.jsonl records": 6}
    assert tensors(run.directory)


def test_a_partially_written_line_is_removed(tmp_path: Path) -> None:
    said: list[str] = []
    log = records.MetricsFile(tmp_path / "metrics.jsonl", said.append)
    log.write({"step": 1})
    whole, log._file = log._file, SimpleNamespace(
        write=lambda data: whole.write(data[:4]) if len(data) > 8 else _raise(errno.ENOSPC),
        truncate=lambda size: whole.truncate(size), seek=lambda at: whole.seek(at), tell=lambda: whole.tell(),
    )  # fmt: skip
    log.write({"step": 2})
    log._file = whole
    log.write({"step": 3})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 3}\n'
    assert "is missing 1 records" in said[-1]


def _raise(code: int) -> int:
    raise OSError(code, os.strerror(code))


class Tracker:
    """Fails in the calls with the given numbers."""

    def __init__(self, name: str, fails: set[int]) -> None:
        self.name, self.fails, self.calls, self.steps = name, fails, 0, []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls += 1
        if self.calls in self.fails:
            raise ConnectionError("no route to the tracker")
        self.steps.append(step)

    def finish(self) -> None:
        raise ConnectionError("gone for good")


def test_a_failing_tracker_is_retried_and_does_not_affect_others() -> None:
    said: list[str] = []
    bad, good = Tracker("bad", {2, 3}), Tracker("good", set())
    accelerator = SimpleNamespace(init_trackers=lambda *args, **kwargs: None, trackers=[bad, good])
    trackers = records.Trackers(accelerator, {"train": {"steps": 3}}, said.append)
    for step in range(1, 11):
        trackers.log({"loss": 1.0}, step)
    assert good.steps == list(range(1, 11))
    assert bad.steps == [1, 7, 8, 9, 10]  # lost: 2, one not sent, 4, two not sent
    assert trackers.lost == {"bad": 5}
    trackers.close()
    assert [line for line in said if "bad" in line] == [
        "warning: tracker bad failed (ConnectionError: no route to the tracker); the run continues "
        "and counts the lost records",
        "warning: tracker bad did not finish (ConnectionError: gone for good)",
        "warning: tracker bad is missing 5 records",
    ]


def test_a_closed_pipe_does_not_stop_the_run(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", stream)
    os.close(reading)
    run = tune(make_recipe())
    lost = json.loads((run.directory / "manifest.json").read_text())["lost"]
    assert lost["terminal lines"] >= 6
    monkeypatch.undo()
    with pytest.raises(BrokenPipeError):
        stream.close()


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_run_without_stderr_continues(make_recipe: Make, monkeypatch: pytest.MonkeyPatch, stream: Any) -> None:
    if stream:
        stream = open(os.devnull, "w")  # noqa: SIM115
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    assert tensors(tune(make_recipe()).directory)


def test_a_clock_that_is_set_back_changes_nothing(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tune(make_recipe("whole", evaluate=True, train={"eval_every": 1, "save_every": 1}), quiet=True)
    now = [2e9]

    def back() -> float:
        now[0] -= 3600.0
        return now[0]

    monkeypatch.setattr(time, "time", back)
    run = tune(make_recipe("back", evaluate=True, train={"eval_every": 1, "save_every": 1}), quiet=True)
    assert distance(whole.directory, run.directory) == 0
    assert json.loads((run.directory / "manifest.json").read_text())["seconds"] > 0


def test_a_log_is_created_once_its_folder_exists(tmp_path: Path) -> None:
    said: list[str] = []
    log = records.MetricsFile(tmp_path / "later" / "metrics.jsonl", said.append)
    log.write({"step": 1})
    (tmp_path / "later").mkdir()
    log.write({"step": 2})
    log.close()
    assert (tmp_path / "later" / "metrics.jsonl").read_text() == '{"step": 2}\n'
    assert ["cannot be written" in said[0], "is missing 1 records" in said[1], len(said)] == [True, True, 2]


def test_a_disk_full_from_the_start_reports_the_bytes_needed(tmp_path: Path, make_recipe: Make) -> None:
    recipe = make_recipe("new")
    with Disk(recipe.output, 1, "ENOSPC").failing(), pytest.raises(ResourceError, match=r"[\d,]+ bytes are needed"):
        tune(recipe, quiet=True)
    assert not recipe.output.exists()

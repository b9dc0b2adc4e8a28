"""Environment faults (terminal hung up, streams closed, disk of the log full): the command still finishes."""

from __future__ import annotations

import json
import os
import pty
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from budwood.cli import app
from budwood.training import loop, records, report

from .harness import Outcome, Shop


def surroundings(shop: Shop, every: int = 1) -> Iterator[Outcome]:
    """Inject each fault (or every n-th) in a run of the command; the adapter must equal the uninterrupted run's."""
    method = "lora, dropout"
    shop.reference(method)
    path = shop.folder / "around.yaml"
    recipe = shop.recipe(method, "around")
    path.write_text(recipe.to_yaml())
    faults: dict[str, Callable[[], None]] = {
        "terminal hung up in a step (SIGHUP, then EIO)": lambda: _hung_up(path),
        "standard streams closed before the start": lambda: _closed(path),
        "stderr a closed pipe": lambda: _unread(path),
        "stderr on a full disk": lambda: _on_full_disk(path),
        "disk of metrics.jsonl full": lambda: _full_log(shop.folder, path),
        "clock set back": lambda: _set_back(path),
    }
    for what, work in list(faults.items())[::every]:
        ended = shop.finish(shop.fork(work))
        lost = f"exit code {ended.code}: {ended.error}{ended.said}" if ended.code else ""
        lost = lost or shop.compare(method, recipe.output, numbers="metrics" not in what)
        if not lost and "clock" not in what and "before the start" not in what:
            counted = json.loads((recipe.output / "manifest.json").read_text())["lost"]
            lost = "" if counted else "lost records are not counted"
        yield Outcome("surroundings", what, lost)
        shop.remove(recipe.output)


def _command(path: Path, write: int | None = None) -> None:
    """Run the command with a descriptor as stdout and stderr, and exit with its code."""
    write = os.open(os.devnull, os.O_WRONLY) if write is None else write
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(write, number)
        setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
    os._exit(app.run(["tune", str(path)]))


def _hung_up(path: Path) -> None:
    """Run on a separate terminal that is closed in the middle of step 3."""
    pid, terminal = pty.fork()
    if pid == 0:
        with _at_step(3, lambda: os.write(1, b"NOW")):
            _command(path, 1)
    output = b""
    while b"NOW" not in output:
        output += os.read(terminal, 4096)
    os.close(terminal)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255)


def _closed(path: Path) -> None:
    for number in range(3):
        os.close(number)
    sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]  # as Python sets them in this case
    os._exit(app.run(["tune", str(path), "--json"]))


def _unread(path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    _command(path, writing)


def _on_full_disk(path: Path) -> None:
    _command(path, os.open("/dev/full", os.O_WRONLY))


def _full_log(folder: Path, path: Path) -> None:
    link = folder / "full"
    if not link.is_symlink():
        link.symlink_to("/dev/full")
    original = records.MetricsFile
    with mock.patch.object(report, "MetricsFile", lambda path, say, append: original(link, say, append)):
        _command(path)


def _set_back(path: Path) -> None:
    now = [2e9]

    def back() -> float:
        now[0] -= 3600.0
        return now[0]

    with mock.patch("time.time", back):
        _command(path)


def _at_step(step: int, act: Callable[[], Any]) -> Any:
    """Call `act` in the middle of a step."""
    original = loop.sum_gradients

    def sum_gradients(run: Any) -> None:
        if run.step + 1 == step:
            act()
        original(run)

    return mock.patch.object(loop, "sum_gradients", sum_gradients)

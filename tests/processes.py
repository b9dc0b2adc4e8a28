"""Runs a script in several processes, as torchrun would; see `budwood.testing.processes`."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from budwood.testing.processes import run_group

LIMIT = 240
"""Timeout in seconds."""

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command sets it before it imports torch


def run_in_two_processes(script: str, folder: Path, path: tuple[Path, ...] = ()) -> None:
    """Run `script`, Python source, in two processes of one group; see `run_in_processes`."""
    run_in_processes(script, folder, 2, path)


def run_in_processes(script: str, folder: Path, count: int, path: tuple[Path, ...] = ()) -> None:
    """Run `script`, Python source, in `count` processes of one group.

    Args:
        script: may expect one thread and torchrun's environment variables.
        folder: an empty or new folder for the script and its output.
        path: folders that the script imports from.

    Raises:
        AssertionError: a process failed or did not end in time; the message is its output.
    """
    ended = end_of_processes(script, folder, count, path, together=True)
    assert [code for code, _ in ended] == [0] * count, "\n".join(output for _, output in ended)


def end_of_processes(
    script: str, folder: Path, count: int, path: tuple[Path, ...] = (), together: bool = False, port: int | None = None
) -> list[tuple[int | None, str]]:
    """Run `script` in so many processes; returns the exit code (None: it did not end in time) and output of each.

    Args:
        script, folder, path: see `run_in_processes`.
        together: kill the others as soon as one fails.
        port: of the first process; None: a free one.
    """
    folder.mkdir(exist_ok=True)
    (folder / "worker.py").write_text(script, encoding="utf-8")
    return run_group(_run, (folder / "worker.py", [*map(str, path)]), folder, count, LIMIT, together, port)


def _run(script: Path, path: list[str]) -> None:
    sys.path[:0] = path
    runpy.run_path(str(script), run_name="__main__")

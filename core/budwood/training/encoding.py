"""Shows the progress of reading and encoding a large data file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from budwood.data.chunk import PARALLEL
from budwood.data.sources import Data, data_size, label
from budwood.untrusted.redaction import redact

SECONDS = 30.0
"""Seconds between two lines if there is no terminal."""


@contextlib.contextmanager
def encoding(data: Data, console: Console | None) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function that takes the number of encoded rows and of all rows; None for a small file.

    Args:
        data: the data as named in the recipe.
        console: where progress is shown, as a bar or in lines; None: nowhere.
    """
    if console is None or data_size(data) < PARALLEL:
        yield None
        return
    name = redact(str(label(data)))
    if not console.is_terminal:
        yield _Lines(console, name)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task(f"reading {name}", total=None)

        def show(done: int, total: int) -> None:
            progress.update(bar, description=f"encoding {name}", completed=done, total=total)

        yield show


class _Lines:
    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name = console, name
        self._started = self._shown = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self._shown >= SECONDS:
            self._shown = now
            left = (now - self._started) / done * (total - done) / 60
            self._console.print(f"encoding {self._name}: {done:,} of {total:,} rows, {left:.0f} min left", markup=False)

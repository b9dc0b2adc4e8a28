"""Signals while a run lasts: what is under way ends in a state that can be gone on from."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from budwood.contract.types import Run


class Signals:
    """What the user asked for, and when the run hears of it.

    The first signal stops what can be done again (loading, an evaluation) at once by a KeyboardInterrupt; what stands
    inside `finishing` is finished first, and asks `requested`. The second changes nothing. The third ends the run at
    once, wherever it is: what was saved before stays.
    """

    def __init__(self) -> None:
        self.number = 0
        """Of the first signal; 0: there was none."""
        self.count = 0
        self._finishing = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear signals inside the context; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        if hasattr(signal, "SIGHUP"):  # a terminal that goes away takes no run with it
            previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """What stands inside is finished before a signal is obeyed."""
        outer, self._finishing = self._finishing, True
        try:
            yield
        finally:
            self._finishing = outer

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What stands inside can be done again: the first signal ends it."""
        outer, self._finishing = self._finishing, False
        try:
            if self.number:
                raise KeyboardInterrupt(self.number)
            yield
        finally:
            self._finishing = outer

    def requested(self, run: Run) -> int:
        """The signal by which the run shall end, 0 for none; every process gets the same answer."""
        if run.processes > 1:
            number = torch.tensor(self.number, device=run.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.number = int(number)
        return self.number

    def _hear(self, number: int, frame: Any) -> None:
        self.number, self.count = self.number or number, self.count + 1
        if self.count > 2 or (self.count == 1 and not self._finishing):
            raise KeyboardInterrupt(number)
        if self.count == 1 and os.isatty(2):  # nothing but a plain write is safe here
            os.write(2, b"\nstopping after this step; the third Ctrl-C leaves at once\n")


def exit_code(number: Any) -> int:
    """The exit code of a run that a signal ended."""
    return 143 if number == signal.SIGTERM else 130

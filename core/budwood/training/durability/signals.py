"""Signal handling of a run: an interrupted run ends in a state that can be resumed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from budwood.contract.types import Run


class Signals:
    """The signals received, and when they take effect.

    The first signal raises KeyboardInterrupt immediately in work that can be repeated (loading, an evaluation). Inside
    `deferred` it has no immediate effect; the loop checks `requested` instead. The second signal changes nothing. The
    third ends the run immediately, wherever it is; everything saved before is kept.
    """

    def __init__(self) -> None:
        self.number = 0
        """Number of the first signal; 0 if there was none."""
        self.count = 0
        self._deferred = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals inside the context; has an effect only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        if hasattr(signal, "SIGHUP"):  # a closed terminal does not end the run
            previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Complete the work inside the context before a signal takes effect."""
        outer, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = outer

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let the first signal interrupt the work inside the context, which can be repeated."""
        outer, self._deferred = self._deferred, False
        try:
            if self.number:
                raise KeyboardInterrupt(self.number)
            yield
        finally:
            self._deferred = outer

    def requested(self, run: Run) -> int:
        """Return the signal that ends the run, or 0; all processes get the same answer."""
        self.number = max(run.world.gather(self.number))
        return self.number

    def _handle(self, number: int, frame: Any) -> None:
        self.number, self.count = self.number or number, self.count + 1
        if self.count > 2 or (self.count == 1 and not self._deferred):
            raise KeyboardInterrupt(number)
        if self.count == 1 and os.isatty(2):  # only a plain write is safe in a signal handler
            os.write(2, b"\nstopping after this step; a third Ctrl-C quits immediately\n")


def exit_code(number: Any) -> int:
    """Return the exit code of a run that a signal ended."""
    return 143 if number == signal.SIGTERM else 130

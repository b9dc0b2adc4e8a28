"""The thread that owns a model: it carries out commands, and steps of its owner as long as there is something to do."""

from __future__ import annotations

import atexit
import queue
import threading
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import torch

Result = TypeVar("Result")
_Command = Callable[[], None]
_started: weakref.WeakKeyDictionary[threading.Thread, queue.SimpleQueue[_Command | None]] = weakref.WeakKeyDictionary()
"""Threads with their commands, for the exit of the interpreter."""


class Owner(Protocol):
    """What has steps."""

    def step(self) -> bool:
        """Do the next part of the work; return whether there is more."""


class CommandThread:
    """A thread that is started by the first command, and ends with its owner, which it does not keep alive while idle.

    Attributes:
        current: the thread; None before the first command.
    """

    def __init__(self, owner: Owner, close: Callable[[], None]) -> None:
        """Prepare the thread; `close`, which must not refer to the owner, is called when the owner is gone."""
        self._owner = weakref.ref(owner)
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._start = threading.Lock()
        self.current: threading.Thread | None = None
        weakref.finalize(owner, self._end, close)

    @property
    def waiting(self) -> int:
        """Number of commands that wait."""
        return self._commands.qsize()

    def post(self, command: _Command, *, own_threads: bool = False) -> None:
        """Let the thread carry out a command, with as many threads of torch as the caller has, or as it has itself."""
        threads = torch.get_num_threads()

        def run() -> None:
            if not own_threads and torch.get_num_threads() != threads:  # torch keeps the number for each thread
                torch.set_num_threads(threads)
            command()

        with self._start:
            if self.current is None or not self.current.is_alive():  # also after a fork, in which it is gone
                thread = threading.Thread(
                    target=_serve, args=(self._owner, self._commands), name="budwood-engine", daemon=True
                )
                _started[thread] = self._commands
                thread.start()
                self.current = thread  # only now, since who finds one that does not run takes it for dead
        self._commands.put(run)

    def call(self, function: Callable[[], Result]) -> Result:
        """Run a function on the thread between two steps, and return its result or raise its error."""
        if threading.current_thread() is self.current:
            return function()
        future: Future[Result] = Future()

        def command() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self.post(command)
        return future.result()

    def _end(self, close: Callable[[], None]) -> None:
        """End the thread. If that dropped the last reference to the owner, it is the one that runs this."""
        self._commands.put(None)
        if self.current is not None and self.current is not threading.current_thread():
            self.current.join()
        close()


@atexit.register
def _end_all() -> None:
    """End every thread: one that still ran while the interpreter ends would abort it inside torch."""
    for thread, commands in list(_started.items()):
        commands.put(None)
        thread.join()


def _serve(owner: weakref.ref[Any], commands: queue.SimpleQueue[_Command | None]) -> None:
    busy = False
    while True:
        try:
            command = commands.get(block=not busy)
        except queue.Empty:
            pass
        else:
            if command is None:
                return
            try:
                command()
            except BaseException:  # a bug in a command that nobody waits for; the thread goes on
                traceback.print_exc()
            del command
            if not commands.empty():
                continue
        current = owner()
        if current is None:
            return
        try:
            busy = current.step()
        except BaseException:  # a bug; commands are still carried out
            traceback.print_exc()
            busy = False
        del current  # it may be the last reference

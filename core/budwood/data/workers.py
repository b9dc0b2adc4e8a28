"""Processes that encode chunks of a large file, one per core.

These are not multiprocessing's processes, which would import the main program again (that fails for a user's script
without a guard) or inherit locks held by other threads. Only its connections are used; both ends are Budwood's.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from budwood.errors import BudwoodError, ResourceError

if TYPE_CHECKING:
    from budwood.data.chunk import Chunk, ChunkEncoder

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error",
    "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


class Workers:
    """Processes with a copy of the encoder each; a context manager that ends them."""

    def __init__(self, processes: list[_Process]) -> None:
        self._processes = processes
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in processes:
            self._idle.put(process)

    @classmethod
    def start(cls, encoder: ChunkEncoder, count: int) -> Workers | None:
        """Start processes; return None if the encoder cannot be sent, as with a task defined in the main program."""
        processes: list[_Process] = []
        try:
            for _ in range(count):
                processes.append(_Process())
            ready = all([process.offer(encoder) for process in processes]) and all([p.receive() for p in processes])
        except BaseException:
            _end(processes)
            raise
        if not ready:
            _end(processes)
            return None
        return cls(processes)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        _end(self._processes)

    def map(self, ranges: Iterator[range]) -> Iterator[tuple[range, Chunk]]:
        """Yield each range with its chunk, in order; a chunk's error is raised when its turn comes.

        Raises:
            ResourceError: a process was killed.
        """
        waiting: deque[tuple[range, Future[Chunk]]] = deque()
        with ThreadPoolExecutor(len(self._processes)) as pool:
            try:
                for indices in ranges:
                    waiting.append((indices, pool.submit(self._encode, indices)))
                    if len(waiting) > 2 * len(self._processes):
                        first, future = waiting.popleft()
                        yield first, future.result()
                while waiting:
                    first, future = waiting.popleft()
                    yield first, future.result()
            except BaseException:
                _end(self._processes)  # otherwise threads would wait for answers
                raise

    def _encode(self, indices: range) -> Chunk:
        process = self._idle.get()
        try:
            process.send(indices)
            answer: Chunk | BaseException = process.receive()
        finally:
            self._idle.put(process)
        if isinstance(answer, BaseException):
            raise answer
        return answer


class _Process:
    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - until `end`
        self._pipe, theirs = Pipe()
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=[theirs.fileno()],
                env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        except OSError as error:
            raise ResourceError(f"a process that encodes data cannot be started: {error.strerror}.") from error
        finally:
            theirs.close()

    def offer(self, encoder: ChunkEncoder) -> bool:
        """Send the encoder; return False if that is not possible."""
        try:
            self._pipe.send(encoder)
        except OSError:  # `receive` reports the reason
            return True
        except Exception:  # pickling a plugin's object may raise anything
            return False
        return True

    def send(self, indices: range) -> None:
        try:
            self._pipe.send(indices)
        except OSError:  # `receive` reports the reason
            return

    def receive(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ResourceError(f"a process that encodes data {self._reason()}") from error

    def _reason(self) -> str:
        code = self._popen.wait()
        if code == -signal.SIGKILL:
            return "was killed by the system, probably for lack of memory. Free some memory, or split the file."
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"ended with exit status {code}: {lines[-1][:300] if lines else 'no output'}"

    def end(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self._pipe.close()
        self._errors.close()


def _end(processes: list[_Process]) -> None:
    for process in processes:
        process.end()


def serve(descriptor: int) -> None:
    """Encode the chunks requested over a connection until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends us
    pipe: Connection[Any, Any] = Connection(descriptor)
    try:
        encoder: ChunkEncoder = pipe.recv()
    except EOFError:
        return
    except Exception:  # a class defined in the main program
        pipe.send(False)
        return
    pipe.send(True)
    while True:
        try:
            indices: range = pipe.recv()
        except EOFError:
            return
        try:
            answer: Chunk | BaseException = encoder.encode(indices)
        except Exception as error:
            answer = _portable(error)
        pipe.send(answer)


def _portable(error: Exception) -> BaseException:
    """Return an error that can be sent to another process; a plugin's own class may not be picklable."""
    for kind in type(error).__mro__:
        if issubclass(kind, BudwoodError) and kind.__module__.startswith("budwood."):
            return kind(str(error))
    other = RuntimeError(f"{type(error).__name__}: {error}")
    other.add_note("".join(traceback.format_exception(error)))
    return other

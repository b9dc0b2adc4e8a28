"""One run per folder: a lock file that the system holds while the process lives. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from budwood.errors import InputError, ResourceError
from budwood.untrusted.files import PARTIAL, cannot_write

LOCK = ".lock"


@contextlib.contextmanager
def locked(directory: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Lock the run's folder; it is created if missing, and removed again if it stays empty.

    The system releases the lock when the process ends, however it ends. The lock file of a killed process still names
    that process.

    Raises:
        InputError: another process holds the lock; the message names its process number and machine.
        ResourceError: the folder cannot be written, or its file system does not support locks.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    path, lock = directory / LOCK, _lock(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        previous = _process_in(path)
        path.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        for partial in directory.glob(f".*{PARTIAL}"):  # left by a killed process
            if partial.is_file():
                partial.unlink()
    except filelock.Timeout:
        raise in_use(directory, _process_in(path) or "another process") from None
    except OSError as error:
        lock.release()
        if error.errno == errno.ENOSPC:
            raise cannot_write(directory, error, 4096) from error
        raise ResourceError(f"output: {directory} cannot be locked: {error.strerror}.") from error
    try:
        if previous:
            say(f"{directory}: the lock of {previous}, which ended without releasing it, is taken over")
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before the release: afterwards the file may be another process's
        lock.release()
        for created in missing:
            with contextlib.suppress(OSError):
                created.rmdir()  # fails unless it is empty


def in_use(directory: Path, by: str) -> InputError:
    """Return the error for a folder that another process uses."""
    return InputError(f"output: {directory} is in use by {by}: wait for it, or name another folder.")


def holder(directory: Path) -> str:
    """Return the process that holds the folder's lock, as "process 12 on host"; "" if there is none."""
    path = directory / LOCK
    if not path.is_file():
        return ""
    try:
        with _lock(directory):
            return ""
    except filelock.Timeout:
        return _process_in(path) or "another process"
    except OSError:
        return ""


def _lock(directory: Path) -> filelock.FileLock:
    """Return the folder's non-blocking lock; on a file system without locks it fails instead of using a soft lock."""
    return filelock.FileLock(directory / LOCK, blocking=False, fallback_to_soft=False)


def _process_in(path: Path) -> str:
    """Return the process that a lock file names, or ""."""
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(1000))
        return f"process {int(content['process'])} on {content['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""

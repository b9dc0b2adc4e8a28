"""One run per folder: a lock file in it, held by the system for as long as the process lives. Imports no torch."""

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
    """Hold the run's folder; it is made where it is missing, and goes again where nothing was put into it.

    The system lets go of the lock when its process ends, however it ends; what is left in the file of a process that
    was killed tells whose it was.

    Raises:
        InputError: another process holds it; named by number and machine.
        ResourceError: the folder cannot be written, or its file system knows no locks.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    path, lock = directory / LOCK, _lock(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        left = _named_in(path)
        path.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        for partial in directory.glob(f".*{PARTIAL}"):  # of a process that was killed
            if partial.is_file():
                partial.unlink()
    except filelock.Timeout:
        raise in_use(directory, _named_in(path) or "another process") from None
    except OSError as error:
        lock.release()
        if error.errno == errno.ENOSPC:
            raise cannot_write(directory, error, 4096) from error
        raise ResourceError(f"output: {directory} cannot be locked: {error.strerror}.") from error
    try:
        if left:
            say(f"{directory}: the lock of {left}, which ended without letting go, is taken over")
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before it is released: afterwards it may be another's
        lock.release()
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()  # only where it is empty


def first_process() -> bool:
    """Whether this is the first process of its run, as torchrun counts them: the one that the folder belongs to."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def in_use(directory: Path, by: str) -> InputError:
    """The error of a folder in which another process runs."""
    return InputError(f"output: {directory} is in use by {by}: wait for it, or name another folder.")


def holder(directory: Path) -> str:
    """Who holds the folder now: "process 12 on host", or "" for nobody."""
    path = directory / LOCK
    if not path.is_file():
        return ""
    try:
        with _lock(directory):
            return ""
    except filelock.Timeout:
        return _named_in(path) or "another process"
    except OSError:
        return ""


def _lock(directory: Path) -> filelock.FileLock:
    """The folder's lock, which is tried once; a file system without locks is an error, not another kind of lock."""
    return filelock.FileLock(directory / LOCK, blocking=False, fallback_to_soft=False)


def _named_in(path: Path) -> str:
    """The process that a lock's file names, "" where it names none."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(1000))
        return f"process {int(found['process'])} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""

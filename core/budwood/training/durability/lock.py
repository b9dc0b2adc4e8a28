"""One run per folder: a lock file in it, held by the system for as long as the process lives. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from budwood.errors import InputError, ResourceError
from budwood.untrusted.files import cannot_write

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
    path = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, left = _take(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise cannot_write(directory, error, 4096) from error
        raise ResourceError(f"output: {directory} cannot be locked: {error.strerror}.") from error
    try:
        if left:
            say(f"{directory}: the lock of {left}, which ended without letting go, is taken over")
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)
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
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY)
    except OSError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return ""
    except BlockingIOError:
        return _read(descriptor) or "another process"
    except OSError:
        return ""
    finally:
        os.close(descriptor)


def _take(path: Path) -> tuple[int, str]:
    """Lock the file; returns its descriptor and the holder that it names, "" where it names none."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
                os.close(descriptor)  # its last holder removed it in between
                continue
            left = _read(descriptor)
            text = json.dumps({"process": os.getpid(), "host": socket.gethostname()})
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(), 0)
            return descriptor, left
        except BlockingIOError:
            found = _read(descriptor) or "another process"
            os.close(descriptor)
            raise in_use(path.parent, found) from None
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise


def _read(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {int(found['process'])} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""

"""Checks names and paths, and writes files and folders that appear complete or not at all. Imports no torch."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from budwood.errors import CorruptError, InputError, ResourceError, system_error
from budwood.untrusted.redaction import shorten

PARTIAL = ".partial"
"""Suffix of the hidden temporary name of a file or folder that is being written."""
_RESERVED_NAMES = {"con", "prn", "aux", "nul", *(f"com{n}" for n in range(10)), *(f"lpt{n}" for n in range(10))}


def check_name(name: str, what: str = "adapter") -> str:
    """Return `name` if it is a valid file name on every system and cannot lead out of its folder.

    Raises:
        InputError: the name is empty, longer than 64 characters, a device name, or contains characters other than
            letters, digits, `_`, `-` and `.`.
    """
    shown = name if len(name) <= 40 else name[:37] + "..."
    if len(name) > 64:
        raise InputError(f"{what} name {shown!r} has {len(name)} characters: use at most 64.")
    if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_-])?", name) or ".." in name:
        raise InputError(
            f"{what} name {shown!r}: use letters, digits, '_', '-' and '.', and start with a letter, a digit or '_'."
        )
    if name.split(".")[0].lower() in _RESERVED_NAMES:
        raise InputError(f"{what} name {shown!r} is a device name: choose another.")
    return name


def check_folder(directory: Path, what: str = "folder") -> Path:
    """Return `directory` if it is a valid folder path on every system and not a device's.

    Raises:
        InputError: a component of the path is longer than 255 bytes, a device name, or contains control or invisible
            characters (zero width, writing direction); or the path is in /dev, /proc or /sys.
    """
    shown = shorten("".join(c if c.isprintable() else "?" for c in str(directory)))
    for part in directory.parts:
        if not part.isprintable():
            raise InputError(f"{what} {shown}: contains invisible characters: choose another name.")
        if len(os.fsencode(part)) > 255:
            raise InputError(f"{what} {shown}: a component has {len(os.fsencode(part))} bytes; the limit is 255.")
        if part.split(".")[0].strip().lower() in _RESERVED_NAMES:
            raise InputError(f"{what} {shown}: '{part}' is a device name: choose another.")
    parts = Path(os.path.abspath(directory)).parts
    if parts[1:2] in (("dev",), ("proc",), ("sys",)) and parts[1:3] != ("dev", "shm"):
        raise InputError(f"{what} {shown}: is in one of the system's device folders: choose another.")
    return directory


def check_inside(directory: Path, names: Iterable[str]) -> None:
    """Check that files named by an untrusted source are inside `directory`; links that lead out are refused.

    Raises:
        CorruptError: a file is outside, or its name is invalid; the message names the first one.
    """
    root = os.path.realpath(directory)
    snapshots, repository = os.path.split(os.path.dirname(root))[::-1]
    # The folder to which the links in the hub's cache point.
    cached = os.path.join(repository, "blobs") if snapshots == "snapshots" else root
    for name in names:
        if not name.isprintable() or len(name) > 200 or name.startswith("~") or ".." in Path(name).parts:
            raise CorruptError(f"{directory}: refers to the file {shorten(repr(name))}, which cannot be inside it.")
        place = os.path.realpath(os.path.join(directory, name))
        if not place.startswith((root + os.sep, cached + os.sep)):
            raise CorruptError(f"{directory / name}: leads out of its folder.")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_new_folder(directory: Path) -> None:
    """Refuse a folder that already holds something.

    Raises:
        InputError: `directory` is a link, a file, or a folder that is not empty.
    """
    if (directory.is_symlink() or directory.exists()) and not _is_empty_folder(directory):
        raise InputError(f"{directory} already exists: choose another folder, or remove it.")


@contextlib.contextmanager
def complete_directory(directory: Path, replace: bool = False, needs: int = 0) -> Iterator[Path]:
    """Yield a temporary sibling of `directory`, which replaces it, synced to disk, if the block succeeds.

    An exception or a crash leaves the previous state intact. With `replace`, an existing folder is swapped in one
    rename. If the file system cannot swap, the old folder is briefly renamed to `.NAME.old`; after a crash at that
    moment, the next call restores it.

    Args:
        directory: the folder to write.
        replace: whether the folder may already exist.
        needs: size of the contents in bytes, for the message if the disk is full; 0: unknown.

    Raises:
        InputError: `directory` exists and `replace` is False, or its path is invalid.
        ResourceError: the folder cannot be written.
    """
    directory = check_folder(Path(os.path.abspath(directory)))
    if not replace:
        check_new_folder(directory)
    partial, old = (directory.with_name(f".{directory.name}.{end}") for end in ("partial", "old"))
    try:
        missing = [path for path in directory.parents if not path.exists()]
        directory.parent.mkdir(parents=True, exist_ok=True)
        for created in missing:
            _sync(created.parent)
        _restore(old, directory)
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
        partial.mkdir()
    except OSError as error:
        raise cannot_write(directory, error, needs) from error
    try:
        yield partial
        # Follow the user's umask: safetensors makes its files readable by the owner only.
        shared = partial.stat().st_mode & 0o666
        for path in sorted(partial.rglob("*"), reverse=True):
            if path.is_file() and not path.is_symlink():
                with contextlib.suppress(OSError):  # some file systems have no modes
                    path.chmod(shared)
            _sync(path)
        _sync(partial)
        if not directory.exists() or not _exchange(partial, directory):
            if directory.exists():
                shutil.rmtree(old, ignore_errors=True)
                directory.rename(old)
            partial.rename(directory)
        _sync(directory.parent)
    except Exception as error:
        needs = needs or sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        with contextlib.suppress(OSError):
            _restore(old, directory)
        if (cause := system_error(error)) is None:
            raise
        raise cannot_write(directory, cause, needs) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # the old folder, or an incomplete new one
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)


def complete_file(path: Path, data: bytes | Callable[[Path], object]) -> None:
    """Write a file atomically and sync it to disk: readers see the old file or the new one, also after a crash.

    If several processes write the same file at the same time, the last one wins. A process that is killed leaves a
    hidden file whose name ends with `PARTIAL`.

    Args:
        path: the file, whose folder must exist.
        data: the contents, or a function that writes them to the path that is passed to it.

    Raises:
        ResourceError: the file cannot be written.
    """
    partial, needs = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}"), 0
    try:
        partial.touch()
        # Follow the user's umask: safetensors makes its files readable by the owner only.
        mode = partial.stat().st_mode & 0o666
        if callable(data):
            data(partial)
        else:
            needs = len(data)
            partial.write_bytes(data)
        with contextlib.suppress(OSError):  # some file systems have no modes
            partial.chmod(mode)
        needs = partial.stat().st_size
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except Exception as error:
        if (cause := system_error(error)) is None:
            raise
        raise cannot_write(path, cause, needs) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError, needs: int) -> ResourceError:
    """Return the error for a failed write; if the disk is full, it reports the bytes needed (or 0) and free."""
    text = f"{path}: cannot be written: {error.strerror or error}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{text}. Choose another folder.")
    free = shutil.disk_usage(next(p for p in Path(os.path.abspath(path)).parents if p.exists())).free
    return ResourceError(
        f"{text}: {needs:,} bytes are needed, and {free:,} are free. Free some space, or choose another folder."
    )


def _restore(old: Path, directory: Path) -> None:
    """Undo the first of two renames if the second did not happen."""
    if old.is_dir() and not directory.exists():
        old.rename(directory)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one atomic rename (Linux); return False if the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0

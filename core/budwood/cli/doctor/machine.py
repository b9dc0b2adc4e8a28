"""Checks the host's memory, the folders a run writes to, and the token cache."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from budwood.cli.doctor.finding import LOW_MEMORY, Finding, gb, gib
from budwood.errors import InputError

LOW_DISK = 2 << 30


def check_memory() -> Iterator[Finding]:
    """Check the host memory that this process may use."""
    import psutil

    memory = psutil.virtual_memory()
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    total, available = memory.total, memory.available
    text = ""
    if limit is not None and limit < total:  # a container's limit
        total, available, text = limit, min(available, limit - (used or 0)), " (the container's limit)"
    values = {"total": total, "available": available}
    text = f"{gib(available)} of {gib(total)} memory available{text}"
    if available < LOW_MEMORY:
        remedy = "close other programs; quantise the base; lower train.micro_tokens and data.max_length."
        yield Finding("memory", "warning", text, remedy, values)
    else:
        yield Finding("memory", "ok", text, values=values)


def _cgroup(name: str) -> int | None:
    """Return a value of the process's control group (v2) in bytes, or None if it is not set."""
    try:
        return int(Path("/sys/fs/cgroup", name).read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def check_disk(working: Path | None = None) -> Iterator[Finding]:
    """Check that the working folder (None: the current one) and the temporary folder are writable."""
    try:
        yield _disk("working folder", working or Path.cwd(), "change to a writable folder, or set output.")
    except OSError as error:  # the folder was removed
        yield Finding("disk", "problem", f"the working folder: {error.strerror}", "change to another folder.")
    requested = os.environ.get("TMPDIR")
    try:
        folder = Path(tempfile.gettempdir())
    except OSError as error:
        yield Finding("disk", "problem", f"no folder for temporary files: {error}", "set TMPDIR to a writable folder.")
    else:
        yield _disk("temporary files", folder, "set TMPDIR to a writable folder.")
        if requested and Path(requested).resolve() != folder.resolve():
            text = f"TMPDIR is {requested}, which cannot be used; temporary files go to {folder}"
            yield Finding("disk", "warning", text, "create that folder, or set TMPDIR to another.")


def _disk(label: str, folder: Path, remedy: str) -> Finding:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".budwood-doctor-") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        text = f"{label}: {folder} cannot be written ({error.strerror or error})"
        return Finding("disk", "problem", text, remedy, {"folder": str(folder), "writable": False})
    values = {"folder": str(folder), "writable": True, "free": free}
    text = f"{label}: {folder} is writable, {gib(free)} free"
    if free < LOW_DISK:
        return Finding("disk", "warning", text, "free some space: a run writes its adapter and checkpoints.", values)
    return Finding("disk", "ok", text, values=values)


def check_cache() -> Iterator[Finding]:
    """Report the token cache's folder, size and size limit."""
    from budwood.data import cache

    folder = cache.default_folder()
    size = sum(map(cache.size_of, cache.entries(folder)))
    values: dict[str, Any] = {"folder": str(folder), "size": size}
    try:
        limit = cache.size_limit()
    except InputError as error:
        yield Finding("cache", "problem", str(error), "correct or unset BUDWOOD_CACHE_LIMIT.", values)
        return
    text = f"token cache: {folder}, {gb(size)} of at most {gb(limit)} (BUDWOOD_CACHE_LIMIT changes the limit)"
    yield Finding("cache", "ok", text, values=values | {"limit": limit})

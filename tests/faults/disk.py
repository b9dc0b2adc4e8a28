"""The N-th operation on the disk fails: open, write, fsync, rename, mkdir, with EIO once or ENOSPC from then on."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
from safetensors import SafetensorError

from budwood.adapters import files

from .harness import METHODS, Ended, Outcome, Shop, unsound

ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}


class Disk:
    """Counts the operations under `root` and fails from the N-th on; 0: none fails.

    An EIO is of one operation. A full disk stays full: every later open for writing, write, fsync and mkdir fails too,
    while a rename, which needs no room, works again. A write that fails has written half.
    """

    def __init__(self, root: Path, fail_at: int = 0, error: str = "EIO") -> None:
        self.root, self.fail_at, self.error = str(root), fail_at, error
        self.count = 0
        self.failed: list[str] = []
        """What failed: operation and file."""

    def check(self, operation: str, path: Any) -> bool:
        """Count an operation; whether it shall fail."""
        if not str(path).startswith(self.root):
            return False
        self.count += 1
        again = self.error == "ENOSPC" and self.failed and operation != "rename"
        if not (again or (self.fail_at and self.count == self.fail_at)):
            return False
        self.failed.append(f"{operation} {Path(str(path)).relative_to(self.root)}")
        return True

    def strike(self, operation: str, path: Any) -> None:
        """Raise where the operation shall fail."""
        if self.check(operation, path):
            raise self.exception(path)

    def exception(self, path: Any) -> OSError:
        """As the system raises it."""
        return OSError(ERRORS[self.error], os.strerror(ERRORS[self.error]), str(path))

    @contextmanager
    def failing(self) -> Iterator[Disk]:
        """Stand between the process and the system inside the context."""
        opened = io.open
        with mock.patch.multiple(
            os,
            fsync=lambda fd, do=os.fsync: (self.strike("fsync", os.readlink(f"/proc/self/fd/{fd}")), do(fd))[1],
            rename=lambda a, b, do=os.rename, **k: (self.strike("rename", b), do(a, b, **k))[1],
            replace=lambda a, b, do=os.replace, **k: (self.strike("rename", b), do(a, b, **k))[1],
            mkdir=lambda p, *a, do=os.mkdir, **k: (self.strike("mkdir", p), do(p, *a, **k))[1],
        ):
            # Patched by hand: mock keeps no order among modules that share a function.
            def open_(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
                if not isinstance(file, str | bytes | os.PathLike) or not set(mode) & set("wax+"):
                    return opened(file, mode, buffering, *args, **kwargs)
                path = os.fspath(file)
                self.strike("open", path)
                return _watch(opened(file, mode, buffering, *args, **kwargs), self, path)

            def save_file(tensors: Any, filename: Any, *args: Any, do: Any = safetensors.torch.save_file, **k: Any) -> Any:
                self.strike("open", filename)
                do(tensors, filename, *args, **k)
                if self.check("write", filename):  # written in Rust, whose errors are these
                    os.truncate(filename, os.path.getsize(filename) // 2)
                    code = ERRORS[self.error]
                    raise SafetensorError(
                        f'Error while serializing: I/O error: {os.strerror(code)} (os error {code})'
                    )

            def exchange(first: Path, second: Path, do: Any = files._exchange) -> bool:
                self.strike("rename", second)
                return bool(do(first, second))

            users = [module for module in _modules() if getattr(module, "save_file", None) is safetensors.torch.save_file]
            with (
                mock.patch.object(io, "open", open_),
                mock.patch.object(builtins, "open", open_),
                mock.patch.object(files, "_exchange", exchange),
                mock.patch.object(safetensors.torch, "save_file", save_file),
            ):
                for module in users:
                    module.save_file = save_file
                try:
                    yield self
                finally:
                    for module in users:
                        module.save_file = save_file.__kwdefaults__["do"]


def _modules() -> list[Any]:
    import sys

    return [m for name, m in list(sys.modules.items()) if name.startswith(("budwood", "peft")) and m is not None]


def _watch(file: Any, disk: Disk, path: str) -> Any:
    """A file whose writes may fail, halfway."""
    write = file.write

    def failing(data: Any) -> Any:
        if disk.check("write", path):
            half = data[: len(data) // 2]
            write(half)
            file.flush()
            raise disk.exception(path)
        return write(data)

    try:
        file.write = failing
    except AttributeError:  # FileIO and the like take no attributes
        return _Watched(file, failing)
    return file


class _Watched:
    """A file object that is not to be changed, with a `write` of its own."""

    def __init__(self, file: Any, write: Callable[[Any], Any]) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)

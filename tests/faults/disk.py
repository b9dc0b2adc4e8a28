"""Lets the N-th disk operation fail (open, write, fsync, rename, mkdir): EIO once, or ENOSPC from then on."""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
from safetensors import SafetensorError

from budwood.training.loop import tune
from budwood.untrusted import files

from .harness import Ended, Outcome, Shop, incomplete

TRAIN = {"save_every": 3}
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}


class Disk:
    """Counts the operations below `root` and lets the N-th fail; 0: none fails.

    EIO affects one operation. A full disk stays full: all later operations that need space fail too, but renames
    succeed. A failing write writes half of its data.
    """

    def __init__(self, root: Path, fail_at: int = 0, error: str = "EIO") -> None:
        self.root, self.fail_at, self.error = str(root), fail_at, error
        self.count = 0
        self.failed: list[str] = []
        """Failed operations, each with its file."""

    def fails(self, operation: str, path: Any) -> bool:
        """Count an operation; return whether it should fail."""
        if not str(path).startswith(self.root):
            return False
        self.count += 1
        again = self.error == "ENOSPC" and self.failed and operation != "rename"
        if not (again or self.count == self.fail_at):
            return False
        self.failed.append(f"{operation} {Path(str(path)).relative_to(self.root)}")
        return True

    def strike(self, operation: str, path: Any) -> None:
        """Raise if the operation should fail."""
        if self.fails(operation, path):
            raise self.exception(path)

    def exception(self, path: Any) -> OSError:
        """Return the exception as raised by the operating system."""
        return OSError(ERRORS[self.error], os.strerror(ERRORS[self.error]), str(path))

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Intercept the system calls of this process inside the context."""
        fsync, rename, replace, mkdir, opened = os.fsync, os.rename, os.replace, os.mkdir, io.open
        exchange, save_file = files._exchange, safetensors.torch.save_file

        def fsync_(descriptor: int) -> None:
            self.strike("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        def rename_(source: Any, target: Any, **kwargs: Any) -> None:
            self.strike("rename", target)
            rename(source, target, **kwargs)

        def replace_(source: Any, target: Any, **kwargs: Any) -> None:
            self.strike("rename", target)
            replace(source, target, **kwargs)

        def exchange_(first: Path, second: Path) -> bool:
            self.strike("rename", second)
            return exchange(first, second)

        def mkdir_(path: Any, *args: Any, **kwargs: Any) -> None:
            if not os.path.isdir(path):
                self.strike("mkdir", path)
            mkdir(path, *args, **kwargs)

        def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            writes = isinstance(file, str | os.PathLike) and set(mode) & set("wax+")
            if writes:
                self.strike("open", os.fspath(file))
            handle = opened(file, mode, *args, **kwargs)
            if writes:
                self._intercept_writes(handle, os.fspath(file))
            return handle

        def save_file_(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
            # The Rust code writes to a temporary file, removes it on failure, and raises an error with this text.
            if self.fails("write", filename):
                cause = self.exception(filename)
                raise SafetensorError(f"Error while serializing: I/O error: {cause.strerror} (os error {cause.errno})")
            save_file(tensors, filename, *args, **kwargs)

        with ExitStack() as stack:
            for owner, name, function in (
                (os, "fsync", fsync_), (os, "rename", rename_), (os, "replace", replace_), (os, "mkdir", mkdir_),
                (io, "open", open_), (builtins, "open", open_), (files, "_exchange", exchange_),
                *((module, "save_file", save_file_) for module in _importers(save_file)),
            ):  # fmt: skip
                stack.enter_context(mock.patch.object(owner, name, function))
            yield

    def _intercept_writes(self, file: Any, path: str) -> None:
        """Let writes to an open file fail halfway."""
        write = file.write

        def write_(data: Any) -> Any:
            if self.fails("write", path):
                write(data[: len(data) // 2])
                file.flush()
                raise self.exception(path)
            return write(data)

        file.write = write_


def _importers(function: Any) -> list[Any]:
    """Return every module that has imported `function` under its name."""
    name = function.__name__
    return [module for module in list(sys.modules.values()) if getattr(module, "__dict__", {}).get(name) is function]


def failing_disk(shop: Shop, every: int = 1, first: int = 1) -> Iterator[Outcome]:
    """Let every n-th operation fail, starting with the `first`, in a new run and in a resumed one."""
    method = "lora, dropout"
    shop.reference(method)
    old = shop.stopped(shop.recipe(method, "failing", **TRAIN), 4)
    cases = {"a new run": None, "a resumed run": old}
    for exchange in (True, False):
        for case, start in cases.items():
            ended, (total, *_) = _attempt(shop, method, start, 0, "EIO", exchange)
            if ended.code:
                raise RuntimeError(f"{case}: {ended.error}")
            for error in ERRORS:
                for number in range(first, int(total) + 1, every):
                    yield _outcome(shop, method, case, start, number, error, exchange)
        cases = {"a resumed run, folders that cannot be exchanged": old}


def _outcome(
    shop: Shop, method: str, case: str, start: Path | None, number: int, error: str, exchange: bool
) -> Outcome:
    output = shop.folder / "failing"
    ended, (_, *failed) = _attempt(shop, method, start, number, error, exchange)
    what = f"{case}, operation {number}: {failed[0] if failed else 'none'}"
    kind = f"{error}: {failed[0].split(' ')[0]}" if failed else error
    lost = "" if failed else "no operation failed"
    if ended.code not in (0, 3):
        lost = f"exit code {ended.code}: {ended.error}"
    if ended.code == 3 and error == "ENOSPC" and not re.search(r"\d bytes", ended.error):
        lost = f"the error does not report the bytes needed: {ended.error}"
    if ended.code == 0 and not ended.said.count("warning"):
        lost = "no warning was printed"
    lost = lost or incomplete(output)
    if not lost:
        again = shop.tune(shop.recipe(method, "failing", **TRAIN), resume=True)
        lost = f"the resume ended with {again.code}: {again.error}" if again.code else ""
    lost = lost or shop.compare(method, output, numbers=False)
    shop.remove(output)
    return Outcome(kind, what, lost)


def _attempt(
    shop: Shop, method: str, start: Path | None, number: int, error: str, exchange: bool
) -> tuple[Ended, list[str]]:
    """Start a run, or resume a copy of `start`, with the N-th operation failing; return count and failed operations."""
    recipe = shop.recipe(method, "failing", **TRAIN)
    if start is not None:
        shutil.copytree(start, recipe.output, dirs_exist_ok=True)
    note = shop.folder / "operations.txt"

    def work() -> None:
        disk = Disk(recipe.output, number, error)
        try:
            with ExitStack() as stack:
                if not exchange:
                    stack.enter_context(mock.patch.object(files, "_exchange", lambda first, second: False))
                stack.enter_context(disk.failing())
                tune(recipe, resume=start is not None)
        finally:
            note.write_text("\n".join([str(disk.count), *disk.failed]))

    ended = shop.finish(shop.fork(work))
    lines = note.read_text().splitlines()
    if not number:
        shop.remove(recipe.output)
    return ended, lines

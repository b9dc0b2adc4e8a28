"""Collects arrays chunk by chunk, in memory or, once they are large, in memory-mapped files."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO
from urllib.parse import quote

import numpy as np
from numpy.lib.format import dtype_to_descr, open_memmap, write_array_header_1_0

from budwood.errors import InputError
from budwood.untrusted.files import PARTIAL, cannot_write

Arrays = dict[str, np.ndarray]
LARGE = 64_000_000
"""Size in bytes from which arrays are mapped from files."""


class Spool:
    """Collects chunks of arrays, which are concatenated along their first axis.

    Args:
        folder: where large arrays are written if possible; otherwise the temporary folder.

    Attributes:
        directory: the files' folder, deleted with the spool; None while the arrays are in memory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._chunks: dict[str, list[np.ndarray]] = {}
        self._dtypes: dict[str, np.dtype] = {}
        self._size = 0
        self.directory: Path | None = None
        self._files: dict[str, IO[bytes]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Append a chunk.

        Raises:
            InputError: the arrays differ in name or rank from those of earlier chunks.
            ResourceError: the disk is full.
        """
        if self._chunks and arrays.keys() != self._chunks.keys():
            name = min(arrays.keys() ^ self._chunks.keys()).rpartition("/")[2].partition(".")[0]
            raise InputError(f"examples have different inputs: not all have '{name}'.")
        for name, array in arrays.items():
            earlier = self._chunks.setdefault(name, [])
            if earlier and earlier[0].shape[1:] != array.shape[1:]:
                raise InputError(f"examples have different inputs: '{name.partition('.')[0]}' differs in rank.")
            earlier.append(array)
            self._size += array.nbytes
        if self._size >= LARGE:
            self._write()

    def drop(self, name: str) -> None:
        """Discard an array."""
        self._chunks.pop(name, None)
        if name in self._files and self.directory is not None:
            self._files.pop(name).close()
            (self.directory / file_name(name)).unlink()

    def finish(self) -> Arrays:
        """Return the arrays; those in files are mapped, read-only."""
        if self.directory is None:
            return {name: np.concatenate(chunks) for name, chunks in self._chunks.items()}
        self._write()
        for name, file in self._files.items():
            file.seek(0)
            _write_header(file, self._dtypes[name], self._shapes[name])
            file.close()
        return {name: open_memmap(self.directory / file_name(name), mode="r") for name in self._files}

    def _write(self) -> None:
        """Move the chunks from memory to the files."""
        if self.directory is None:
            self.directory = _make_folder(self._folder)
            weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        try:
            for name, chunks in self._chunks.items():
                dtype = self._dtypes.setdefault(name, np.result_type(*chunks))
                if name not in self._files:
                    self._files[name] = (self.directory / file_name(name)).open("wb")
                    self._shapes[name] = (0, *chunks[0].shape[1:])
                    _write_header(self._files[name], dtype, self._shapes[name])
                for chunk in chunks:
                    self._files[name].write(np.ascontiguousarray(chunk, dtype=dtype).data)
                rows = self._shapes[name][0] + sum(map(len, chunks))
                self._shapes[name] = (rows, *self._shapes[name][1:])
                chunks[:] = [chunks[0][:0]]
        except OSError as error:
            raise cannot_write(self.directory, error, self._size) from error
        self._size = 0


def file_name(name: str) -> str:
    """Return the name of an array's file."""
    return quote(name, safe="") + ".npy"


def _make_folder(folder: Path) -> Path:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=folder, prefix=".", suffix=PARTIAL))
    return Path(tempfile.mkdtemp(prefix="budwood-", suffix=PARTIAL))


def _write_header(file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Write the header of an .npy file; its length does not depend on the number of rows, since numpy pads it."""
    header = {"descr": dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    write_array_header_1_0(file, header)

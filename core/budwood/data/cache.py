"""The token cache: one folder of .npy files per data file, tokenizer, chat template and set of options."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from budwood.data.spool import LARGE, Arrays, file_name
from budwood.errors import InputError
from budwood.untrusted.files import PARTIAL, sha256
from budwood.untrusted.redaction import shorten

VERSION = 8
"""Incremented when the same file and options produce other tokens, or the layout of an entry changes."""

LIMIT = 5_000_000_000
"""Maximum size of the cache in bytes, if `BUDWOOD_CACHE_LIMIT` is not set."""
ABANDONED = 24 * 3600
"""Seconds since its last change after which a partial file is considered to be left by a killed process."""

FACTS, SUFFIX = "facts.json", ".tokens"


def default_folder() -> Path:
    """`$BUDWOOD_CACHE/tokens`, or `~/.cache/budwood/tokens`."""
    root = os.environ.get("BUDWOOD_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "budwood") / "tokens"


def make_key(tokenizer: Any, options: Mapping[str, Any]) -> str | None:
    """Return the hex digest of everything that determines the tokens; None if the tokenizer's state is unreadable."""
    if tokenizer is None:
        return hashlib.sha256(
            json.dumps({"version": VERSION, **options}, sort_keys=True, default=str).encode()
        ).hexdigest()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # The backend keeps the truncation and padding of the last call; every call sets its own.
    backend.no_truncation()
    backend.no_padding()
    identity = {
        "version": VERSION,
        "class": type(tokenizer).__qualname__,
        "backend": hashlib.sha256(backend.to_str().encode()).hexdigest(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": getattr(tokenizer, "chat_template", None),
        **options,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def size_limit() -> int:
    """Return `$BUDWOOD_CACHE_LIMIT`, such as "2GB" or "500 MiB", in bytes; `LIMIT` if it is not set.

    Raises:
        InputError: it is not a size.
    """
    text = os.environ.get("BUDWOOD_CACHE_LIMIT", "").strip()
    if not text:
        return LIMIT
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(i?))?b?", text.lower(), re.ASCII)
    if match is None:
        raise InputError(f"BUDWOOD_CACHE_LIMIT: '{shorten(text)}' is not a size: write it like 2GB or 500MB.")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" kmgt".index(unit) if unit else 0))


def save(
    folder: Path, key: str, arrays: Arrays, facts: dict[str, Any], limit: int = LIMIT, written: Path | None = None
) -> None:
    """Write an entry atomically, then prune the folder to `limit` bytes.

    A folder that cannot be written only costs time, so it is not an error.

    Args:
        written: a folder that holds the arrays' files already, and becomes the entry.
    """
    path = _path(folder, key)
    partial = folder / f".{path.name}.{os.getpid()}{PARTIAL}" if written is None else written
    try:
        if written is None:
            partial.mkdir(parents=True)
            for name, array in arrays.items():
                np.save(partial / file_name(name), array)
        hashes = {name: sha256(partial / file_name(name)) for name in arrays}
        text = json.dumps({"facts": facts, "arrays": hashes})
        (partial / FACTS).write_text(f"{_hash(text)}\n{text}", encoding="utf-8")
        remove(path)  # a damaged entry
        partial.rename(path)
        _prune(folder, path, limit)
    except OSError:
        remove(partial)


def load(folder: Path, key: str) -> tuple[Arrays, dict[str, Any]] | None:
    """Read an entry and mark it as recently used; None if it is missing, incomplete or damaged.

    The arrays of a large entry are mapped into memory, read-only.
    """
    path = _path(folder, key)
    try:
        digest, _, text = (path / FACTS).read_text(encoding="utf-8").partition("\n")
        if digest != _hash(text):
            return None
        entry = json.loads(text)
        files = {name: path / file_name(name) for name in entry["arrays"]}
        if any(sha256(file) != entry["arrays"][name] for name, file in files.items()):
            return None
        arrays: Arrays = {name: open_memmap(file, mode="r") for name, file in files.items()}
        if size_of(path) < LARGE:
            arrays = {name: np.array(array) for name, array in arrays.items()}
    except (OSError, KeyError, ValueError, TypeError, AttributeError):
        return None
    with contextlib.suppress(OSError):  # the folder may be read-only
        os.utime(path)
    return arrays, entry["facts"]


def entries(folder: Path) -> dict[Path, float]:
    """Return the entries of the cache, those that a killed process left included, and when they were last used."""
    used = {}
    for path in (*folder.glob("*" + SUFFIX), *folder.glob(f".*{PARTIAL}"), *folder.glob("*.safetensors")):
        with contextlib.suppress(OSError):  # another process pruned it
            used[path] = path.stat().st_mtime
    return used


def size_of(path: Path) -> int:
    """Return the size of an entry in bytes."""
    try:
        if not path.is_dir():
            return path.stat().st_size
        with os.scandir(path) as files:
            return sum(file.stat().st_size for file in files)
    except OSError:  # another process pruned it
        return 0


def remove(path: Path) -> None:
    """Delete an entry, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _prune(folder: Path, newest: Path, limit: int) -> None:
    """Remove the least recently used entries until the rest take at most `limit` bytes; `newest` is kept."""
    used, now = entries(folder), time.time()
    sizes = {path: size_of(path) for path in used}
    total = sum(sizes.values())
    for path in sorted(used, key=lambda path: used[path]):
        partial = path.name.endswith(PARTIAL)
        if path != newest and (now - used[path] > ABANDONED if partial else total > limit):
            remove(path)
            total -= sizes[path]


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key[:40]}{SUFFIX}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

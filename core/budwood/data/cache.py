"""The token cache: one safetensors file per data file, tokenizer, chat template and set of options."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from budwood.errors import InputError, ResourceError
from budwood.untrusted.files import PARTIAL, complete_file
from budwood.untrusted.redaction import shorten

VERSION = 3
"""Incremented when the same file and options produce other tokens, or the layout of a cache file changes."""

LIMIT = 5_000_000_000
"""Maximum size of the cache in bytes, if `BUDWOOD_CACHE_LIMIT` is not set."""
ABANDONED = 24 * 3600
"""Seconds since its last change after which a partial file is considered to be left by a killed process."""

Arrays = dict[str, np.ndarray]


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


def save(folder: Path, key: str, arrays: Arrays, facts: dict[str, Any], limit: int = LIMIT) -> None:
    """Write an entry atomically, then prune the folder to `limit` bytes.

    A folder that cannot be written only costs time, so it is not an error.
    """
    metadata = {"facts": json.dumps(facts), "sha256": _digest(arrays, facts)}
    path = _path(folder, key)
    with contextlib.suppress(OSError, SafetensorError, ResourceError):
        folder.mkdir(parents=True, exist_ok=True)
        complete_file(path, lambda partial: save_file(arrays, partial, metadata))
        _prune(folder, path, limit)


def load(folder: Path, key: str) -> tuple[Arrays, dict[str, Any]] | None:
    """Read an entry and mark it as recently used; None if it is missing or incomplete."""
    path = _path(folder, key)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        facts = json.loads(metadata["facts"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    if metadata.get("sha256") != _digest(arrays, facts):
        return None
    with contextlib.suppress(OSError):  # the folder may be read-only
        os.utime(path)
    return arrays, facts


def entries(folder: Path) -> dict[Path, os.stat_result]:
    """Return the files of the cache, including partial ones that a killed process left."""
    files = {}
    for path in (*folder.glob("*.safetensors"), *folder.glob(f".*{PARTIAL}")):
        with contextlib.suppress(OSError):  # another process pruned it
            files[path] = path.stat()
    return files


def _prune(folder: Path, newest: Path, limit: int) -> None:
    """Remove the least recently used entries until the rest take at most `limit` bytes; `newest` is kept."""
    files = entries(folder)
    now = time.time()
    total = sum(stat.st_size for stat in files.values())
    for path, stat in sorted(files.items(), key=lambda item: item[1].st_mtime_ns):
        partial = path.name.endswith(PARTIAL)
        if path != newest and (now - stat.st_mtime > ABANDONED if partial else total > limit):
            path.unlink(missing_ok=True)
            total -= stat.st_size


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key[:40]}.safetensors"


def _digest(arrays: Arrays, facts: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()

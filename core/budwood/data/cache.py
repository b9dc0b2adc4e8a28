"""Tokens on disk: a safetensors file for each data file, tokenizer, template and set of options."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

VERSION = 2
"""Goes up when the same file and options give other tokens, or the file's layout changes."""

Arrays = dict[str, np.ndarray]


def default_folder() -> Path:
    """`$BUDWOOD_CACHE/tokens`, or `~/.cache/budwood/tokens`."""
    root = os.environ.get("BUDWOOD_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "budwood") / "tokens"


def make_key(tokenizer: Any, options: Mapping[str, Any]) -> str | None:
    """Hex digest of everything that decides the tokens; None for a tokenizer whose state cannot be read."""
    if tokenizer is None:
        return hashlib.sha256(
            json.dumps({"version": VERSION, **options}, sort_keys=True, default=str).encode()
        ).hexdigest()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # Calls leave their truncation and padding behind in the backend; every call sets its own.
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


def save(folder: Path, key: str, arrays: Arrays, facts: dict[str, Any]) -> None:
    """Write an entry, whole or not at all. A folder that cannot be written costs only time, so it is no error."""
    metadata = {"facts": json.dumps(facts), "sha256": _digest(arrays, facts)}
    temporary = None
    with contextlib.suppress(OSError, SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".writing-")
        os.close(handle)
        save_file(arrays, temporary, metadata)
        os.replace(temporary, _path(folder, key))
        return
    if temporary:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def load(folder: Path, key: str) -> tuple[Arrays, dict[str, Any]] | None:
    """Read an entry; None where there is none, or where it is not whole."""
    try:
        with safe_open(_path(folder, key), framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        facts = json.loads(metadata["facts"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return (arrays, facts) if metadata.get("sha256") == _digest(arrays, facts) else None


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key[:40]}.safetensors"


def _digest(arrays: Arrays, facts: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()

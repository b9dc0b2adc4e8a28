"""Reads a base on disk: folder, configuration, safetensors headers, fingerprint. Does not import torch."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from budwood.errors import CorruptError, InputError, ResourceError, did_you_mean, unreadable
from budwood.untrusted.formats import MAX_HEADER, TensorInfo, read_header, read_json
from budwood.untrusted.hub import hub_errors
from budwood.untrusted.redaction import shorten

PAGE = 4096
PAGES = 8
"""Pages read for a tensor's fingerprint, evenly spread, including the first and the last."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib")
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")


_revisions: ContextVar[dict[str, str] | None] = ContextVar("revisions", default=None)
"""Revision of each hub name inside `one_revision`."""


@contextmanager
def one_revision(model: str, revision: str | None = None) -> Iterator[None]:
    """Pin every hub name in the block to one commit: the one to which `resolve` first resolves it.

    Args:
        model: a folder or a hub name.
        revision: branch, tag or commit of `model`; None: the main branch.
    """
    token = _revisions.set({} if revision is None else {model: revision})
    try:
        yield
    finally:
        _revisions.reset(token)


def resolve(model: str | Path, weights: bool = True, code: bool = False, revision: str | None = None) -> Path:
    """Return the folder of a base, downloading it to the hub's cache if `model` is a hub name.

    Args:
        model: a folder or a hub name.
        weights: also download the weights, not only the small files.
        code: also download Python files.
        revision: branch, tag or commit on the hub; None: that of `one_revision`, or the main branch.

    Raises:
        InputError: the folder, name or revision does not exist; a folder was given with a revision.
        ResourceError: the base is not cached and cannot be downloaded.
    """
    name = str(model)
    path = Path(os.path.expanduser(name))
    revisions = _revisions.get()
    revision = revision or (revisions or {}).get(name)
    try:
        if path.is_dir():
            if revision is not None:
                raise InputError(folder_with_revision(name, revision))
            return path
        exists = path.exists()
    except OSError as error:  # the name is too long, or the folder is not accessible
        raise unreadable(f"base '{shorten(name)}'", error) from error
    if exists:
        raise InputError(f"base '{name}' is a file: give the folder that contains config.json and *.safetensors.")
    in_folder = path.parent != Path(".") and path.parent.is_dir()
    if in_folder or not HUB_NAME.fullmatch(name):
        siblings = [str(path.parent / p.name) for p in path.parent.iterdir() if p.is_dir()] if in_folder else []
        raise InputError(f"base '{name}': no such folder.{did_you_mean(name, siblings)}")
    folder = _from_hub(name, weights, code, revision)
    if revisions is not None and (commit := commit_of(folder)):
        revisions[name] = commit  # a branch may move during the run
    return folder


def folder_with_revision(model: str, revision: str) -> str:
    """Return the message for a revision given with a local folder."""
    return (
        f"base.revision: '{shorten(revision)}' needs a model from the hub, but '{shorten(model)}' is a local folder: "
        "leave it out."
    )


def commit_of(folder: Path) -> str | None:
    """Return the hub commit of a base's folder; None if the folder is not in the hub's cache."""
    cached = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if cached else None


def would_fetch(name: str) -> bool:
    """Return whether `resolve` would contact the hub: the base is neither a local folder nor in the hub's cache."""
    if Path(os.path.expanduser(name)).exists() or not HUB_NAME.fullmatch(name):
        return False
    from huggingface_hub import constants, try_to_load_from_cache

    return not constants.HF_HUB_OFFLINE and not isinstance(
        try_to_load_from_cache(name, "config.json", revision=(_revisions.get() or {}).get(name)), str
    )


def missing_weights(folder: Path) -> tuple[list[str], int | None]:
    """Return the files of weights that a base's folder lacks, and the bytes of all its weights if its index says so.

    The folder is that of `resolve(…, weights=False)`.
    """
    files = sorted(set(_index(folder).values())) or ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    facts = read_json(index, MAX_HEADER).get("metadata") if index.is_file() else None
    size = facts.get("total_size") if isinstance(facts, dict) else None
    return [file for file in files if not (folder / file).is_file()], size if isinstance(size, int) else None


def _from_hub(name: str, weights: bool, code: bool, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download

    small = [*_SMALL_FILES, *(["*.py"] if code else [])]
    with hub_errors("base", name, revision):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=small, ignore_patterns=["*/*"]))
        if (folder / "modules.json").is_file():  # of sentence-transformers, whose settings are in folders of their own
            snapshot_download(name, revision=commit_of(folder) or revision, allow_patterns=["[0-9]_*/config.json"])
        if weights:
            files = sorted(set(_index(folder).values())) or ["model.safetensors"]
            snapshot_download(name, revision=commit_of(folder) or revision, allow_patterns=files)
            missing = [file for file in files if not (folder / file).is_file()]
            if missing and constants.HF_HUB_OFFLINE:
                raise ResourceError(f"base '{name}': {missing[0]} is not in the hub's cache, and the hub is offline.")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        InputError: the folder is not a base.
        CorruptError: config.json is not a JSON object that names a model type.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise InputError(f"base '{folder}' is an adapter: give the base that it was trained on.")
        _refuse_other_weights(folder)
        raise InputError(f"base '{folder}' has no config.json, so it is not a model folder.")
    config = read_json(path, finite=False)
    if not isinstance(config.get("model_type"), str):
        raise CorruptError(f"{path}: 'model_type' is missing.")
    return config


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Read the headers of all safetensors files of a base, and check that the files are complete.

    Raises:
        InputError: there are no safetensors files.
        CorruptError: a file is missing, truncated or malformed.
    """
    single = folder / "model.safetensors"
    if single.is_file():  # as in transformers, even if there is an index too
        return read_header(single)
    index = _index(folder)
    if not index:
        _refuse_other_weights(folder)
        raise InputError(f"base '{folder}' has neither model.safetensors nor model.safetensors.index.json.")
    tensors: dict[str, TensorInfo] = {}
    for name in sorted(set(index.values())):
        if not (folder / name).is_file():
            raise CorruptError(f"{folder / name} is missing, but listed in model.safetensors.index.json.")
        header = read_header(folder / name)
        tensors |= {key: info for key, info in header.items() if index.get(key, name) == name}
    missing = [name for name in index if name not in tensors]
    if missing:
        raise CorruptError(
            f"{folder / index[missing[0]]} does not contain '{missing[0]}', which model.safetensors.index.json lists."
        )
    return tensors


def fingerprint(folder: str | Path) -> str:
    """Hash a base: every tensor's name, dtype, shape and a sample of its bytes, independent of sharding.

    Reads at most 32 KiB per tensor, so that a base of 70 billion parameters takes seconds. Differences between the
    sampled pages are not detected. For a hub name, weights that are not cached are downloaded.

    Returns:
        64 hexadecimal digits (SHA-256).

    Raises:
        InputError, ResourceError, CorruptError: see `resolve` and `read_tensors`.
    """
    files: dict[Path, list[TensorInfo]] = {}
    for entry in read_tensors(resolve(folder)).values():
        files.setdefault(entry.file, []).append(entry)
    with ThreadPoolExecutor(8) as pool:  # disk-bound
        digests = dict(pair for part in pool.map(_digests, files.values()) for pair in part)
    total = hashlib.sha256(b"budwood base 1\n")
    for name in sorted(digests):
        total.update(digests[name])
    return total.hexdigest()


def _digests(entries: list[TensorInfo]) -> list[tuple[str, bytes]]:
    digests = []
    with entries[0].file.open("rb", buffering=0) as file:
        for entry in sorted(entries, key=lambda e: e.start):
            digest = hashlib.sha256(f"{entry.name}\n{entry.dtype}\n{list(entry.shape)}\n".encode())
            for start, count in _sample(entry.start, entry.end):
                file.seek(start)
                digest.update(file.read(count))
            digests.append((entry.name, digest.digest()))
    return digests


def _sample(start: int, end: int) -> Iterator[tuple[int, int]]:
    size = end - start
    if size <= PAGE * PAGES:
        yield start, size
        return
    for i in range(PAGES):
        yield start + (size - PAGE) * i // (PAGES - 1), PAGE


def _index(folder: Path) -> dict[str, str]:
    """Return tensor → file for a sharded base; empty if it is not sharded."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return {}
    index = read_json(path, MAX_HEADER).get("weight_map")
    names = index.values() if isinstance(index, dict) else [None]
    if not index or not all(isinstance(n, str) and n == Path(n).name and n.endswith(".safetensors") for n in names):
        raise CorruptError(f"{path}: 'weight_map' does not name files in the same folder.")
    return index


def _refuse_other_weights(folder: Path) -> None:
    """Raise an error with a remedy if the folder has weights only in unsupported formats."""
    if any(folder.glob("*.gguf")):
        raise InputError(f"base '{folder}' has GGUF weights, which cannot be trained: give the original safetensors.")
    pickles = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    if pickles:
        raise InputError(
            f"base '{folder}' has only pickled weights ({pickles[0]}), which can run code and are never opened: "
            "if you trust them, convert them once with transformers' from_pretrained(…).save_pretrained(…)."
        )

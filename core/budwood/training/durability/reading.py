"""Checkpoints on disk: where they are, what they are named, and whether every file of one is sound."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from budwood.errors import CorruptError, ResourceError
from budwood.training.durability.state import unpack
from budwood.untrusted.files import sha256
from budwood.untrusted.formats import read_header, read_json

FOLDER, TENSORS, STATE, MANIFEST = "checkpoints", "state.safetensors", "state.json", "manifest.json"
FORMAT = 1
MAX_STATE = 64 << 20
"""Largest state.json and manifest.json that are read, in bytes."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found sound on disk: every file has the hash that its manifest says.

    `setting` is what the run was made of; see `changes`.
    """

    directory: Path
    step: int
    setting: dict[str, Any]
    accepted: list[dict[str, Any]]

    def load(self) -> dict[str, Any]:
        """Read the state.

        Raises:
            CorruptError: it changed since it was found.
        """
        read_header(self.directory / TENSORS)
        try:
            tensors = load_file(self.directory / TENSORS)
            state = unpack(read_json(self.directory / STATE, MAX_STATE), tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{self.directory}: cannot be read: {error}.") from error
        if not isinstance(state, dict):
            raise CorruptError(f"{self.directory / STATE}: holds no state.")
        return state


def find_newest(directory: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest sound checkpoint of the run in `directory`; one that is damaged is named and passed over.

    Raises:
        CorruptError: there are some, and none is sound.
    """
    found = sorted(steps_in(directory / FOLDER).items(), reverse=True)
    for _, path in found:
        try:
            return read_checkpoint(path)
        except (CorruptError, ResourceError, OSError) as error:
            say(f"warning: {error} The checkpoint before it is tried.")
    if found:
        raise CorruptError(f"{directory / FOLDER}: no checkpoint is sound: start over with --overwrite.")
    return None


def steps_in(folder: Path) -> dict[int, Path]:
    """Folders of checkpoints by their step."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {int(p.name[5:]): p for p in paths if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir()}


def read_checkpoint(path: Path) -> Checkpoint:
    """Check a checkpoint, every file by its hash.

    Raises:
        CorruptError: it names the file that is truncated, altered, missing, or too many.
    """
    where = path / MANIFEST
    if not where.is_file():
        raise CorruptError(f"{where}: is missing.")
    manifest = read_json(where, MAX_STATE)
    manifest.pop("sha256", None)
    if where.read_bytes() != sealed(manifest):
        raise CorruptError(f"{where}: was altered after it was saved.")
    kinds = {"files": dict, "setting": dict, "accepted": list, "step": int}
    if not all(type(manifest.get(name)) is kind for name, kind in kinds.items()):
        raise CorruptError(f"{where}: is not that of a checkpoint.")
    if manifest.get("format") != FORMAT:
        raise CorruptError(f"{where}: format {manifest.get('format')}; this Budwood reads format {FORMAT}.")
    if path.name != folder_name(manifest["step"]):
        raise CorruptError(f"{path}: is the checkpoint of step {manifest['step']}.")
    present = {p.name for p in path.iterdir()} - {MANIFEST}
    for name in sorted(present ^ manifest["files"].keys()):
        raise CorruptError(f"{path / name}: {'does not belong there' if name in present else 'is missing'}.")
    for name, expected in manifest["files"].items():
        try:
            if sha256(path / name) != expected:
                raise CorruptError(f"{path / name}: was altered after it was saved (its SHA-256 differs).")
        except OSError as error:
            raise CorruptError(f"{path / name}: cannot be read: {error.strerror}.") from error
    return Checkpoint(path, manifest["step"], manifest["setting"], manifest["accepted"])


def folder_name(step: int) -> str:
    """Return the name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """Return a manifest as it stands on disk: JSON, with the hash of all its other fields."""
    return _text({**manifest, "sha256": hashlib.sha256(_text(manifest)).hexdigest()})


def _text(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()

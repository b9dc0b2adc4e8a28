"""Checkpoints on disk: their folders and names, and the validation of their files."""

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
from torch import Tensor

from budwood.errors import CorruptError, ResourceError
from budwood.training.durability.state import unpack
from budwood.untrusted.files import sha256
from budwood.untrusted.formats import read_header, read_json

FOLDER, TENSORS, STATE, MANIFEST = "checkpoints", "state.safetensors", "state.json", "manifest.json"
FORMAT = 1
MAX_STATE = 64 << 20
"""Size limit for state.json and manifest.json, in bytes."""


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint on disk: every file has the hash in its manifest.

    `setting` is the run's setting; see `changes`.
    """

    directory: Path
    step: int
    setting: dict[str, Any]
    accepted: list[dict[str, Any]]

    def load(self) -> dict[str, Any]:
        """Read the state.

        Raises:
            CorruptError: a file changed since it was validated.
        """
        tree, tensors = self.read()
        try:
            state: dict[str, Any] = unpack(tree, tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{self.directory}: cannot be read: {error}.") from error
        return state

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Read the files: the state as plain JSON, and the tensors that it refers to.

        Raises:
            CorruptError: a file changed since it was validated.
        """
        read_header(self.directory / TENSORS)
        try:
            tensors = load_file(self.directory / TENSORS)
            tree = read_json(self.directory / STATE, MAX_STATE)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{self.directory}: cannot be read: {error}.") from error
        if not isinstance(tree, dict):
            raise CorruptError(f"{self.directory / STATE}: holds no state.")
        return tree, tensors


def find_newest(directory: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest valid checkpoint of the run in `directory`; damaged ones are reported and skipped.

    Raises:
        CorruptError: there are checkpoints, but none is valid.
    """
    folders = sorted(steps_in(directory / FOLDER).items(), reverse=True)
    for _, path in folders:
        try:
            return read_checkpoint(path)
        except (CorruptError, ResourceError, OSError) as error:
            say(f"warning: {error} Trying the previous checkpoint.")
    if folders:
        raise CorruptError(f"{directory / FOLDER}: no checkpoint is valid: start over with --overwrite.")
    return None


def steps_in(folder: Path) -> dict[int, Path]:
    """Return the folders of checkpoints, keyed by step."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {int(p.name[5:]): p for p in paths if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir()}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest and validate every file by its hash.

    Raises:
        CorruptError: a file is truncated, altered, missing or unexpected; the message names it.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise CorruptError(f"{file}: is missing.")
    manifest = read_json(file, MAX_STATE)
    manifest.pop("sha256", None)
    if file.read_bytes() != sealed(manifest):
        raise CorruptError(f"{file}: was altered after it was saved.")
    types = {"files": dict, "setting": dict, "accepted": list, "step": int}
    if not all(type(manifest.get(name)) is cls for name, cls in types.items()):
        raise CorruptError(f"{file}: is not the manifest of a checkpoint.")
    if manifest.get("format") != FORMAT:
        raise CorruptError(f"{file}: format {manifest.get('format')}; this Budwood reads format {FORMAT}.")
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
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """Return a manifest's bytes on disk: JSON, with the hash of all its other fields."""
    return _text({**manifest, "sha256": hashlib.sha256(_text(manifest)).hexdigest()})


def _text(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()

"""The output folder: whether a run may write to it, and what of an old run is deleted.

Imports no torch, so that a wrong folder is refused at once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from budwood.adapters import store
from budwood.errors import InputError, ResourceError
from budwood.parallel.processes import Processes
from budwood.training.durability.lock import holder, in_use
from budwood.untrusted.files import PARTIAL, check_folder, complete_file

MANIFEST = "manifest.json"
SKIPPED = "skipped.jsonl"
RUN = frozenset(
    {MANIFEST, SKIPPED, "recipe.yaml", "metrics.jsonl", "loss.png", "report.html", "adapter", "checkpoints", "budwood"}
)
"""What core and its trackers write (tensorboard's folder has the project's name); manifest.json lists the rest."""
ADAPTER = frozenset({store.CONFIG, store.WEIGHTS, store.MANIFEST, store.GOLDEN})
_CHECKPOINT = re.compile(r"\.?step-\d+(\.\w+)*")


def check_output(directory: Path, overwrite: bool, resume: bool = False) -> None:
    """Reject an output folder that is not empty or not writable. Hidden files do not count.

    Only the run's first process checks.

    Raises:
        InputError: the folder holds a run without `overwrite` or `resume`, holds other files, or is a file.
        ResourceError: the folder is not writable.
    """
    if overwrite and resume:
        raise InputError("--resume continues a run and --overwrite replaces it: give only one.")
    if not Processes.from_environment().first:  # the first process may already have locked the folder and written files
        return
    check_folder(directory, "output:")
    if directory.exists() and not directory.is_dir():
        raise InputError(f"output: {directory} is a file: name a folder.")
    if directory.is_dir() and any(not path.name.startswith(".") for path in directory.iterdir()):
        manifest = read_manifest(directory)
        if manifest is None:
            raise InputError(f"output: {directory} is not empty and does not hold a run: name another folder.")
        if not (overwrite or resume) and (running := holder(directory)):
            raise in_use(directory, running)
        if not (overwrite or resume or manifest.get("finished")):
            raise InputError(
                f"output: {directory} holds an unfinished run: continue it with --resume, start over with "
                "--overwrite, or name another folder."
            )
        if not (overwrite or resume):
            raise InputError(f"output: {directory} holds another run: name another folder, or use --overwrite.")
        if overwrite:
            _check_strangers(directory, manifest)
    parent = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise ResourceError(f"output: {directory} cannot be written ({parent} is read-only): name another folder.")


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest.json of a run's folder; None if there is none, or if Budwood did not write it.

    A damaged one is {} if there are checkpoints, from which the run can be resumed.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {} if any(map(_CHECKPOINT.fullmatch, _names(directory / "checkpoints"))) else None
    return manifest if isinstance(manifest, dict) and "budwood" in manifest else None


def make_output(directory: Path, overwrite: bool, world: Processes) -> None:
    """Create the output folder, and with `overwrite` delete the old run's files; call after all checks.

    At every moment the folder is empty except for hidden files, or has a manifest.json that identifies it as a run's.
    """
    if world.first:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            old = read_manifest(directory)
            if overwrite or old is None:
                if old is not None:
                    _check_strangers(directory, old)
                complete_file(directory / MANIFEST, json.dumps({"budwood": metadata.version("budwood")}).encode())
            for path in directory.iterdir() if overwrite and old is not None else ():
                if path.name == MANIFEST or not _wrote(path.name, old):
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        except OSError as error:
            raise ResourceError(f"output: {directory} cannot be written: {error.strerror}.") from error
    world.barrier()


def written_by_strategies(directory: Path) -> list[str]:
    """Names of the files and folders in a run's folder that are not core's, for its manifest."""
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith(".") and path.name not in RUN)


def _check_strangers(directory: Path, manifest: dict[str, Any]) -> None:
    """Refuse to replace a folder with a file that no run wrote.

    Raises:
        InputError: it names the first such file.
    """
    stranger = next(_strangers(directory, manifest), None)
    if stranger is not None:
        raise InputError(
            f"output: {stranger} was not written by a run, and --overwrite would lose it: move it, or name another "
            "folder."
        )


def _strangers(directory: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if not path.name.startswith(".") and not _wrote(path.name, manifest):
            yield path
    adapter, checkpoints = directory / "adapter", directory / "checkpoints"
    if adapter.is_dir() and not adapter.is_symlink():
        known = ADAPTER | _listed(adapter / store.MANIFEST)
        yield from (path for path in sorted(adapter.iterdir()) if path.name not in known)
    if checkpoints.is_dir() and not checkpoints.is_symlink():
        yield from (path for path in sorted(checkpoints.iterdir()) if not _CHECKPOINT.fullmatch(path.name))


def _wrote(name: str, manifest: dict[str, Any] | None) -> bool:
    files = (manifest or {}).get("files")
    return name in RUN or name.endswith(PARTIAL) or (isinstance(files, list) and name in files)


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _listed(path: Path) -> set[str]:
    """Names of an adapter's files, by its budwood.json."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {str(name) for name in files}

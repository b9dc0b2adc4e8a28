"""Refuses what it can at once: output folder, data rows, base. Imports no torch, so that a mistake costs no wait."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from budwood.data.recognition import check_rows
from budwood.errors import InputError, ResourceError
from budwood.model.checks import BaseInfo, check_base
from budwood.model.quiet import hide_hub_kernels
from budwood.recipe.schema import Recipe, build_composition
from budwood.training.durability.lock import first_process, holder, in_use
from budwood.untrusted.files import check_folder

LARGE = 64 << 20
"""Data files above this size, in bytes, are only checked when they are read for training."""


def preflight(recipe: Recipe, overwrite: bool = False, resume: bool = False) -> BaseInfo:
    """Check output, strategies with their options, data and base, as far as files alone can tell.

    Raises:
        InputError: the output folder is in use, an option is wrong, the strategies cannot be combined, a data file is
            malformed, or the base is not a base.
        ResourceError: the output cannot be written, a plugin is broken, or the hub cannot be reached.
        CorruptError: a file of the base is damaged.
    """
    check_output(recipe.output, overwrite, resume)
    hide_hub_kernels()  # before a plugin imports peft, which imports bitsandbytes, which downloads them
    build_composition(recipe)
    for path in (recipe.data.train, recipe.data.eval):
        if path is not None and (path.is_dir() or not path.exists() or path.stat().st_size <= LARGE):
            check_rows(path, recipe.base.task)
    return check_base(recipe.base.model, recipe.base.quantization, recipe.base.trust_remote_code)


def check_output(directory: Path, overwrite: bool, resume: bool = False) -> None:
    """Refuse an output folder that is not empty or cannot be written. Hidden files do not count.

    Only a run's first process checks.

    Raises:
        InputError: it holds a run that is neither to be resumed nor replaced, holds other files, or is a file.
        ResourceError: it cannot be written.
    """
    if overwrite and resume:
        raise InputError("--resume continues a run and --overwrite replaces it: give only one.")
    if not first_process():  # the first may hold the folder already and have written files to it
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
    parent = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise ResourceError(f"output: {directory} cannot be written ({parent} is read-only): name another folder.")


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return the manifest.json of a run's folder; {} if it cannot be read, None if there is none."""
    path = directory / "manifest.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

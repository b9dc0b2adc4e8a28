"""Refuses what it can at once: output folder, data rows, base. Imports no torch, so that a mistake costs no wait."""

from __future__ import annotations

from budwood.data.formats import check_rows
from budwood.model.checks import BaseInfo, check_base
from budwood.model.quiet import hide_hub_kernels
from budwood.recipe.schema import Recipe, build_composition
from budwood.training.output import check_output

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

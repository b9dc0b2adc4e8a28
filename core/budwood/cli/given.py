"""What a command is given: a recipe, or data together with --base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from budwood.recipe.schema import Recipe

DATA_SUFFIXES = {".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"}

RECIPE_SUFFIXES = {".yaml", ".yml", ""}


def read_given(given: Path, base: str | None, overrides: Sequence[str]) -> Recipe:
    """Return the recipe in a file, or the default recipe for a data file, folder, pattern or hub name and a base.

    Raises:
        InputError: data is given without a base, a recipe with one, or either is wrong.
    """
    from budwood.data.files import is_hub_name
    from budwood.errors import InputError
    from budwood.recipe.file import refuse_run
    from budwood.recipe.schema import default_recipe, load_recipe

    refuse_run(given)
    suffix = given.suffix.lower()
    is_data = suffix in DATA_SUFFIXES or given.is_dir() or is_hub_name(str(given))
    if base is not None:  # a file of another type is data, too, and what is wrong with it is said later
        is_data = is_data or not (suffix in RECIPE_SUFFIXES or (suffix == ".json" and _is_recipe(given)))
    if is_data and base is None:
        raise InputError(f"{given} is a data file: name the base model with --base DIR, or pass a recipe.")
    if base is not None and not is_data:
        raise InputError("--base needs a data file; for a recipe, set base.model (or -o base.model=DIR).")
    return load_recipe(given, overrides) if base is None else default_recipe(given, base, overrides=overrides)


def check_adapter(directory: Path, base: str | None, allow_other_base: bool) -> None:
    """Check an adapter and the base that it names, from files alone, before torch is imported.

    Args:
        base: folder or hub name that the user gives instead.
        allow_other_base: accept a base that the adapter was not trained on.

    Raises:
        InputError, CorruptError, ResourceError: one of them cannot be used.
    """
    from budwood.adapters.recorded_base import check_recorded_base
    from budwood.adapters.store import read_adapter

    check_recorded_base(read_adapter(directory, hashes=False), base, None, allow_other_base)


def _is_recipe(path: Path) -> bool:
    import json

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "base" in content

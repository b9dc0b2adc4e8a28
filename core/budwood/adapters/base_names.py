"""Names of bases that adapters record: folders, names on the hub, and snapshots in its cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from budwood.errors import InputError
from budwood.model.checkpoint import would_fetch
from budwood.model.checks import BaseInfo, check_base

if TYPE_CHECKING:
    from budwood.adapters.store import SavedAdapter


def named_differently(one: str, other: str) -> bool:
    """Return whether two names of bases, folders or names on the hub, end differently; False if one is unknown."""
    return bool(one and other) and _last(one) != _last(other)


def base_name(saved: SavedAdapter, base: str | None = None) -> str | None:
    """Return `base`, or if it is None the base that the adapter records; None if there is no record.

    Raises:
        InputError: the recorded base would have to be downloaded, which needs an explicit `base`.
    """
    if base is not None or saved.manifest is None:
        return base
    name = saved.manifest.base.name
    if would_fetch(name):
        raise InputError(
            f"{saved.directory}: was trained on the base '{name}', which is not on this machine. Only a base that you "
            f"name explicitly is downloaded: --base {name}"
        )
    return name


def check_named_base(saved: SavedAdapter, name: str, base: str | None, quantization: str | None) -> BaseInfo:
    """Check the base of an adapter from its files; see `check_base`.

    Args:
        name: of the base, see `base_name`.
        base: what the user named; None: nothing, so that the message has to say whose base it is.
    """
    try:
        return check_base(name, quantization)
    except InputError as error:
        if base is None and not Path(name).expanduser().is_dir():
            raise InputError(
                f"{error} {saved.directory} was trained on this base: pass its current location with --base."
            ) from error
        raise


def _last(name: str) -> str:
    """Return a base's name without its owner or folder, in lower case, also of a snapshot in the hub's cache."""
    parts = Path(name).parts
    cached = next((part for part in parts if part.startswith("models--")), "")
    return (cached.rpartition("--")[2] or (parts or (name,))[-1]).lower()

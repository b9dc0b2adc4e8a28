"""The base that an adapter records, found and checked from files alone. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from budwood.adapters.store import SavedAdapter, read_adapter
from budwood.errors import InputError
from budwood.model.checkpoint import fingerprint, one_revision, would_fetch
from budwood.model.checks import check_base


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


def check_recorded_base(
    saved: SavedAdapter, base: str | None, quantization: str | None = None, allow_other_base: bool = False
) -> str | None:
    """Return the base's name, see `base_name`, after a check of its files, and that the adapter was trained on it.

    Args:
        quantization: with which it will be loaded; None: as recorded.
        allow_other_base: accept a base that the adapter was not trained on.

    Raises:
        InputError, CorruptError, ResourceError: the base cannot be used.
    """
    name, record = base_name(saved, base), saved.manifest.base if saved.manifest else None
    if name:
        with one_revision(name, record.revision if record is not None and base is None else None):
            check_named_base(
                saved, name, base, quantization or (record.quantization if record else None), allow_other_base
            )
    return name


def check_named_base(
    saved: SavedAdapter, name: str, base: str | None, quantization: str | None, allow_other_base: bool
) -> None:
    """Check the files of a base, and that an adapter was trained on it; for the arguments see `check_recorded_base`.

    Args:
        name: of the base, see `base_name`.
        base: what the user named; None: nothing, so that the message has to say whose base it is.
    """
    try:
        info = check_base(name, quantization)
    except InputError as error:
        if base is None and not Path(name).expanduser().is_dir():
            raise InputError(
                f"{error} {saved.directory} was trained on this base: pass its current location with --base."
            ) from error
        raise
    read_adapter(
        saved.directory,
        base_name=name,
        base_fingerprint=fingerprint(info.path),
        allow_other_base=allow_other_base,
        hashes=False,
    )

"""Names of bases that adapters record: folders, names on the hub, and snapshots in its cache."""

from __future__ import annotations

from pathlib import Path


def named_differently(one: str, other: str) -> bool:
    """Return whether two names of bases, folders or names on the hub, end differently; False if one is unknown."""
    return bool(one and other) and _last(one) != _last(other)


def _last(name: str) -> str:
    """Return a base's name without its owner or folder, in lower case, also of a snapshot in the hub's cache."""
    parts = Path(name).parts
    cached = next((part for part in parts if part.startswith("models--")), "")
    return (cached.rpartition("--")[2] or (parts or (name,))[-1]).lower()

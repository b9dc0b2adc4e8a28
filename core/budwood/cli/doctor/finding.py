"""What `budwood doctor` finds, and how it writes sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "note", "warning", "problem"]

OURS = "budwood"
LOW_MEMORY = 2 << 30
"""Bytes of free memory, the host's or a GPU's, below which doctor warns."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: python, versions, memory, disk, cache, torch, device, bitsandbytes or plugins.
        status: "problem": tuning would fail; "warning": something is wrong that no usual run needs; "note": worth
            knowing.
        text: what was found.
        remedy: what to do; empty where there is nothing to do.
        values: figures and names, for programs.
    """

    topic: str
    status: Status
    text: str
    remedy: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def gb(count: int) -> str:
    """Return bytes as "1.25 GB"."""
    return f"{count / 1e9:,.2f} GB"


def gib(count: int) -> str:
    """Return bytes as "1.2 GiB"."""
    return f"{count / 2**30:,.1f} GiB"

"""The findings of `budwood doctor`, and how it formats sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "note", "warning", "problem"]

OURS = "budwood"
LOW_MEMORY = 2 << 30
"""Bytes of free memory (host or GPU) below which doctor warns."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        topic: python, versions, memory, disk, cache, torch, device, bitsandbytes, plugins or measured.
        status: "problem": tuning would fail; "warning": a fault that does not affect most runs; "note": worth
            knowing.
        text: the result in words.
        remedy: what to do; empty if nothing.
        values: machine-readable values.
    """

    topic: str
    status: Status
    text: str
    remedy: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def gb(count: int) -> str:
    """Format bytes as "1.25 GB"."""
    return f"{count / 1e9:,.2f} GB"


def gib(count: int) -> str:
    """Format bytes as "1.2 GiB"."""
    return f"{count / 2**30:,.1f} GiB"

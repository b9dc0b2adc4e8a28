"""The comparison that an export asks for."""

from __future__ import annotations

from pathlib import Path

from budwood.adapters.store import SavedAdapter
from budwood.serving.exports.replay import Replay, replay
from budwood.serving.exports.wanted import Wanted


def compare(saved: SavedAdapter, folder: Path, wanted: Wanted, approximate: bool) -> Replay | None:
    """Replay an export in PEFT's layout, unless no check is wanted."""
    if not wanted.check:
        return None
    return replay(
        saved, folder, base=wanted.base, quantization=wanted.quantization, device=wanted.device,
        allow_other_base=wanted.allow_other_base, approximate=approximate, force=wanted.force,
    )  # fmt: skip

"""The comparison that an export asks for, and what it does not cover."""

from __future__ import annotations

from pathlib import Path

from budwood.adapters.store import SavedAdapter
from budwood.errors import InputError
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


def other_weights(saved: SavedAdapter, program: str, wanted: Wanted) -> list[str]:
    """Return a note that a program answers from other weights than those on which an adapter was trained, if so."""
    quantization = saved.manifest.base.quantization if saved.manifest is not None else "none"
    if quantization == "none" or wanted.quantization:
        return []
    if saved.manifest is not None and saved.manifest.needs_quantization:
        return [f"it makes up for the error of its base in {quantization}: have {program} load the base so quantised"]
    return [
        f"it was trained on the base in {quantization}; {program} answers from the base that it loads. What the "
        "original weights change: --quantization none"
    ]


def check_weights(saved: SavedAdapter, program: str) -> None:
    """Refuse an adapter that is right only on a quantised base, for a program that cannot load that.

    Raises:
        InputError: it is such an adapter.
    """
    if saved.manifest is not None and saved.manifest.needs_quantization:
        raise InputError(
            f"{saved.directory}: makes up for the error of its base in {saved.manifest.base.quantization}, which "
            f"{program} cannot load: serve it with `budwood serve`, or export it for peft or vllm."
        )

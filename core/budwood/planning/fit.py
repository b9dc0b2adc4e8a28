"""Searches the settings with which a recipe fits a device and learns the same: micro-batches and recomputation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from budwood.planning.composition import show
from budwood.planning.estimate import Estimate, gib
from budwood.planning.rehearsal import GRADIENTS
from budwood.planning.trace import KEPT, TEMPORARY
from budwood.recipe.schema import Recipe

ATTEMPTS, ROOM, ROUND = 4, 0.95, 64
"""Sizes of micro-batches tried for each setting, the share of the memory to aim for, and the multiple they have."""


@dataclass(frozen=True)
class Candidate:
    """Settings that were estimated, as changes to `train`."""

    changes: dict[str, Any]
    estimate: Estimate

    @property
    def overrides(self) -> str:
        """The changes as options of a command."""
        return " ".join(f"-o train.{key}={str(value).lower()}" for key, value in self.changes.items())


@dataclass
class Fit:
    """The candidates in the order of their estimates, and the fastest that fits; None: none does."""

    candidates: list[Candidate] = field(default_factory=list)
    chosen: Candidate | None = None
    reason: str = ""
    """If none fits: what cannot be helped, and what would change the result."""


def fit(recipe: Recipe, estimate: Callable[[Recipe], Estimate]) -> Fit:
    """Find the settings that fit at the least time, without changing what a run learns.

    The size of micro-batches and recomputation do not change the result. Rank, length, quantisation and the base do,
    and are only named.

    Args:
        estimate: estimates a recipe on the device that it has to fit.
    """
    found = Fit()
    settings: list[dict[str, Any]] = [{}]
    if not recipe.train.gradient_checkpointing:
        settings.append({"gradient_checkpointing": True})
    for setting in settings:
        size = recipe.train.micro_tokens
        for _ in range(ATTEMPTS):
            changes = setting if size == recipe.train.micro_tokens else {**setting, "micro_tokens": size}
            train = recipe.train.model_copy(update=changes)
            result = estimate(recipe.with_train(train))
            found.candidates.append(Candidate(changes, result))
            if result.fits:
                break
            work = result.parts.get(KEPT, 0) + result.parts.get(TEMPORARY, 0)
            room = ROOM * result.device.memory - (result.needed - work)
            if room <= 0 or not work or result.largest_micro > size:  # a single group is larger than `size`
                break
            smaller = int(result.largest_micro * room / work) // ROUND * ROUND
            size = min(smaller, size - ROUND)
            if size < ROUND:
                break
        if not setting and found.candidates[-1].changes == {} and found.candidates[-1].estimate.fits:
            break  # the recipe fits as it is
    fitting = [candidate for candidate in found.candidates if candidate.estimate.fits]
    found.chosen = min(fitting, key=_cost, default=None)
    if found.chosen is None:
        found.reason = _reason(recipe, min(found.candidates, key=lambda c: c.estimate.needed).estimate)
    return found


def _cost(candidate: Candidate) -> float:
    """Return the time of a candidate; without a known time, its FLOPs."""
    result = candidate.estimate
    return result.seconds[1] if result.seconds is not None else result.flops


def _reason(recipe: Recipe, least: Estimate) -> str:
    work = least.parts.get(KEPT, 0) + least.parts.get(TEMPORARY, 0) + least.parts.get(GRADIENTS, 0)
    fixed = ", ".join(f"{part} {gib(size)}" for part, size in least.parts.items() if part not in (KEPT, TEMPORARY))
    others = ["data.max_length", "the adapter's rank", "the base"]
    if recipe.base.quantization == "none":
        others.insert(0, "base.quantization: nf4")
    over = f"{gib(least.needed)} of {gib(least.device.memory)}"
    what = "the parts that no setting changes exceed it" if least.needed - work > least.device.memory else "none fits"
    return f"at least {over}: {what} ({fixed}); what would help changes the result: {', '.join(others)}"


def show_fit(found: Fit, recipe: Recipe, console: Console) -> None:
    """Print memory against time of every candidate, and the one to take."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for title in ("micro_tokens", "gradient_checkpointing", "memory", "fits", "time"):
        table.add_column(title)
    for candidate in sorted(found.candidates, key=lambda c: -c.estimate.needed):
        result = candidate.estimate
        train = recipe.train.model_copy(update=candidate.changes)
        span = "unknown" if result.seconds is None else f"{result.seconds[0]:,.0f} to {result.seconds[1]:,.0f} s"
        mark = " *" if candidate is found.chosen else ""
        table.add_row(
            f"{train.micro_tokens:,}", str(train.gradient_checkpointing).lower(), gib(result.needed),
            ("yes" if result.fits else "no") + mark, span,
        )  # fmt: skip
    last = f"nothing fits: {found.reason}"
    if found.chosen is not None:
        last = f"to fit: {found.chosen.overrides}" if found.chosen.changes else "the recipe fits as it is"
    show(Group(Text(), table, Text(), Text(last)), console)


__all__ = ["Candidate", "Fit", "fit", "show_fit"]

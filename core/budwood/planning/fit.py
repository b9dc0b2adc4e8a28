"""Searches the settings with which a recipe fits a device, in the order of what changes least and costs least time.

The size of micro-batches, recomputation and offloading do not change what a run learns. Quantisation, rank and length
do: they are only suggested, unless the user allows them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from budwood.errors import InputError
from budwood.planning.estimate import Estimate, compact_optimizer, fixed, gib
from budwood.planning.options import CHANGES
from budwood.planning.rehearsal import ADAPTERS, BASE, GRADIENTS, OPTIMIZER, QUANTIZED
from budwood.planning.sizes import ROOM
from budwood.planning.trace import KEPT, TEMPORARY
from budwood.recipe.schema import Recipe, build_composition
from budwood.recipe.sections import Choice

SMALLEST_RANK, SMALLEST_LENGTH, ROUND = 4, 64, 64
RECOMPUTE, OFFLOAD = "train.gradient_checkpointing", "train.activation_offloading"


@dataclass(frozen=True)
class Candidate:
    """Settings that were estimated: changes to the recipe, by the names that overrides have."""

    changes: dict[str, Any]
    estimate: Estimate
    alters: tuple[str, ...] = ()
    """Those of `CHANGES` that it needs."""

    @property
    def overrides(self) -> str:
        """The changes as options of a command."""
        return " ".join(_override(key, value) for key, value in self.changes.items())


@dataclass
class Fit:
    """The candidates in the order of their estimates, and the fastest that fits and is allowed; None: none does."""

    recipe: Recipe
    candidates: list[Candidate] = field(default_factory=list)
    chosen: Candidate | None = None
    suggestions: list[Candidate] = field(default_factory=list)
    """What would fit, but changes the result and is not allowed."""
    reason: str = ""
    """If none is chosen: the parts that no setting changes."""

    @property
    def fitted(self) -> Recipe | None:
        """The recipe with the chosen settings."""
        return changed(self.recipe, self.chosen.changes) if self.chosen is not None else None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; the part "fit" of `budwood plan --json`."""

        def values(candidate: Candidate) -> dict[str, Any]:
            result = candidate.estimate
            return {
                "overrides": candidate.overrides, "alters": list(candidate.alters),
                "changes": {
                    key: [choice.model_dump() for choice in value] if key == "strategies" else value
                    for key, value in candidate.changes.items()
                },
                "needed_bytes": result.needed, "fits": result.fits,
                "seconds": None if result.seconds is None else list(result.seconds), "flops": result.flops,
            }  # fmt: skip

        return {
            "overrides": self.chosen.overrides if self.chosen else None, "reason": self.reason,
            "candidates": [values(candidate) for candidate in self.candidates],
            "suggestions": [candidate.overrides for candidate in self.suggestions],
        }  # fmt: skip


def _override(key: str, value: Any) -> str:
    if key == "strategies":
        return f"-o 'strategies={json.dumps([{c.name: c.options} if c.options else c.name for c in value])}'"
    return f"-o {key}={str(value).lower()}"


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe with changes such as {"train.micro_tokens": 512, "lora.rank": 4}; "strategies" replaces all."""
    for key, value in changes.items():
        place, _, name = key.partition(".")
        if place == "strategies":
            recipe = recipe.model_copy(update={place: value})
            continue
        if place in ("base", "train", "data"):
            section = getattr(recipe, place).model_copy(update={name: value})
            recipe = recipe.model_copy(update={place: section})
            continue
        choices = [
            choice.model_copy(update={"options": {**choice.options, name: value}}) if choice.name == place else choice
            for choice in recipe.strategies
        ]
        recipe = recipe.model_copy(update={"strategies": choices})
    return recipe


def fit(recipe: Recipe, estimate: Callable[[Recipe], Estimate], allow: Collection[str] = (), sized: bool = True) -> Fit:
    """Find the settings that fit at the least time.

    Args:
        estimate: estimates a recipe on the device that it has to fit.
        allow: those of `CHANGES` that may be made.
        sized: whether the size of micro-batches may be chosen; without data it is given.

    Raises:
        BudwoodError: see `estimate`.
    """
    found = Fit(recipe)

    def attempt(changes: dict[str, Any], alters: tuple[str, ...] = ()) -> Candidate:
        """Estimate the recipe with changes, and with the size of micro-batches that fits them best."""
        free = sized and bool(changes)
        result = estimate(changed(recipe, {**changes, "train.micro_tokens": None} if free else changes))
        made = dict(changes)
        if free and result.micro_tokens != recipe.train.micro_tokens:
            made["train.micro_tokens"] = result.micro_tokens
        if made.get(RECOMPUTE) == "auto":
            made[RECOMPUTE] = result.gradient_checkpointing
            if made[RECOMPUTE] is False:
                made.pop(OFFLOAD, None)
            if repr(made[RECOMPUTE]) == repr(recipe.train.gradient_checkpointing):  # 1 == True
                del made[RECOMPUTE]
        candidate = Candidate(made, result, alters)
        if all(other.changes != made for other in found.candidates):
            found.candidates.append(candidate)
        return candidate

    train, first = recipe.train, attempt({}).estimate
    if _least(first, recipe) > first.device.memory:
        found.reason = _reason(first)
        return found
    if not first.fits:
        if sized and train.micro_tokens is not None:
            attempt({"train.micro_tokens": None})
        fewest = {RECOMPUTE: "auto" if first.layers else True}
        if train.gradient_checkpointing is not True and train.gradient_checkpointing != "auto":
            with nullcontext() if first.layers else suppress(InputError):  # a class that cannot recompute at all
                attempt(fewest)
        if not _any_fits(found) and first.layers and first.device.kind == "cuda" and not train.activation_offloading:
            attempt({**(fewest if train.gradient_checkpointing != "auto" else {}), OFFLOAD: True})
        if not _any_fits(found):
            _alter(recipe, found, attempt, allow)
    fitting = [c for c in found.candidates if c.estimate.fits and set(c.alters) <= set(allow)]
    found.chosen = min(fitting, key=lambda c: (len(c.alters), _cost(c)), default=None)
    if found.chosen is None:
        found.suggestions = [candidate for candidate in found.candidates if candidate.estimate.fits]
        same = [candidate.estimate for candidate in found.candidates if not candidate.alters]
        found.reason = _reason(min(same, key=lambda result: result.needed))
    return found


def _any_fits(found: Fit) -> bool:
    return any(candidate.estimate.fits for candidate in found.candidates)


def _alter(
    recipe: Recipe, found: Fit, attempt: Callable[[dict[str, Any], tuple[str, ...]], Candidate], allow: Collection[str]
) -> None:
    """Try each setting that changes the result; if none suffices alone, several of them together."""
    least = min(found.candidates, key=lambda candidate: candidate.estimate.needed)
    fixed = {key: value for key, value in least.changes.items() if key != "train.micro_tokens"}
    if RECOMPUTE in fixed and least.estimate.layers:
        fixed[RECOMPUTE] = "auto"
    fits = []
    for name in CHANGES:
        if values := _values(recipe, name, least.estimate):
            fits.append(attempt({**fixed, **values}, (name,)).estimate.fits and (name in allow or not allow))
    if any(fits):
        return
    result, changes = least.estimate, dict(fixed)
    names: tuple[str, ...] = ()
    for name in [name for name in CHANGES if name in allow] or CHANGES:
        values = _values(recipe, name, result)
        if not values:
            continue
        changes, names = {**changes, **values}, (*names, name)
        if len(names) > 1:
            result = attempt(changes, names).estimate
        else:
            result = next(c.estimate for c in found.candidates if c.alters == names)
        if result.fits:
            return


def _values(recipe: Recipe, name: str, result: Estimate) -> dict[str, Any]:
    """Return the changes that should make an estimate fit by one of `CHANGES`; {}: it can be changed no further."""
    room = ROOM * result.device.memory - result.needed
    if name == "optimizer":
        return _with_compact_optimizer(recipe) if result.parts.get(OPTIMIZER) else {}
    if name == "quantization":
        return {"base.quantization": "nf4"} if recipe.base.quantization in ("none", "int8") else {}
    if name == "max_length":
        work = result.parts.get(KEPT, 0) + result.parts.get(TEMPORARY, 0)
        longest = min(recipe.data.max_length or result.largest_micro, result.largest_micro)
        length = int(longest * max(work + room, 0) / work) // ROUND * ROUND if work else 0
        length = max(SMALLEST_LENGTH, min(length, (longest - 1) // ROUND * ROUND))
        return {"data.max_length": length} if length < longest else {}
    trained = sum(result.parts.get(part, 0) for part in (ADAPTERS, GRADIENTS, OPTIMIZER))
    ranks = {s.name: getattr(s.options, "rank", None) for s in build_composition(recipe).strategies}
    changes = {}
    for strategy, rank in ranks.items() if recipe.adapter is None else ():
        if isinstance(rank, int) and rank > SMALLEST_RANK:
            smaller = 1 << (rank - 1).bit_length() - 1
            while smaller > SMALLEST_RANK and room + trained * (1 - smaller / rank) < 0:
                smaller //= 2
            changes[f"{strategy}.rank"] = max(smaller, SMALLEST_RANK)
    return changes


def _with_compact_optimizer(recipe: Recipe) -> dict[str, Any]:
    owned = {slot for strategy in build_composition(recipe).strategies for slot in strategy.slots}
    name = compact_optimizer()
    if name is None or "optimizer" in owned:
        return {}
    return {"strategies": [*recipe.strategies, Choice(name=name)]}


def _cost(candidate: Candidate) -> float:
    """Return the time of a candidate; without a known time, its FLOPs."""
    result = candidate.estimate
    return result.seconds[1] if result.seconds is not None else result.flops


def _least(result: Estimate, recipe: Recipe) -> int:
    """Return the bytes that are needed whatever is changed: libraries, and a base that is quantised already."""
    parts = () if recipe.base.quantization in ("none", "int8") else (BASE, QUANTIZED)
    return fixed(result) + sum(result.parts.get(part, 0) for part in parts)


def _reason(least: Estimate) -> str:
    work = least.parts.get(KEPT, 0) + least.parts.get(TEMPORARY, 0)
    held = {"libraries": fixed(least)} if least.device.kind == "cpu" else {}
    held |= {part: size for part, size in least.parts.items() if part not in (KEPT, TEMPORARY) and size > 50_000}
    parts = ", ".join(f"{part} {gib(size)}" for part, size in held.items())
    over = f"at least {gib(least.needed)} of {gib(least.device.memory)}"
    if least.needed - work > least.device.memory:
        return f"{over}: what no size of micro-batches changes exceeds it alone ({parts})"
    return f"{over}: the longest example alone needs {gib(work)} beside {parts}"

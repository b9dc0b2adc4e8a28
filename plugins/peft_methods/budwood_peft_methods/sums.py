"""Weighted sums of adapters of one method, where the sum of their changes is a change of the same method.

With weights wᵢ and changes ΔWᵢ of the base, the sum changes it by Σ wᵢ ΔWᵢ; an adapter that leaves a module out changes
it by 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from budwood import InputError
from budwood_peft_methods.rules import COLUMNS, FACTOR, LINEAR, POSITIONS, ROWS, SAME, Sum
from budwood_peft_methods.saved import PREFIX, Saved, chosen_modules
from budwood_peft_methods.sparse_sums import union

Tensors = dict[str, Tensor]
WHOLE_CAUSE = "different bases, or of tasks with other numbers of classes"
"""Why a module that is saved whole may have different shapes."""


@dataclass(frozen=True)
class Part:
    """An adapter that is summed.

    Attributes:
        shown: its folder, for messages.
        factor: what multiplies its low-rank update beside the weight.
    """

    shown: str
    config: dict[str, Any]
    saved: Saved
    tensors: Tensors
    weight: float
    rank: int
    factor: float = 1.0


def combine(
    strategy: Any, adapters: Sequence[Any], weights: Sequence[float], base: Callable[[], nn.Module]
) -> tuple[dict[str, Any], Tensors]:
    """Return config and tensors of the weighted sum of adapters of one of PEFT's methods; see `combine_adapters`.

    Raises:
        InputError: the adapters do not fit each other; or they hold whole modules, and the weights do not sum to 1.
        CorruptError: a config has an invalid field.
    """
    how: Sum = strategy.SUM
    parts = [_read(strategy, adapter, weight) for adapter, weight in zip(adapters, weights, strict=True)]
    _check_configs(strategy, how, parts)
    paths = _paths(strategy, (key for part in parts for key in part.tensors))
    # Before the tensors, whose shapes follow from it.
    scaled = _feedforward(parts, paths) if any("feedforward_modules" in part.config for part in parts) else None
    tensors: Tensors = {}
    for key in dict.fromkeys(key for part in parts for key in part.tensors):
        rule, having = how.rule(key), [part for part in parts if key in part.tensors]
        if rule is None:
            tensors[key] = _whole(key, parts)
        elif rule != POSITIONS:
            _check_tensor(key, rule, having)
            tensors[key] = _summed(key, rule, having, parts)
    config = dict(parts[0].config)
    config |= {field: None for field in ("exclude_modules", "layers_to_transform", "layers_pattern") if field in config}
    config |= {"target_modules": sorted(paths), "inference_mode": True}
    if POSITIONS in how.rules.values():
        changes, more = union(parts, base)
        config, tensors = config | changes, tensors | more
    elif how.free:
        config |= {"r": sum(part.rank for part in parts)} | {f: {} for f in how.free if f.endswith("_pattern")}
    if scaled is not None:
        config["feedforward_modules"] = scaled
    return config, tensors


def _read(strategy: Any, adapter: Any, weight: float) -> Part:
    saved, config = Saved.read(strategy, adapter.config), dict(adapter.config)
    rank = getattr(saved.options, "rank", None) or 0
    rank = max([rank, *saved.patterns.get("rank_pattern", {}).values()])
    factor = 1.0
    if rank and getattr(saved.options, "alpha", None):
        factor = saved.options.alpha / rank
    elif rank and config.get("peft_type") == "SUPERTUNING":
        factor = 2.0  # PEFT's alpha is 2 × rank unless it is given
    return Part(str(adapter.directory), config, saved, adapter.load_tensors(), weight, rank, factor)


def _check_configs(strategy: Any, how: Sum, parts: Sequence[Part]) -> None:
    """Check that what the tensors mean is the same in all parts.

    Raises:
        InputError: the first field that differs.
    """
    first, options = parts[0], strategy.Options
    for part in parts[1:]:
        for name, field in options.FIELDS.items():
            if name in options.TRAINING or field in how.free:
                continue
            mine, theirs = (getattr(p.saved.options, name) for p in (part, first))
            if mine != theirs:
                raise InputError(
                    f"{part.shown}: its {field} is {mine}, but that of {first.shown} {theirs}: adapters of "
                    f"{strategy.name} with equal ones can be combined."
                )
        for field in {*part.saved.patterns, "modules_to_save", "trainable_token_indices"} - set(how.free):
            if (part.config.get(field) or None) != (first.config.get(field) or None):
                raise InputError(
                    f"{part.shown}: its {field} differs from that of {first.shown}: they cannot be combined."
                )
        if (how.same_targets or getattr(first.saved.options, "proportional", False)) and (
            part.tensors.keys() != first.tensors.keys()
        ):
            raise InputError(
                f"{part.shown}: it adapts other modules than {first.shown}, on all of which the meaning of "
                f"{strategy.name}'s values depends: they cannot be combined."
            )


def _check_tensor(key: str, rule: str, having: Sequence[Part], cause: str = "different bases") -> None:
    """Check that a tensor fits in all parts, after their configs do: what differs then is not of the method."""
    first = having[0]
    for part in having:
        shape, expected = list(part.tensors[key].shape), list(first.tensors[key].shape)
        if not part.tensors[key].is_floating_point():
            raise InputError(f"{part.shown}: its '{key}' is not of a floating-point type, so it has no sum.")
        if rule in (ROWS, COLUMNS):
            axis = 0 if rule == ROWS else 1
            if len(shape) != 2 or len(expected) != 2 or shape[1 - axis] != expected[1 - axis]:
                raise InputError(_misfit(part, first, key, cause))
            if shape[axis] > part.rank:
                raise InputError(f"{part.shown}: its '{key}' has rank {shape[axis]}, but its config {part.rank}.")
        elif shape != expected:
            raise InputError(_misfit(part, first, key, cause))
        if rule == SAME and not part.tensors[key].equal(first.tensors[key]):
            raise InputError(
                f"{part.shown}: its '{key}', which does not train, differs from that of {first.shown}: they are of "
                "different bases, or were started on different machines."
            )


def _misfit(part: Part, first: Part, key: str, cause: str) -> str:
    shapes = list(part.tensors[key].shape), list(first.tensors[key].shape)
    return (
        f"{part.shown}: its '{key}' has the shape {shapes[0]}, but that of {first.shown} {shapes[1]}: they are of "
        f"{cause}."
    )


def _summed(key: str, rule: str, having: Sequence[Part], parts: Sequence[Part]) -> Tensor:
    """Return the sum's tensor in fp32, added in fp64."""
    if rule == SAME:
        return having[0].tensors[key]
    values = [part.tensors[key].double() for part in having]
    if rule == LINEAR:
        return sum((part.weight * t for part, t in zip(having, values, strict=True)), torch.zeros(())).float()
    if rule == FACTOR:
        return sum((part.weight * (t - 1) for part, t in zip(having, values, strict=True)), torch.ones(())).float()
    rank = sum(part.rank for part in parts)
    if rule == ROWS:
        joined = torch.cat(values)
        return torch.cat([joined, joined.new_zeros(rank - len(joined), joined.shape[1])]).float()
    joined = torch.cat([part.weight * part.factor * t for part, t in zip(having, values, strict=True)], 1)
    return torch.cat([joined, joined.new_zeros(len(joined), rank - joined.shape[1])], 1).float()


def _whole(key: str, parts: Sequence[Part]) -> Tensor:
    """Return the weighted mean of a tensor that replaces one of the base's, such as a head's."""
    for part in parts:
        if not (part.config.get("modules_to_save") or part.config.get("trainable_token_indices")):
            raise InputError(
                f"{part.shown if key in part.tensors else parts[0].shown}: it holds '{key}', which is unknown."
            )
        if key not in part.tensors:
            raise InputError(f"{part.shown}: it lacks '{key}', which others have: they cannot be combined.")
    check_mean(key, parts[0].shown, [part.weight for part in parts])
    _check_tensor(key, LINEAR, parts, WHOLE_CAUSE)
    return _summed(key, LINEAR, parts, parts)


def check_mean(key: str, shown: str, weights: Sequence[float]) -> None:
    """Check that weights sum to 1, as those of tensors that replace the base's must.

    Raises:
        InputError: they do not.
    """
    if abs(sum(weights) - 1) > 1e-6:
        raise InputError(
            f"--weights: they sum to {sum(weights):g}, but {shown} replaces '{key}', of which only a mean can be "
            "taken: give weights that sum to 1."
        )


def _paths(strategy: Any, keys: Iterable[str]) -> set[str]:
    """Return the full names of the adapted modules."""
    parts = (key.removeprefix(PREFIX).partition(f".{strategy.type_name()}_") for key in keys if key.startswith(PREFIX))
    return {path for path, found, _ in parts if found}


def _feedforward(parts: Sequence[Part], paths: set[str]) -> list[str]:
    """Return which modules of IA³ scale their inputs, which all parts that adapt one must agree on."""
    field = "feedforward_modules"
    chosen = {part.shown: set(chosen_modules(sorted(paths), part.config.get(field), field)) for part in parts}
    for path in sorted(paths):
        having = [part.shown for part in parts if any(key.startswith(f"{PREFIX}{path}.") for key in part.tensors)]
        inputs = next((shown for shown in having if path in chosen[shown]), "")
        outputs = next((shown for shown in having if path not in chosen[shown]), "")
        if inputs and outputs:
            raise InputError(
                f"{inputs}: it scales the inputs of '{path}' ({field}), but {outputs} its outputs: adapters of ia3 "
                f"with equal {field} can be combined."
            )
    return sorted(path for path in paths if any(path in names for names in chosen.values()))

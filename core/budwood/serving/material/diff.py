"""Compares two adapters by their files alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from budwood.adapters.golden import Distance, Golden
from budwood.adapters.store import GOLDEN, SavedAdapter, read_adapter
from budwood.errors import InputError
from budwood.serving.exports.factors import Factors, check_same_shapes, factors_of, squared_norm

NAN = float("nan")
_RECORDED = ("base", "task", "labels", "tokenizer", "template", "chat", "on_messages", "stop_ids", "metrics")


@dataclass(frozen=True)
class ModuleDifference:
    """The updates of one linear by two adapters.

    Attributes:
        path: of the linear.
        ranks: of both; 0: it does not adapt the linear.
        norms: Frobenius norms of both updates.
        distance: norm of their difference, relative to the larger norm of the two.
        cosine: of the angle between them; NaN if one is 0.
    """

    path: str
    ranks: tuple[int, int]
    norms: tuple[float, float]
    distance: float
    cosine: float


@dataclass(frozen=True)
class Difference:
    """How two adapters differ.

    Attributes:
        same: whether they compute the same: equal types, configs and tensors.
        fields: (name, value of one, value of the other) of what is recorded differently.
        tensors: (name, what differs) of tensors outside the low-rank updates.
        modules: the updates of each linear, the most different first; empty if one is no sum of low-rank updates.
        answers: distance of the second's golden logits from the first's; None unless they are of the same inputs.
        notes: messages for the user.
    """

    same: bool
    fields: list[tuple[str, Any, Any]]
    tensors: list[tuple[str, str]]
    modules: list[ModuleDifference]
    answers: Distance | None
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> ModuleDifference:
        """The updates of all linears together."""
        norms = [math.sqrt(sum(m.norms[i] ** 2 for m in self.modules)) for i in (0, 1)]
        apart = math.sqrt(sum((m.distance * max(m.norms)) ** 2 for m in self.modules))
        product = sum(m.cosine * m.norms[0] * m.norms[1] for m in self.modules if not math.isnan(m.cosine))
        ranks = [sum(m.ranks[i] for m in self.modules) for i in (0, 1)]
        cosine = product / (norms[0] * norms[1]) if all(norms) else NAN
        return ModuleDifference("all", tuple(ranks), tuple(norms), _relative(apart, norms), cosine)  # type: ignore


def diff(one: str | Path, other: str | Path) -> Difference:
    """Compare two adapters: what is recorded, their updates of each linear, their other tensors, their golden logits.

    Loads no base.

    Raises:
        InputError: an adapter cannot be read, or they update one linear in different shapes, as of different bases.
        CorruptError: an adapter is damaged.
    """
    first, second = read_adapter(one), read_adapter(other)
    notes: list[str] = []
    factors = None
    try:
        factors = [factors_of(saved, "a comparison", alone=False) for saved in (first, second)]
    except InputError as error:
        notes.append(f"tensors are compared one by one, since an adapter is no sum of low-rank updates: {error}")
    modules = [] if factors is None else _modules((first, second), *factors)
    tensors = _tensors(first.load_tensors(), second.load_tensors(), factors is not None)
    same = first.identity == second.identity
    return Difference(same, _fields(first, second), tensors, modules, _answers(first, second), notes)


def _modules(adapters: Sequence[SavedAdapter], first: Factors, second: Factors) -> list[ModuleDifference]:
    modules = []
    for path in sorted({*first, *second}):
        ours, theirs = first.get(path), second.get(path)
        pairs = [ours, theirs]
        norms = [math.sqrt(squared_norm(pair)) if pair is not None else 0.0 for pair in pairs]
        ranks = [len(pair[0]) if pair is not None else 0 for pair in pairs]
        product = 0.0
        if ours is not None and theirs is not None:
            check_same_shapes(path, adapters, [ours, theirs])
            (a, b), (c, d) = ours, theirs
            product = float(((b.double().mT @ d.double()) * (a.double() @ c.double().mT)).sum())
        squared = norms[0] ** 2 + norms[1] ** 2 - 2 * product
        apart = math.sqrt(squared) if squared > 1e-14 * (norms[0] ** 2 + norms[1] ** 2) else 0.0  # rounding below it
        cosine = product / (norms[0] * norms[1]) if all(norms) else NAN
        modules.append(
            ModuleDifference(path, (ranks[0], ranks[1]), (norms[0], norms[1]), _relative(apart, norms), cosine)
        )
    return sorted(modules, key=lambda module: -module.distance)


def _relative(apart: float, norms: list[float]) -> float:
    return apart / max(norms) if max(norms) > 0 else 0.0


def _tensors(first: Mapping[str, Tensor], second: Mapping[str, Tensor], low_rank: bool) -> list[tuple[str, str]]:
    found = []
    for name in sorted({*first, *second}):
        if low_rank and ".lora_" in name and "embedding" not in name:
            continue
        if name not in second or name not in first:
            found.append((name, f"only in the {'first' if name in first else 'second'}"))
        elif first[name].shape != second[name].shape:
            found.append((name, f"{list(first[name].shape)} and {list(second[name].shape)}"))
        elif not torch.equal(first[name], second[name]):
            apart = float((first[name].double() - second[name].double()).abs().max())
            found.append((name, f"differ by up to {apart:.3g}"))
    return found


def _fields(first: SavedAdapter, second: SavedAdapter) -> list[tuple[str, Any, Any]]:
    """Return what config and manifest say differently."""
    found: list[tuple[str, Any, Any]] = [("adapter type", first.adapter_type, second.adapter_type)]
    keys = sorted({*first.config, *second.config})
    found += [(f"config.{key}", _plain(first.config.get(key)), _plain(second.config.get(key))) for key in keys]
    records = [_recorded(saved) for saved in (first, second)]
    found += [(name, records[0].get(name), records[1].get(name)) for name in dict.fromkeys([*records[0], *records[1]])]
    return [(name, one, other) for name, one, other in found if one != other]


def _recorded(saved: SavedAdapter) -> dict[str, Any]:
    """Return what the manifest says, with the fields of a field as separate ones."""
    values = saved.manifest.model_dump() if saved.manifest is not None else {}
    found: dict[str, Any] = {}
    for name in _RECORDED:
        value = values.get(name)
        found |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return found


def _plain(value: Any) -> Any:
    """Return a list whose order means nothing in PEFT's config as a sorted one."""
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


def _answers(first: SavedAdapter, second: SavedAdapter) -> Distance | None:
    if any(saved.manifest is None or saved.manifest.golden is None for saved in (first, second)):
        return None
    one, other = (Golden.load(saved.directory / GOLDEN) for saved in (first, second))
    inputs = [[{k: v.tolist() for k, v in probe.inputs.items()} for probe in golden.probes] for golden in (one, other)]
    if inputs[0] != inputs[1] or one.adapter.shape != other.adapter.shape:
        return None
    return Distance.between(one.adapter, other.adapter)

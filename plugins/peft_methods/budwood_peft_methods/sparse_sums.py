"""Sums of SHiRA's and Super-Tuning's adapters: the union of their positions, of the size that PEFT's config allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from budwood import InputError, linear_shape
from budwood_peft_methods.saved import PREFIX

if TYPE_CHECKING:
    from budwood_peft_methods.sums import Part

VALUES = {"SHIRA": ("shira_weight", "shira_indices"), "SUPERTUNING": ("supertuning_values", "supertuning_indices")}
"""The names of values and positions in PEFT's files; SHiRA's positions are rows and columns, the others' are flat."""


def union(parts: Sequence[Part], base: Callable[[], nn.Module]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return fields of PEFT's config, and the sum's values and positions, by key.

    The number of positions follows from the config (`r`, `sparsity`), for each module; where the union has fewer,
    unused positions with the value 0 fill it up.

    Raises:
        InputError: values and positions of a file do not fit each other or the base; or there are too many.
    """
    kind = str(parts[0].config["peft_type"])
    values, indices = VALUES[kind]
    paths = sorted({_path(key, values) for part in parts for key in part.tensors if f".{values}" in key})
    model = base()
    shapes = {path: linear_shape(model.get_submodule(path)) for path in paths}
    joined: dict[str, tuple[Tensor, Tensor]] = {}
    for path in paths:
        flat, added = [], []
        for part in parts:
            names = [_key(part, path, name) for name in (values, indices)]
            if all(name in part.tensors for name in names):
                value, index = (part.tensors[name] for name in names)
                flat.append(_flat(part, path, value, index, shapes[path]))
                added.append(part.weight * value.double())
        positions, where = torch.cat(flat).unique(return_inverse=True)
        joined[path] = positions, torch.zeros(len(positions), dtype=torch.double).index_add(0, where, torch.cat(added))
    config, sizes = _size(kind, parts, shapes, {path: len(positions) for path, (positions, _) in joined.items()})
    tensors = {}
    for path, (positions, added) in joined.items():
        filled = _filled(positions, sizes[path], math.prod(shapes[path]))
        value = torch.cat([added, added.new_zeros(sizes[path] - len(added))]).float()
        index = filled if kind == "SUPERTUNING" else torch.stack([filled // shapes[path][1], filled % shapes[path][1]])
        tensors[f"{PREFIX}{path}.{values}"] = value
        tensors[f"{PREFIX}{path}.{indices}"] = index.to(torch.int32)
    return config, tensors


def _key(part: Part, path: str, name: str) -> str:
    return f"{PREFIX}{path}.{name}"


def _path(key: str, name: str) -> str:
    return key.removeprefix(PREFIX).rpartition(f".{name}")[0]


def _flat(part: Part, path: str, value: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return positions as numbers below out × in."""
    fits = value.ndim == 1 and not index.is_floating_point() and index.shape[-1:] == value.shape
    if fits and index.ndim == 2 and len(index) == 2:
        rows, columns = index.long()
        fits = bool(((rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])).all())
        index = rows * shape[1] + columns
    elif fits:
        fits = index.ndim == 1 and bool(((index >= 0) & (index < math.prod(shape))).all())
    if not fits:
        raise InputError(f"{part.shown}: its positions and values of '{path}' do not fit each other or the base.")
    return index.long()


def _size(
    kind: str, parts: Sequence[Part], shapes: dict[str, tuple[int, int]], counts: dict[str, int]
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return fields of PEFT's config that allow at least `counts` positions, and how many each module then has."""
    if kind == "SHIRA":
        rank = max(math.ceil(counts[path] / sum(shape)) for path, shape in shapes.items())
        sizes = {path: rank * sum(shape) for path, shape in shapes.items()}
        full = next((path for path, shape in shapes.items() if sizes[path] > math.prod(shape)), None)
        if full is not None:
            raise InputError(f"the adapters have more positions in '{full}' together than a SHiRA can hold.")
        return {"r": rank}, sizes
    elements = {path: math.prod(shape) for path, shape in shapes.items()}
    same = next((part.config["sparsity"] for part in parts if _counts(part, elements) == counts), None)
    share = max(counts[path] / elements[path] for path in shapes)
    sparsity = same
    while sparsity is None or any(_kept(elements[path], sparsity) < counts[path] for path in shapes):
        share, sparsity = min(share + 0.5 / max(elements.values()), 1.0), max(1 - share, 0.0)
    config: dict[str, Any] = {"sparsity": sparsity}
    rank = sum(part.rank for part in parts)
    if rank:
        config |= {"r": rank, "lora_alpha": float(rank)}
    return config, {path: _kept(elements[path], sparsity) for path in shapes}


def _counts(part: Part, elements: dict[str, int]) -> dict[str, int]:
    sparsity = part.config.get("sparsity", 0.99)
    return {path: _kept(size, sparsity) for path, size in elements.items()}


def _kept(elements: int, sparsity: float) -> int:
    return int(elements * (1 - sparsity))  # as PEFT counts


def _filled(positions: Tensor, size: int, elements: int) -> Tensor:
    """Return the positions, and the first unused ones after them, `size` in all."""
    room = size - len(positions)
    used = torch.zeros(elements, dtype=torch.bool)
    used[positions] = True
    return torch.cat([positions, (~used).nonzero().flatten()[:room]])

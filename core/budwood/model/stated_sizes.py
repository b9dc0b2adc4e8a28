"""Compares the sizes of a checkpoint's tensors with those of its config.json and each other, by the files' headers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from budwood.errors import CorruptError, plural
from budwood.untrusted.formats import TensorInfo

if TYPE_CHECKING:
    from torch import nn

_EXPERT = re.compile(r"(.*?\.\d+\.).*\bexperts\.(?:(\d+)\.)?")
"""Start of the name of a tensor of experts: its layer, and the number of the one expert that it is of."""
ONE_EXPERT = re.compile(r"(.*\bexperts)\.(\d{1,9})\.(.+)")
"""Name of a tensor of one expert: where the layer's experts are, its number, and its own name."""


def check_sizes(name: str, frame: nn.Module, tensors: Mapping[str, TensorInfo], body: str) -> None:
    """Refuse an unquantised checkpoint whose tensors are larger or smaller than config.json says, by its headers.

    What is stored under another name than the model's, or in another order of axes, is only seen as it loads.

    Args:
        frame: the base without weights.
        body: only what lies below it is compared; "" for all.

    Raises:
        CorruptError: the message names the first tensors.
    """
    counts: dict[str, set[str]] = {}
    stored: Counter[str] = Counter()
    for key, tensor in tensors.items():
        if (found := _EXPERT.match(key)) is not None and found[2] is not None:
            counts.setdefault(found[1], set()).add(found[2])
            stored[found[1]] += math.prod(tensor.shape)
    wrong: list[str] = []
    stated: Counter[str] = Counter()
    fused: dict[str, dict[str, int]] = {}
    for key, parameter in frame.named_parameters():
        entry = tensors.get(key) or tensors.get(key.removesuffix(".weight"))  # experts have no module there
        if entry is not None and math.prod(entry.shape) != parameter.numel():
            wrong.append(key)
        elif (found := _EXPERT.match(key)) is not None and entry is None:
            stated[found[1]] += parameter.numel()
            if parameter.ndim == 3:
                fused.setdefault(found[1], {})[key] = len(parameter)
    for layer, sizes in fused.items():
        count = len(counts.get(layer, ()))
        others = count and count not in sizes.values()  # some experts have no weights (LongCat)
        if others or set(sizes.values()) == {count} and stored[layer] != stated[layer]:
            wrong += sizes
    wrong = [key for key in wrong if key.startswith(body)]
    if wrong:
        raise CorruptError(wrong_shapes(name, wrong))


def check_experts(frame: nn.Module, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse a checkpoint in which one expert lacks a tensor that others of its layer have, or has it in another shape.

    Args:
        frame: the base without weights.

    Raises:
        CorruptError: the message names file and tensor.
    """
    stated = {len(p) for key, p in frame.named_parameters() if p.ndim == 3 and _EXPERT.match(key)}
    layers: dict[str, dict[str, dict[int, TensorInfo]]] = {}
    for key, tensor in tensors.items():
        if (found := ONE_EXPERT.fullmatch(key)) is not None:
            layers.setdefault(found[1], {}).setdefault(found[3], {})[int(found[2])] = tensor
    for path, names in layers.items():
        most = max(map(len, names.values()))
        for name, experts in names.items():
            missing = next((number for number in range(len(experts)) if number not in experts), len(experts))
            complete = len(experts) in {most, *stated}  # some experts have fewer tensors (LongCat)
            if not complete or missing < len(experts):
                file = next(iter(experts.values())).file
                raise CorruptError(
                    f"{file}: the tensor '{path}.{missing}.{name}' is missing, which other experts of its layer have: "
                    "take complete files."
                )
            usual = Counter(tensor.shape for tensor in experts.values()).most_common(1)[0][0]
            for number, tensor in experts.items() if len(usual) > 1 else ():
                if tensor.shape != usual:
                    raise CorruptError(
                        f"{tensor.file}: the tensor '{path}.{number}.{name}' has the shape {tensor.shape}, and other "
                        f"experts of its layer have {usual}: take the files that belong together."
                    )


def wrong_shapes(name: str, keys: Sequence[str]) -> str:
    """Return a message on weights that contradict config.json."""
    some = f"{', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
    return (
        f"base '{name}': {plural(len(keys), 'weight')} in another shape than config.json gives: {some}: take the "
        "config.json that was saved with these weights."
    )

"""Compares the sizes of a checkpoint's tensors with those that its config.json states, by the files' headers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from budwood.errors import CorruptError, plural
from budwood.untrusted.formats import TensorInfo

if TYPE_CHECKING:
    from torch import nn

_EXPERT = re.compile(r"(.*?\.\d+\.).*\bexperts\.(?:(\d+)\.)?")
"""Start of the name of a tensor of experts: its layer, and the number of the one expert that it is of."""


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
    for key in tensors:
        if (found := _EXPERT.match(key)) is not None and found[2] is not None:
            counts.setdefault(found[1], set()).add(found[2])
    wrong: list[str] = []
    fused: dict[str, dict[str, int]] = {}
    for key, parameter in frame.named_parameters():
        if key in tensors and math.prod(tensors[key].shape) != parameter.numel():
            wrong.append(key)
        elif (found := _EXPERT.match(key)) is not None and parameter.ndim == 3:
            fused.setdefault(found[1], {})[key] = len(parameter)
    for layer, sizes in fused.items():
        if layer in counts and len(counts[layer]) not in sizes.values():  # some experts have no weights (LongCat)
            wrong += sizes
    wrong = [key for key in wrong if key.startswith(body)]
    if wrong:
        raise CorruptError(wrong_shapes(name, wrong))


def wrong_shapes(name: str, keys: Sequence[str]) -> str:
    """Return a message on weights that contradict config.json."""
    some = f"{', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
    return (
        f"base '{name}': {plural(len(keys), 'weight')} in another shape than config.json gives: {some}: take the "
        "config.json that was saved with these weights."
    )

"""Check before the first step that a strategy's state survives a checkpoint unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pack_array(array: np.ndarray, place: str) -> Tensor:
    """Copy an array into a tensor that a checkpoint can hold.

    Raises:
        TypeError: torch does not support its dtype or byte order; the message names its place.
    """
    try:
        tensor = torch.from_numpy(array.copy())
    except (TypeError, ValueError):
        tensor = None
    if tensor is None or tensor.dtype is torch.complex128:
        raise TypeError(f"{place}: an array of {array.dtype} cannot be saved")
    return tensor


def check_same(state: Any, restored: Any, place: str) -> None:
    """Check that a restored state has the original's keys, types, shapes and plain values.

    Raises:
        TypeError: it differs; the message names the place.
    """
    state = state.item() if isinstance(state, np.generic) else state
    if isinstance(state, Tensor | np.ndarray):
        cls: type = Tensor if isinstance(state, Tensor) else np.ndarray
        same = isinstance(restored, cls) and (restored.dtype, restored.shape) == (state.dtype, state.shape)  # type: ignore[attr-defined]
    elif isinstance(state, Mapping):
        same = isinstance(restored, dict) and [(type(k), k) for k in state] == [(type(k), k) for k in restored]
    elif isinstance(state, list | tuple):
        same = type(state) is type(restored) and len(state) == len(restored)
    else:
        same = type(state) is type(restored) and (state == restored or state != state)
    if not same:
        raise TypeError(
            f"{place}: a {type(state).__name__} comes back from a checkpoint as a {type(restored).__name__}, or with "
            "other keys or values; use tensors, arrays and JSON values, with strings as keys"
        )
    inner = state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, list | tuple) else ()
    for key, item in inner:
        check_same(item, restored[key], f"{place}/{key}")

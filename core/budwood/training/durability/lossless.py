"""What a checkpoint takes of a strategy's state comes back as it was, or is refused before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pack_array(array: np.ndarray, place: str) -> Tensor:
    """Copy an array into a tensor that a checkpoint can hold.

    Raises:
        TypeError: its dtype or byte order is none of torch's; the message names its place.
    """
    try:
        tensor = torch.from_numpy(array.copy())
    except (TypeError, ValueError):
        tensor = None
    if tensor is None or tensor.dtype is torch.complex128:
        raise TypeError(f"{place}: an array of {array.dtype} cannot be saved")
    return tensor


def check_same(given: Any, back: Any, place: str) -> None:
    """Check that a state came back with the keys, types, shapes and plain values that it was given with.

    Raises:
        TypeError: it did not; the message names the place.
    """
    given = given.item() if isinstance(given, np.generic) else given
    if isinstance(given, Tensor | np.ndarray):
        kind: type = Tensor if isinstance(given, Tensor) else np.ndarray
        same = isinstance(back, kind) and (back.dtype, back.shape) == (given.dtype, given.shape)  # type: ignore[attr-defined]
    elif isinstance(given, Mapping):
        same = isinstance(back, dict) and [(type(k), k) for k in given] == [(type(k), k) for k in back]
    elif isinstance(given, list | tuple):
        same = type(given) is type(back) and len(given) == len(back)
    else:
        same = type(given) is type(back) and (given == back or given != given)
    if not same:
        raise TypeError(
            f"{place}: a {type(given).__name__} comes back from a checkpoint as a {type(back).__name__}, or with other "
            "keys or values; give tensors, arrays and JSON values, with text as keys"
        )
    inner = given.items() if isinstance(given, Mapping) else enumerate(given) if isinstance(given, list | tuple) else ()
    for key, item in inner:
        check_same(item, back[key], f"{place}/{key}")

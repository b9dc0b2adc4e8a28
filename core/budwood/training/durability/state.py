"""Convert a checkpoint's state to plain JSON and tensors, without pickle; save the random states of all processes."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from budwood.contract.types import Run
from budwood.training.durability.lossless import pack_array


def pack(value: Any, tensors: dict[str, Tensor], place: str = "", copy: bool = True) -> Any:
    """Convert nested values to plain JSON; tensors are copied to the CPU into `tensors`, keyed by their place.

    Tuples, arrays, non-string keys and non-finite numbers are marked, so that `unpack` restores them exactly.

    Raises:
        TypeError: a value has an unsupported type; the message names its place.
    """
    if isinstance(value, Tensor | np.ndarray) and place in tensors:
        place = f"{place}#{len(tensors)}"  # places may collide if keys contain slashes
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.dtype is torch.complex128:
            raise TypeError(f"{place}: a tensor of {value.layout} and {value.dtype} cannot be saved")
        tensors[place] = (value.detach().to("cpu", copy=True) if copy else value).contiguous()
        return {"$tensor": place}
    if isinstance(value, np.ndarray):
        tensors[place] = pack_array(value, place)
        return {"$array": place}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, Mapping):
        others = (k for k in value if not isinstance(k, str | int | None))
        unsupported = next((k for k in others if not isinstance(k, float) or not math.isfinite(k)), None)
        if unsupported is not None:
            raise TypeError(f"{place}: the key {unsupported!r} cannot be saved; use strings or numbers as keys")
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        packed = {key: pack(item, tensors, f"{place}/{key}".lstrip("/"), copy) for key, item in value.items()}
        return packed if plain else {"$items": [[key, item] for key, item in packed.items()]}
    if isinstance(value, list | tuple):
        items = [pack(item, tensors, f"{place}/{i}", copy) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    raise TypeError(f"{place}: a {type(value).__name__} cannot be saved; use tensors and JSON values")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `pack`."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((mark, inner),) = value.items()
        if mark == "$tensor":
            return tensors[inner]
        if mark == "$array":
            return tensors[inner].numpy()
        if mark == "$float":
            return float(inner)
        if mark == "$tuple":
            return tuple(unpack(item, tensors) for item in inner)
        if mark == "$items":
            return {key: unpack(item, tensors) for key, item in inner}
    return {key: unpack(item, tensors) for key, item in value.items()}


def _random_state(run: Run) -> Tensor:
    """Return Python's, NumPy's and torch's random states as a vector [n] float64, which represents them exactly."""
    version, internal, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    _, keys, position, has_gauss, cached = legacy
    parts = [
        torch.tensor([version, *internal, math.nan if gauss is None else gauss], dtype=torch.float64),
        torch.tensor([*keys.tolist(), position, has_gauss, cached], dtype=torch.float64),
        torch.get_rng_state().double(),
    ]
    if run.device.type == "cuda":
        parts.append(torch.cuda.get_rng_state(run.device).double())
    return torch.cat(parts)


def all_random_states(run: Run) -> Tensor:
    """Return the random states of all processes, [processes, n] float64."""
    own = _random_state(run)
    return torch.stack(run.world.gather(own))


def set_random_state(run: Run, states: Tensor) -> None:
    """Restore this process's random states; a process without saved states is seeded anew."""
    if run.process_index >= len(states):
        torch.manual_seed(run.seed + run.process_index + run.step)
        return
    sizes = [627, 627, len(torch.get_rng_state())]
    python, numpy, cpu, cuda = states[run.process_index].split([*sizes, states.shape[1] - sum(sizes)])
    version, *internal, gauss = python.tolist()
    random.setstate((int(version), tuple(map(int, internal)), None if math.isnan(gauss) else gauss))
    *keys, position, has_gauss, cached = numpy.tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(cpu.to(torch.uint8))
    if run.device.type == "cuda" and len(cuda):
        torch.cuda.set_rng_state(cuda.to(torch.uint8), run.device)

"""A checkpoint's state as plain JSON and tensors, without pickle; and the random states of every process."""

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
    """Turn nested values into plain JSON; tensors are copied to the CPU, into `tensors`, under their place.

    Tuples, arrays, keys that are no text, and numbers that are not finite are marked, so that `unpack` gives the same.

    Raises:
        TypeError: a value is none of these; the message names its place.
    """
    if isinstance(value, Tensor | np.ndarray) and place in tensors:
        place = f"{place}#{len(tensors)}"  # keys that hold slashes may meet
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
        numbers = (k for k in value if not isinstance(k, str | int | None))
        wrong = next((k for k in numbers if not isinstance(k, float) or not math.isfinite(k)), None)
        if wrong is not None:
            raise TypeError(f"{place}: the key {wrong!r} cannot be saved; give text or numbers as keys")
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        packed = {key: pack(item, tensors, f"{place}/{key}".lstrip("/"), copy) for key, item in value.items()}
        return packed if plain else {"$items": [[key, item] for key, item in packed.items()]}
    if isinstance(value, list | tuple):
        items = [pack(item, tensors, f"{place}/{i}", copy) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    raise TypeError(f"{place}: a {type(value).__name__} cannot be saved; give tensors and JSON values")


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
    """Python's, NumPy's and torch's random states as one vector [n] float64, which holds all their integers exactly."""
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
    """The random states of every process, [processes, n] float64."""
    own = _random_state(run)
    if run.processes == 1:
        return own[None]
    everyone = [torch.empty_like(own, device=run.device) for _ in range(run.processes)]
    torch.distributed.all_gather(everyone, own.to(run.device))
    return torch.stack(everyone).cpu()


def set_random_state(run: Run, everyone: Tensor) -> None:
    """Put this process's random states back; one that had none starts a stream of its own."""
    if run.process_index >= len(everyone):
        torch.manual_seed(run.seed + run.process_index + run.step)
        return
    sizes = [627, 627, len(torch.get_rng_state())]
    python, numpy, cpu, cuda = everyone[run.process_index].split([*sizes, everyone.shape[1] - sum(sizes)])
    version, *internal, gauss = python.tolist()
    random.setstate((int(version), tuple(map(int, internal)), None if math.isnan(gauss) else gauss))
    *keys, position, has_gauss, cached = numpy.tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(cpu.to(torch.uint8))
    if run.device.type == "cuda" and len(cuda):
        torch.cuda.set_rng_state(cuda.to(torch.uint8), run.device)

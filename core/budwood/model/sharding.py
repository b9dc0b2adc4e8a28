"""Shards a base's layers over processes while it is read, so that each process holds its share alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from budwood.errors import InputError
from budwood.model.checks import find_quantizer
from budwood.model.experts import RoutedExperts
from budwood.model.heads import body_of
from budwood.model.recompute import layers_of
from budwood.parallel.processes import Processes
from budwood.parallel.sharding import Shards

if TYPE_CHECKING:
    import torch
    from torch import nn

INSTEAD = "use train.parallel: replicate"
_ASYNC = "HF_DEACTIVATE_ASYNC_LOAD"


def check_shards(name: str, frame: nn.Module, quantization: str) -> None:
    """Refuse a base whose layers cannot be sharded.

    Args:
        frame: the base without weights.

    Raises:
        InputError: the message names the reason.
    """
    quantizer = find_quantizer(quantization)
    if not quantizer.shards:
        raise InputError(f"train.parallel: weights in {quantization} cannot be sharded: {INSTEAD}, nf4, fp4 or none.")
    if any(isinstance(module, RoutedExperts) for module in frame.modules()):
        raise InputError(f"train.parallel: '{name}' is a mixture, whose experts cannot be sharded: {INSTEAD}.")
    if not layers_of(body_of(frame)):
        raise InputError(f"train.parallel: model class {type(frame).__name__} names no layers to shard: {INSTEAD}.")


def shards_of(name: str, frame: nn.Module, quantization: str, world: Processes, device: torch.device) -> Shards:
    """Return what shards a base as it is read; see `check_shards`."""
    check_shards(name, frame, quantization)
    quantizer = find_quantizer(quantization)

    def prepare(module: nn.Module) -> None:
        if quantizer.is_linear(module):
            quantizer.shard(module)

    return Shards(world, device, prepare)


@contextmanager
def sharded_as_read(frame: Any, shards: Shards | None) -> Iterator[None]:
    """Let `shards` know the layers of a model of `frame`'s class once it exists, and read one tensor after another."""
    if shards is None:
        yield
        return
    cls: Any = type(frame)
    load, threads = cls._load_pretrained_model, os.environ.get(_ASYNC)

    def watched(model: Any, *args: Any, **options: Any) -> Any:
        shards.watch(layers_of(body_of(model)))
        return load(model, *args, **options)

    cls._load_pretrained_model = staticmethod(watched)
    os.environ[_ASYNC] = "1"
    try:
        yield
    finally:
        del cls._load_pretrained_model
        os.environ.pop(_ASYNC)
        if threads is not None:
            os.environ[_ASYNC] = threads

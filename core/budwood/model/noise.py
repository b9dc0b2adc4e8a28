"""Noise on the output of a model's input embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from budwood.errors import InputError

NORMS = 8192
"""Embeddings whose norms are computed at a time."""


@contextmanager
def added_noise(model: nn.Module, embeddings: nn.Module, noise: Tensor) -> Iterator[None]:
    """Add `noise` to the output of `embeddings` inside the context.

    Raises:
        InputError: the model did not call that module, so the noise had no effect.
    """
    called = []

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        called.append(True)
        return output + noise.to(output.dtype)

    handle = embeddings.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
    if not called:
        raise InputError(f"{type(model).__name__} does not call its input embeddings: noise cannot be added.")


@torch.no_grad()
def table_norms(table: Any) -> Tensor:
    """Return norms [n] fp32 of what a table returns for each of its rows: some models multiply them."""
    ids = torch.arange(len(table.weight), device=table.weight.device)[None]
    return torch.cat([table(part).float().norm(dim=-1)[0] for part in ids.split(NORMS, dim=1)])

"""Stochastic rounding to 16 bits, which preserves updates below the dtype's resolution on average."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def round_stochastically(values: Tensor, target: torch.dtype, name: str) -> Tensor:
    """Round each value to one of its two neighbours in a 16-bit dtype, so that the expectation is the value.

    The probability of the farther neighbour is the value's distance from the nearer one, relative to the distance
    between the two (Gupta et al., 2015). Values that the dtype represents stay; equal names give equal results.

    Args:
        values: fp32, of any shape; finite.
        target: bfloat16 or float16.
        name: seeds the draw.

    Returns:
        The rounded values, of the shape and dtype of `values`.
    """
    near = values.to(target)
    nearest = near.to(values.dtype)
    # Read as integers, neighbours of one sign are consecutive and ordered by magnitude.
    grows = values.abs() > nearest.abs()
    other = (near.view(torch.int16) + torch.where(grows, 1, -1).to(torch.int16)).view(target).to(values.dtype)
    share = (values - nearest).abs() / (other - nearest).abs()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    draw = torch.rand(values.shape, generator=generator).to(values.device)
    return torch.where((values != nearest) & (draw < share), other, nearest)

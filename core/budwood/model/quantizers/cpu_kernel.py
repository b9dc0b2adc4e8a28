"""CPU kernels for bitsandbytes' 4-bit quantisation: the same bits in a quarter of the time, and right for any shape.

bitsandbytes quantises on the CPU by tensor operations on the complete weight. The slowest is a binary search on one
core, and their intermediate results take several times the weight's memory. Here a few thousand values at a time are
compared with each bound, so everything stays in the cache.

bitsandbytes 0.50 dequantises row by row on the CPU, with the scales of whole blocks: rows that are not a multiple of a
block get the scales of others, without an error. Such a weight is dequantised here as one row.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

OPERATION, INVERSE = "bitsandbytes::quantize_4bit", "bitsandbytes::dequantize_4bit"
CHUNK = 1 << 15
"""Values per chunk: torch runs an operation on so few in the calling thread. A multiple of every block size."""
TINY = 1e-38
"""Smallest divisor, for blocks of zeros."""


@cache
def install() -> None:
    """Register the kernels with torch."""
    import bitsandbytes  # defines the operations

    _install_inverse()
    _install_quantize(bitsandbytes)


def _install_inverse() -> None:
    original = torch.library.get_kernel(INVERSE, "CPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def dequantize(
        codes: Tensor, scales: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        given = [math.prod(shape)] if shape[-1] % blocksize else list(shape)
        result: Tensor = original.call_boxed(keys, codes, scales, blocksize, quant_type, given, dtype)
        return result.view(tuple(shape))

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel.*")
        library.impl("dequantize_4bit", dequantize, "CPU", allow_override=True)
    _LIBRARIES.append(library)


def _install_quantize(bitsandbytes: Any) -> None:
    """Register `quantize`, unless bitsandbytes has a CPU kernel of its own, or other bits on a sample."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(OPERATION, "CPU"):
        return
    original = torch.ops.bitsandbytes.quantize_4bit.default
    for kind in ("nf4", "fp4"):
        code = bitsandbytes.functional.get_4bit_type(kind, device="cpu")
        values = torch.cat([code, _bounds(kind)[0], torch.randn(1001, generator=torch.Generator().manual_seed(0))])
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            sample = values.to(dtype)
            expected, actual = (f(sample, 64, kind, torch.uint8) for f in (original, quantize))
            if not all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True)):
                return
    library = torch.library.Library("bitsandbytes", "IMPL")
    library.impl("quantize_4bit", quantize, "CPU")
    _LIBRARIES.append(library)


_LIBRARIES: list[Any] = []
"""torch removes the kernels of a library that is garbage-collected."""


@torch.no_grad()
def quantize(weight: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a weight's 4-bit codes and the scales of its blocks.

    Args:
        weight: any shape, contiguous or not, fp32, bf16 or fp16; n elements.
        blocksize: elements that share a scale, a power of two; the last block may be shorter.
        quant_type: nf4 or fp4.

    Returns:
        The codes, two per byte, [n / 2, 1] uint8 viewed as `quant_storage`; [ceil(n / blocksize)] fp32, the largest
        absolute value of each block.
    """
    flat = weight.reshape(-1)
    blocks, rest = divmod(len(flat), blocksize)
    full = blocks * blocksize
    packed = torch.empty((len(flat) + 1) // 2, dtype=torch.uint8)
    scales = torch.empty(blocks + (rest > 0), dtype=torch.float32)
    job = partial(_quantize_blocks, flat, packed, scales, blocksize, quant_type)
    threads = min(torch.get_num_threads(), full // CHUNK)
    if threads > 1:
        share = -(-full // (threads * CHUNK)) * CHUNK
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda start: job(start, min(start + share, full)), range(0, full, share)))
    else:
        job(0, full)
    if rest:
        tail = flat[full:].float()
        largest = tail.abs().max().clamp(min=TINY)
        scales[-1] = largest
        codes = torch.nn.functional.pad((tail / largest).clamp_(-1, 1), (0, rest % 2))
        packed[full // 2 :] = _pack(_encode(codes, quant_type))
    if quant_storage != torch.uint8:
        packed = packed.view(quant_storage)
    return packed[:, None], scales


def _quantize_blocks(
    flat: Tensor, packed: Tensor, scales: Tensor, blocksize: int, quant_type: str, start: int, stop: int
) -> None:
    """Quantise the elements from `start` to `stop`, which are complete blocks, into `packed` and `scales`."""
    scaled, scratch = torch.empty(CHUNK), torch.empty(CHUNK)
    for first in range(start, stop, CHUNK):
        last = min(first + CHUNK, stop)
        values, absolute = (buffer[: last - first].view(-1, blocksize) for buffer in (scaled, scratch))
        values.view(-1).copy_(flat[first:last])
        torch.abs(values, out=absolute)
        largest = scales[first // blocksize : last // blocksize]
        torch.amax(absolute, -1, out=largest)
        values.mul_((1.0 / largest.clamp(min=TINY))[:, None]).clamp_(-1, 1)
        packed[first // 2 : last // 2] = _pack(_encode(values.view(-1), quant_type))


def _encode(values: Tensor, quant_type: str) -> Tensor:
    """Return the code, uint8, of the level nearest to each value in [-1, 1].

    It is the number of bounds below the value, or the entry of that number in the order of the levels.
    """
    bounds, order = _bounds(quant_type)
    codes = torch.gt(values, float(bounds[0])).view(torch.uint8)
    above = torch.empty(len(values), dtype=torch.bool)
    for bound in bounds[1:].tolist():
        torch.gt(values, bound, out=above)
        codes.add_(above.view(torch.uint8))
    return codes if order is None else order[codes.int()]


def _pack(codes: Tensor) -> Tensor:
    return (codes[::2] << 4) | codes[1::2]


@cache
def _bounds(quant_type: str) -> tuple[Tensor, Tensor | None]:
    """Return the bounds between neighbouring levels, and the code of each level; None: codes are in order."""
    import bitsandbytes

    levels, order = torch.sort(bitsandbytes.functional.get_4bit_type(quant_type, device="cpu"))
    in_order = bool((order[1:] > order[:-1]).all())
    return (levels[:-1] + levels[1:]) / 2, None if in_order else order.to(torch.uint8)

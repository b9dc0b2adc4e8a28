"""The CPU kernel of 4-bit quantisation gives the bits of bitsandbytes' own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from budwood.model.quantizers import cpu_kernel
from budwood.model.quantizers.cpu_kernel import CHUNK, quantize

bnb = pytest.importorskip("bitsandbytes")


def expected(weight: torch.Tensor, blocksize: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales by the definition: the nearest level, the lower one at the midpoint."""
    code = bnb.functional.get_4bit_type(kind, device="cpu")
    levels, order = code.sort()
    midpoints = (levels[:-1] + levels[1:]) / 2
    flat = weight.reshape(-1).float()
    codes, scales = [], []
    for block in flat.split(blocksize):
        scale = block.abs().max()
        complete = len(block) == blocksize
        scales.append(scale if complete else scale.clamp(min=1e-38))
        divided = block * (1.0 / scale.clamp(min=1e-38)) if complete else block / scale.clamp(min=1e-38)
        codes.append(order[torch.bucketize(divided.clamp(-1, 1), midpoints)].to(torch.uint8))
    joined = torch.cat(codes)
    if len(joined) % 2:
        zero = order[torch.bucketize(torch.zeros(1), midpoints)].to(torch.uint8)
        joined = torch.cat([joined, zero])
    return (joined[::2] << 4 | joined[1::2])[:, None], torch.stack(scales)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 32), (5, 13), (7, 100), (3 * CHUNK // 64 + 5, 64)], ids=str)
def test_codes_and_scales_follow_the_definition(threads: int, kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(shape).mul(0.02).to(dtype)
        weight[0] = 0  # blocks of zeros
        weight[1, :2] = torch.tensor([1e-30, -1e-30])
        for result, due in zip(quantize(weight, 64, kind, torch.uint8), expected(weight, 64, kind), strict=True):
            assert torch.equal(result, due)


def test_midpoints_transposed_weights_and_storage() -> None:
    code = bnb.functional.get_4bit_type("nf4", device="cpu")
    midpoints = torch.cat([code, (code[:-1] + code[1:]) / 2, torch.ones(1)])
    for result, due in zip(quantize(midpoints, 32, "nf4", torch.uint8), expected(midpoints, 32, "nf4"), strict=True):
        assert torch.equal(result, due)
    wide = torch.randn(128, 64, requires_grad=True)
    codes = quantize(wide.t(), 64, "nf4", torch.uint8)[0]
    assert torch.equal(codes, quantize(wide.t().contiguous(), 64, "nf4", torch.uint8)[0])
    assert not codes.requires_grad
    stored = quantize(wide.t(), 64, "nf4", torch.bfloat16)[0]
    assert stored.shape == (128 * 64 // 4, 1)
    assert torch.equal(stored.view(torch.uint8).flatten(), codes.flatten())


def test_bitsandbytes_uses_it_as_it_has_the_same_bits() -> None:
    cpu_kernel.install()  # compares the bits of a sample first
    assert torch._C._dispatch_has_kernel_for_dispatch_key(cpu_kernel.OPERATION, "CPU")
    weight = torch.randn(700, 128)
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="fp4")
    due, scales = expected(weight, 64, "fp4")
    assert torch.equal(codes, due)
    assert torch.equal(state.absmax, scales)


def test_it_is_not_used_if_bitsandbytes_computes_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(weight: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = quantize(weight, *rest)
        return codes, scales * (1 + 1e-6)

    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    monkeypatch.setattr(cpu_kernel, "quantize", other)
    before = list(cpu_kernel._LIBRARIES)
    cpu_kernel._install_quantize(bnb)
    assert before == cpu_kernel._LIBRARIES


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_of_any_shape_are_dequantised_with_the_scales_of_their_blocks(kind: str) -> None:
    cpu_kernel.install()
    for shape in ((64, 96), (64, 32), (33, 130), (7, 100), (5, 13), (16, 128)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for nested in (False, True):
            packed, state = bnb.functional.quantize_4bit(
                weight, quant_type=kind, compress_statistics=nested, blocksize=64
            )
            scales = state.absmax
            if nested:
                scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
            nibbles = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=-1).flatten()[: weight.numel()]
            exact = state.code[nibbles.long()] * scales.repeat_interleave(64)[: weight.numel()]
            found = bnb.functional.dequantize_4bit(packed, state)
            assert torch.equal(found.flatten(), exact)
            x = torch.randn(3, shape[1])
            assert torch.allclose(bnb.matmul_4bit(x, packed.t(), state), x @ found.t(), atol=1e-5)

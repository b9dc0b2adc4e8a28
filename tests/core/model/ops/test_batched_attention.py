"""Attention of short segments in batches: as each segment alone in float64, whatever the others contain."""

from __future__ import annotations

import pytest
import torch

from budwood.model.ops.batched_attention import batched_attention, takes

SEGMENTS = (0, 5, 6, 23, 30, 70)  # of 5, 1, 17, 7 and 40 tokens: batches of up to 8, 32 and 64


def tensors(dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 6, 70, 8), (1, 2, 70, 8), (1, 2, 70, 4))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window: int | None) -> torch.Tensor:
    outputs = []
    for start, stop in zip(SEGMENTS, SEGMENTS[1:], strict=False):
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        mask = torch.ones_like(distance, dtype=torch.bool) if window is None else distance.abs() < window
        mask = mask & (distance >= 0) if causal else mask
        rows = (x.double()[:, :, start:stop] for x in (q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)))
        query, key, value = rows
        scores = (query @ key.mT * 8**-0.5).masked_fill(~mask, -torch.inf)
        outputs.append((scores.softmax(-1) @ value).transpose(1, 2))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_it_equals_each_segment_alone_in_float64(dtype: torch.dtype, causal: bool, window: int | None) -> None:
    q, k, v = tensors(dtype)
    expected, actual = reference(q, k, v, causal, window), batched_attention(q, k, v, SEGMENTS, causal, window)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * direction).sum(), (q, k, v))
    gradients = torch.autograd.grad((actual * direction).sum(), (q, k, v))
    # In 16 bit, weights and outputs are rounded; 17 or fewer of them add up in a gradient of size one to ten.
    bound = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(actual.double(), expected.double(), atol=bound, rtol=bound)
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), other.double(), atol=bound, rtol=bound)


def test_a_segment_does_not_depend_on_the_others() -> None:
    ours, others = tensors(torch.bfloat16), tensors(torch.bfloat16, seed=1)
    mixed = [torch.cat([x[:, :, :6], y[:, :, 6:]], 2) for x, y in zip(ours, others, strict=True)]
    first, second = (batched_attention(*x, SEGMENTS, False) for x in (ours, mixed))
    assert torch.equal(first[:, :6], second[:, :6]) and not torch.equal(first[:, 6:], second[:, 6:])


def test_autocast_leaves_the_scores_in_fp32() -> None:
    inputs = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = batched_attention(*inputs, SEGMENTS, True)
    expected = reference(*inputs, True, None)
    error = (out - expected).detach().abs().max()
    assert float(error / expected.detach().abs().max()) < 2**-6  # only the weights are rounded


def test_dropout_scales_what_is_left() -> None:
    q, k, _ = tensors(torch.float32)
    ones = torch.ones(1, 2, 70, 4)
    torch.manual_seed(0)
    out = batched_attention(q, k, ones, SEGMENTS, False, dropout=0.25)
    assert not torch.equal(batched_attention(q, k, ones, SEGMENTS, False), out)
    single = out[:, 5]  # a segment of one token: dropped, or scaled by 1 / (1 - 0.25)
    assert torch.logical_or(single == 0, (single - 4 / 3).abs() < 1e-6).all()
    assert abs(float(out.mean()) - 1) < 0.1  # 420 weights' sums; a sum's deviation is below 0.6


@pytest.mark.parametrize(
    ("dtype", "segments", "dropout", "chosen"),
    [
        (torch.bfloat16, (0, 5, 9), 0.0, True),
        (torch.float32, (0, 5, 9), 0.1, True),
        (torch.float32, (0, 5, 9), 0.0, False),
        (torch.bfloat16, (0, 9), 0.0, False),
        (torch.bfloat16, (0, 5, 60), 0.0, False),
    ],
)
def test_it_takes_short_segments(dtype: torch.dtype, segments: tuple[int, ...], dropout: float, chosen: bool) -> None:
    assert takes(torch.empty(1, 1, segments[-1], 8, dtype=dtype), segments, dropout) is chosen

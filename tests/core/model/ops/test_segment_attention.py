"""Attention as batched bf16 products: no further from float64 than torch's kernel, forward and backward."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from budwood.model.ops import segment_attention as module
from budwood.model.ops.attention import IMPLEMENTATION, packed_mask, register
from budwood.model.ops.segment_attention import longest, segment_attention, takes

LENGTHS = (1, 63, 64, 65, 300, 20, 65)


def states(heads: int, kv_heads: int, size: int, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Return query, key, value and an output gradient, in a model's layout."""
    draw = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    q, k, v = (torch.randn(1, tokens, n, size, generator=draw).bfloat16() for n in (heads, kv_heads, kv_heads))
    pull = torch.randn(1, tokens, heads, size, generator=draw).bfloat16()
    return [*(x.transpose(1, 2).requires_grad_() for x in (q, k, v)), pull]


def bounds(lengths: tuple[int, ...] = LENGTHS) -> tuple[int, ...]:
    return (0, *itertools.accumulate(lengths))


def by_segment(q: Tensor, k: Tensor, v: Tensor, lengths, causal: bool, window: int | None, scale: float) -> Tensor:
    """Return the output of torch's kernel for each segment alone."""
    outputs = []
    for a, b, c in zip(*(x.split(list(lengths), 2) for x in (q, k, v)), strict=True):
        row, column = torch.arange(a.shape[2])[:, None], torch.arange(a.shape[2])
        seen = column <= row if causal else torch.ones(a.shape[2], a.shape[2], dtype=torch.bool)
        if window is not None:
            seen = seen & ((row - column).abs() < window)
        outputs.append(F.scaled_dot_product_attention(a, b, c, seen, scale=scale, enable_gqa=True).transpose(1, 2))
    return torch.cat(outputs, 1)


def with_gradients(function, q: Tensor, k: Tensor, v: Tensor, pull: Tensor) -> list[Tensor]:
    out = function(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), pull.to(out.dtype))]


def distance(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("causal, window", [(True, None), (False, None), (True, 40), (False, 7)])
@pytest.mark.parametrize("heads, kv_heads, size", [(4, 4, 32), (6, 2, 24)])
def test_no_further_from_float64_than_torchs_kernel(heads, kv_heads, size, causal, window) -> None:
    *qkv, pull = states(heads, kv_heads, size)
    scale = 0.9 * size**-0.5
    exact = with_gradients(
        lambda *x: by_segment(*x, LENGTHS, causal, window, scale),
        *(x.detach().double().requires_grad_() for x in qkv), pull.double(),
    )  # fmt: skip
    peer = with_gradients(lambda *x: by_segment(*x, LENGTHS, causal, window, scale), *qkv, pull)
    ours = with_gradients(lambda *x: segment_attention(*x, bounds(), causal, window, scale), *qkv, pull)
    for name, mine, theirs, true in zip(("out", "q", "k", "v"), ours, peer, exact, strict=True):
        assert mine.shape == true.shape
        # The gradients of scores are rounded to 16 bit once more; a complete model is compared below.
        assert distance(mine, true) < max(1.6 * distance(theirs, true), 0.004), name


def test_a_models_gradient_is_no_further_from_fp32_than_with_torchs_kernel(tiny_bases, monkeypatch) -> None:
    from transformers import AutoModelForCausalLM

    register()
    draw = torch.Generator().manual_seed(0)
    lengths = (70, 130, 20)
    ids = torch.randint(5, 300, (1, sum(lengths)), generator=draw)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    pull = torch.randn(1, sum(lengths), 64, generator=draw)
    folder = tiny_bases("heads16", num_hidden_layers=4)

    def gradient(dtype: torch.dtype, own: bool) -> Tensor:
        monkeypatch.setattr("budwood.model.ops.attention.takes", lambda *given: own)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=IMPLEMENTATION)
        hidden = model.model(
            ids, position_ids=positions, attention_mask=packed_mask(), segments=bounds(lengths), use_cache=False
        ).last_hidden_state
        hidden.backward(pull.to(dtype))
        return torch.cat([p.grad.flatten().double() for n, p in model.named_parameters() if "_proj" in n])

    exact = gradient(torch.float32, False)
    ours, peer = (distance(gradient(torch.bfloat16, own), exact) for own in (True, False))
    assert 0 < ours < 1.05 * peer


def test_segments_do_not_attend_to_each_other() -> None:
    *qkv, pull = states(2, 2, 16)
    whole = with_gradients(lambda *x: segment_attention(*x, bounds(), True), *qkv, pull)
    changed = [x.detach().clone() for x in qkv]
    for x in changed:
        x[:, :, 63 + 64 + 1 :] += 3.0  # everything after the third segment
    again = with_gradients(
        lambda *x: segment_attention(*x, bounds(), True), *(x.requires_grad_() for x in changed), pull
    )
    assert torch.equal(whole[0][:, :128], again[0][:, :128])
    for mine, other in zip(whole[1:], again[1:], strict=True):
        assert torch.equal(mine[:, :, :128], other[:, :, :128])


@pytest.mark.parametrize("causal", [True, False])
def test_short_segments_computed_together_equal_those_computed_alone(causal, monkeypatch) -> None:
    lengths = (5, 30, 5, 64, 5, 130, 5, 5)
    *qkv, pull = states(4, 2, 16, lengths)
    monkeypatch.setattr(
        module, "CACHED", 4 * 64 * 64 * 3
    )  # at most three short segments at a time, so a group is split
    module._groups.cache_clear()
    groups = [group.members for group in module._groups(bounds(lengths), 4, causal)]
    assert groups == ([(0, 1, 2), (3, 4, 6), (7,), (5,)] if causal else [(0, 2, 4), (6, 7), (1,), (3,), (5,)])
    together = with_gradients(lambda *x: segment_attention(*x, bounds(lengths), causal), *qkv, pull)
    module._groups.cache_clear()
    at = 0
    for length in lengths:
        alone = [x[:, :, at : at + length].detach().requires_grad_() for x in qkv]
        parts = with_gradients(
            lambda *x, n=length: segment_attention(*x, (0, n), causal), *alone, pull[:, at : at + length]
        )
        assert torch.equal(together[0][:, at : at + length], parts[0])
        for mine, other in zip(together[1:], parts[1:], strict=True):
            assert torch.equal(mine[:, :, at : at + length], other)
        at += length
    module._groups.cache_clear()


def test_backward_can_run_twice() -> None:
    q, k, v, pull = states(2, 2, 16)
    out = segment_attention(q, k, v, bounds(), True)
    first = torch.autograd.grad(out, (q, k, v), pull, retain_graph=True)
    second = torch.autograd.grad(out, (q, k, v), pull)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_other_products_stay_fp32() -> None:
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    before = a @ b
    with module._bf16_products():
        pass
    assert torch.equal(a @ b, before)
    assert torch.get_float32_matmul_precision() == "highest"


def test_it_is_used_only_for_supported_tensors() -> None:
    q, _, v, _ = states(2, 2, 16, (300,))
    fits = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert takes(q, v, (0, longest(16))) is fits
    assert not takes(q, v, (0, longest(16) + 1))
    assert not takes(q.float(), v.float(), (0, 64))
    assert not takes(q, v[..., :8], (0, 64))
    assert math.isclose(longest(64), 1024)

"""Grouped products with experts against float64 per token; quantisation expert by expert; nothing dense is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from budwood.model.ops.experts import Routing, combine, dispatch, expert_linear, low_rank_of_experts
from budwood.model.quantizers.experts import DenseExperts, ExpertLinear, FourBitExperts, Int8Experts
from budwood.model.quantizers.mxfp4 import MXFP4Experts

EXPERTS, OUT, IN, TOKENS = 5, 48, 32, 37


def weights(outputs: int = OUT, inputs: int = IN, seed: int = 0) -> Tensor:
    return torch.randn(EXPERTS, outputs, inputs, generator=torch.Generator().manual_seed(seed))


def make(kind: str, outputs: int = OUT, inputs: int = IN) -> ExpertLinear:
    weight = weights(outputs, inputs)
    if kind == "dense":
        return DenseExperts(nn.Parameter(weight, requires_grad=False), transposed=False)
    if kind == "transposed":
        return DenseExperts(nn.Parameter(weight.transpose(1, 2).contiguous(), requires_grad=False), transposed=True)
    if kind == "int8":
        return Int8Experts.pack(weight)
    return FourBitExperts.pack(weight, kind[:3], double=not kind.endswith("single"))


def chosen(experts: int = EXPERTS, idle: int = 1) -> Tensor:
    """Two different experts for each token, none for the first `idle`."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(experts - idle, generator=generator)[:2] + idle for _ in range(TOKENS)])


def factors(rank: int, dtype: torch.dtype, outputs: int = OUT, inputs: int = IN) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(EXPERTS, rank, inputs, generator=generator).to(dtype).requires_grad_()
    return a, torch.randn(EXPERTS, outputs, rank, generator=generator).to(dtype).requires_grad_()


def reference(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, picks: Tensor, mixture: Tensor) -> Tensor:
    """Every token by itself, in float64."""
    rows = []
    for token, experts in enumerate(picks.tolist()):
        parts = [mixture[token, i] * ((weight[e] + 0.5 * b[e] @ a[e]) @ x[token]) for i, e in enumerate(experts)]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["dense", "transposed", "nf4", "nf4-single", "fp4", "int8"])
@pytest.mark.parametrize(("rank", "inputs", "idle"), [(4, 32, 1), (3, 32, 0), (4, 36, 0), (4, 32, 3)])
def test_outputs_and_gradients_are_those_of_float64(kind, rank, inputs, idle):
    base, picks = make(kind, inputs=inputs), chosen(idle=idle)
    a, b = factors(rank, torch.float32, inputs=inputs)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, inputs, generator=generator).requires_grad_()
    mixture = torch.rand(TOKENS, 2, generator=generator).requires_grad_()
    upstream = torch.randn(TOKENS, OUT, generator=generator)
    routing = Routing.of(picks, EXPERTS)
    y = combine(expert_linear(dispatch(x, routing), base, routing, a, b, 0.5), mixture, routing)
    found = [y, *torch.autograd.grad(y, (x, a, b, mixture), upstream)]
    exact = [t.detach().double().requires_grad_() for t in (x, a, b, mixture)]
    wide = base.dequantize(0, EXPERTS, torch.float32).double()
    expected = reference(exact[0], wide, exact[1], exact[2], picks, exact[3])
    wanted = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
    for mine, true in zip(found, wanted, strict=True):
        assert float((mine - true).detach().abs().max()) <= 2e-6 * float(true.detach().abs().max())
    with torch.no_grad():
        rows = dispatch(x, routing)
        update = 0.5 * low_rank_of_experts(rows, a, b, routing)
        assert torch.allclose(
            expert_linear(rows, base, routing) + update, expert_linear(rows, base, routing, a, b, 0.5), atol=1e-4
        )


@pytest.mark.parametrize("shape", [(48, 32), (7, 10)])
@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "fp4"])
def test_each_expert_is_quantised_as_one_linear(kind, shape):
    bnb: Any = pytest.importorskip("bitsandbytes").functional
    base, weight = make(kind, *shape), weights(*shape)
    for expert in range(EXPERTS):
        codes, state = bnb.quantize_4bit(
            weight[expert], compress_statistics=not kind.endswith("single"), quant_type=kind[:3]
        )
        for dtype in (torch.float32, torch.bfloat16):
            state.dtype, state.shape = dtype, (shape[0] * shape[1],)  # one row: the kernel is wrong for narrow ones
            expected = bnb.dequantize_4bit(codes, state).view(shape)
            assert torch.equal(base.dequantize(expert, expert + 1, dtype)[0], expected)
    assert torch.equal(
        base.dequantize(1, 4, torch.float32),
        torch.stack([base.dequantize(e, e + 1, torch.float32)[0] for e in (1, 2, 3)]),
    )


def test_eight_bits_are_within_half_a_step():
    base, weight = make("int8"), weights()
    step = weight.abs().amax(2, keepdim=True) / 127
    assert bool(((base.dequantize(0, EXPERTS, torch.float32) - weight).abs() <= step * 0.5001).all())


def test_bf16_is_no_further_than_its_rounding():
    base, routing = make("nf4"), Routing.of(chosen(), EXPERTS)
    x, (a, b) = torch.randn(2 * TOKENS, IN, generator=torch.Generator().manual_seed(4)), factors(8, torch.float32)
    exact = expert_linear(x, base, routing, a, b, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = expert_linear(x, base, routing, a, b, 0.5)
    assert narrow.dtype == torch.bfloat16
    assert float((narrow - exact).norm() / exact.norm()) < 2**-7


def test_the_backward_keeps_no_dense_weight():
    base, routing, sizes = make("nf4"), Routing.of(chosen(), EXPERTS), []
    x, (a, b) = torch.randn(2 * TOKENS, IN).requires_grad_(), factors(4, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        expert_linear(x, base, routing, a, b, 0.5, 0.1)
    assert max(sizes) == 2 * TOKENS * IN < OUT * IN * EXPERTS


def test_dropout_has_the_right_mean_and_its_own_gradient():
    base, routing = make("dense"), Routing.of(chosen(), EXPERTS)
    x, (a, b) = torch.randn(2 * TOKENS, IN).requires_grad_(), factors(4, torch.float32)
    torch.manual_seed(0)
    y = expert_linear(x, base, routing, a, b, 0.5, 0.4)
    update = y - expert_linear(x, base, routing)
    (grad,) = torch.autograd.grad(update.sum(), x)
    # The update is linear in what dropout kept of x, so its sum is the product of x and this gradient.
    assert torch.allclose((grad * x).sum(), update.sum(), rtol=1e-3)
    assert not torch.allclose(update, expert_linear(x, base, routing, a, b, 0.5) - expert_linear(x, base, routing))


def test_experts_that_train_whole_have_gradients():
    base, routing = make("dense"), Routing.of(chosen(), EXPERTS)
    base.weight.requires_grad_()
    x = torch.randn(2 * TOKENS, IN)
    expert_linear(x, base, routing).sum().backward()
    rows = x.split(routing.counts)
    expected = torch.stack([part.sum(0).expand(OUT, -1) for part in rows])
    assert torch.allclose(base.weight.grad, expected, atol=1e-5)
    with pytest.raises(ValueError, match="no low-rank updates"):
        expert_linear(x, base, routing, *factors(4, torch.float32))


def test_mxfp4_is_packed_without_loss():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(5)
    blocks = torch.randint(0, 256, (EXPERTS, OUT, 2, 16), generator=generator, dtype=torch.uint8)
    blocks[0, 0] = 0
    scales = torch.randint(110, 130, (EXPERTS, OUT, 2), generator=generator, dtype=torch.uint8)
    for dtype in (torch.bfloat16, torch.float32):
        dense = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # [E, in, out], as gpt-oss stores it
        experts = MXFP4Experts.pack(dense.transpose(1, 2))
        assert torch.equal(experts.dequantize(0, EXPERTS, dtype), dense.transpose(1, 2))
        assert torch.equal(experts.dequantize(2, 3, dtype)[0], dense[2].t())
    assert 8 * sum(t.nbytes for t in experts.stored) == 4.25 * experts.numel
    with pytest.raises(ValueError, match="expert 1 has weights that MXFP4 does not have"):
        MXFP4Experts.pack(torch.cat([dense[:1], dense[1:2] * 1.01]).transpose(1, 2))

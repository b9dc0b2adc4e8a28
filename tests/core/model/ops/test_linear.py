"""The fused low-rank linear against float64 W + sBA and PEFT's layers; tensors saved for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from budwood.model.ops.dropout import draw_quickly
from budwood.model.ops.linear import frozen_linear, low_rank_linear, mixed_low_rank_linear

IN, OUT, RANK, SCALING = 64, 96, 4, 0.5
KINDS = ("dense", "nf4", "nf4-single", "fp4", "int8")


def make_base(kind: str = "dense", dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT, bias=bias)
    if kind == "dense":
        return plain.to(dtype).requires_grad_(False)
    bnb = pytest.importorskip("bitsandbytes")
    if kind == "int8":
        base = bnb.nn.Linear8bitLt(IN, OUT, bias=bias, has_fp16_weights=False)
    else:
        base = bnb.nn.Linear4bit(
            IN, OUT, bias=bias, compute_dtype=dtype, quant_type=kind[:3], compress_statistics=kind != "nf4-single"
        )
    base.load_state_dict(plain.state_dict())
    return base.to("cpu").requires_grad_(False).train()


def dense_weight(base: Any) -> Tensor:
    """W in float64, independent of the code under test: the layer's outputs for the unit vectors."""
    if type(base) is nn.Linear:
        return base.weight.double()
    bias, base.bias = base.bias, None
    with torch.no_grad():
        out = base(torch.eye(IN, dtype=getattr(base, "compute_dtype", None) or torch.float32))
    base.bias = bias
    return out.double().t()


def factors(dtype: torch.dtype = torch.float32, rank: int = RANK, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, IN, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(OUT, rank, generator=generator, dtype=torch.float64).to(dtype)
    return a.requires_grad_(), b.requires_grad_()


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, IN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def run(function: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of the leaves for a fixed output gradient."""
    out = function(*leaves)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, pull)]


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_in_float64(bias: bool) -> None:
    base = make_base(dtype=torch.float64, bias=bias)
    a, b = factors(torch.float64)
    x = inputs(2, 3, dtype=torch.float64)
    if bias:
        base.bias.requires_grad_()

    def function(x: Tensor, a: Tensor, b: Tensor, *_: Tensor) -> Tensor:
        return low_rank_linear(x, base, a, b, SCALING)

    expected = x @ (base.weight + SCALING * b @ a).t() + (base.bias if bias else 0)
    torch.testing.assert_close(function(x, a, b), expected)
    assert torch.autograd.gradcheck(function, (x, a, b, *([base.bias] if bias else [])))


@pytest.mark.parametrize("bias", [True, False])
def test_a_transposed_weight_in_float64(bias: bool) -> None:
    """transformers' Conv1D, which stores W as [in, out]."""
    torch.manual_seed(0)
    base: Any = Conv1D(OUT, IN).double().requires_grad_(False)
    torch.nn.init.normal_(base.bias)
    if not bias:
        base.bias = None
    x, (a, b) = inputs(2, 3, dtype=torch.float64), factors(torch.float64)
    if bias:
        base.bias.requires_grad_()
    leaves = (x, a, b, *([base.bias] if bias else []))

    def function(x: Tensor, a: Tensor, b: Tensor, *_: Tensor) -> Tensor:
        return low_rank_linear(x, base, a, b, SCALING)

    def reference(x: Tensor, a: Tensor, b: Tensor, *_: Tensor) -> Tensor:
        return x @ (base.weight + SCALING * (b @ a).t()) + (base.bias if bias else 0)

    for ours, wanted in zip(run(function, *leaves), run(reference, *leaves), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=1e-12)
    if bias:
        with torch.no_grad():
            assert torch.equal(frozen_linear(x, base), base(x))


@pytest.mark.parametrize("transposes", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_against_float64(kind: str, transposes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("budwood.model.ops.linear._transposes", lambda device: transposes)
    base = make_base(kind)
    weight = dense_weight(base)
    leaves = (inputs(2, 5), *factors())
    actual = run(lambda x, a, b: low_rank_linear(x, base, a, b, SCALING), *leaves)

    def reference(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x @ (weight + SCALING * b @ a).t() + base.bias.double()

    expected = run(reference, *(leaf.detach().double().requires_grad_() for leaf in leaves))
    for ours, wanted in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), wanted, atol=2e-5, rtol=2e-5)


def peft_layer(base: nn.Linear, a: Tensor, b: Tensor, dropout: float = 0.0) -> Any:
    """Return PEFT's LoRA layer around `base`, with the factors `a` and `b`."""
    config = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=["0"], lora_dropout=dropout)
    layer = get_peft_model(nn.Sequential(base), config).base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(a.detach())
    layer.lora_B["default"].weight.data.copy_(b.detach())
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_peft_layer(kind: str) -> None:
    base = make_base(kind)
    x, a, b = inputs(2, 5), *factors()
    actual = run(lambda x, a, b: low_rank_linear(x, base, a, b, SCALING), x, a, b)
    layer = peft_layer(base, a, b)
    expected = run(lambda x, a, b: layer(x), x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_bf16_is_no_further_from_float64_than_peft(kind: str) -> None:
    base = make_base(kind, torch.bfloat16)
    weight = dense_weight(base)
    x, (a, b) = inputs(64, dtype=torch.bfloat16), factors()
    layer = peft_layer(base, a, b)
    theirs_a, theirs_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(lambda x, a, b: low_rank_linear(x, base, a, b, SCALING), x, a, b)
        theirs = run(lambda x, a, b: layer(x), x, theirs_a, theirs_b)

    def reference(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x @ (weight + SCALING * b @ a).t() + base.bias.double()

    expected = run(reference, *(leaf.detach().double().requires_grad_() for leaf in (x, a, b)))
    assert ours[0].dtype == torch.bfloat16
    assert ours[2].dtype == ours[3].dtype == torch.float32
    for mine, peers, wanted in zip(ours, theirs, expected, strict=True):
        assert (mine - wanted).norm() <= (peers - wanted).norm() * 1.02


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_update_it_is_bitwise_identical_to_the_base(kind: str) -> None:
    base = make_base(kind, torch.bfloat16)
    x = inputs(2, 5, dtype=torch.bfloat16)
    a, b = factors()
    with torch.no_grad():
        expected = base(x)
        assert torch.equal(frozen_linear(x, base), expected)
        assert torch.equal(low_rank_linear(x, base, a, torch.zeros_like(b), SCALING), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_in_between_does_not_change_a_bit(kind: str) -> None:
    base = make_base(kind, torch.bfloat16)
    leaves = (inputs(2, 5, dtype=torch.bfloat16), *factors())

    def step() -> list[Tensor]:
        return run(lambda x, a, b: low_rank_linear(x, base, a, b, SCALING), *leaves)

    before = step()
    base.eval()
    with torch.no_grad():
        low_rank_linear(*leaves[:1], base, *leaves[1:])
        frozen_linear(leaves[0], base)
    base.train()
    for first, second in zip(before, step(), strict=True):
        assert torch.equal(first, second)


def test_a_repacked_weight_is_an_error_in_the_backward() -> None:
    base: Any = make_base("nf4", torch.bfloat16)
    x, (a, b) = inputs(4, dtype=torch.bfloat16), factors()
    out = low_rank_linear(x, base, a, b)
    base.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match="repacked"):
        out.sum().backward()


def test_it_saves_its_input_once() -> None:
    base: Any = make_base("nf4", torch.bfloat16)
    x, (a, b) = inputs(50, dtype=torch.bfloat16), factors()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        low_rank_linear(x, base, a, b, SCALING)
    others = [t.shape for t in kept if t.data_ptr() != x.data_ptr()]
    assert sum(t.data_ptr() == x.data_ptr() for t in kept) == 1
    assert others == [(50, RANK), a.shape, b.shape]


def test_it_computes_only_the_required_gradients() -> None:
    base = make_base()
    x, (a, b) = inputs(50).detach(), factors()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = low_rank_linear(x, base, a, b)
    assert base.weight.data_ptr() not in {t.data_ptr() for t in kept}
    out.sum().backward()
    assert x.grad is None
    assert a.grad is not None
    x = inputs(50)
    low_rank_linear(x, base, a.detach(), b.detach()).sum().backward()
    assert x.grad is not None


def test_a_base_that_requires_a_gradient_is_refused() -> None:
    base = make_base().requires_grad_()
    with pytest.raises(ValueError, match="freeze"):
        low_rank_linear(inputs(3), base, *factors())


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_an_input_on_another_device_is_refused(kind: str) -> None:
    """bitsandbytes does not check this, and would read invalid memory."""
    with pytest.raises(ValueError, match="the input is on meta, the base's weight on cpu"):
        low_rank_linear(inputs(3).to("meta"), make_base(kind), *factors())


def test_dropout_uses_torchs_generator_and_is_equal_in_recomputation() -> None:
    base = make_base()
    leaves = (inputs(40), *factors())

    def dropped(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return low_rank_linear(x, base, a, b, SCALING, 0.5)

    def recomputed(*tensors: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(dropped, *tensors, use_reentrant=False)

    results = []
    for function in (dropped, dropped, recomputed):
        torch.manual_seed(7)
        results.append(run(function, *leaves))
    for again in results[1:]:
        for first, second in zip(results[0], again, strict=True):
            assert torch.equal(first, second)

    layer = peft_layer(base, leaves[1], leaves[2], dropout=0.5).train()
    draw_quickly(layer)
    torch.manual_seed(7)
    factors_of_peft = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    theirs = run(lambda x, a, b: layer(x), leaves[0], *factors_of_peft)
    for ours, wanted in zip(results[0], theirs, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-5)
    assert not torch.equal(results[0][0], run(lambda *t: low_rank_linear(t[0], base, *t[1:], SCALING), *leaves)[0])


def test_autocast_determines_the_compute_dtype() -> None:
    base, x, (a, b) = make_base(), inputs(4), factors()
    assert low_rank_linear(x, base, a, b).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        out = low_rank_linear(x, base, a, b)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == a.grad.dtype == torch.float32


def test_factors_need_not_be_leaves() -> None:
    base, x, (a, b) = make_base(), inputs(4), factors()
    scale = torch.rand(RANK, 1, requires_grad=True)
    actual = run(lambda x, a, b, scale: low_rank_linear(x, base, a * scale, b, SCALING), x, a, b, scale)
    weight = base.weight
    expected = run(lambda x, a, b, scale: x @ (weight + SCALING * b @ (a * scale)).t() + base.bias, x, a, b, scale)
    for ours, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_each_row_has_its_own_update(kind: str) -> None:
    base = make_base(kind, torch.bfloat16)
    x = inputs(5, 3, dtype=torch.bfloat16)
    first, second = factors(rank=2), factors(rank=8, seed=5)
    adapters = [None, (*first, 0.5), (*second, 2.0)]
    rows = [1, 0, 2, 1, 0]
    with torch.no_grad():
        actual = mixed_low_rank_linear(x, base, adapters, rows)
        off = frozen_linear(x, base)
        for row, index in enumerate(rows):
            chosen = adapters[index]
            if chosen is None:
                assert torch.equal(actual[row], off[row])
            else:
                alone = low_rank_linear(x[row : row + 1], base, *chosen)[0]
                torch.testing.assert_close(actual[row], alone, atol=0.1, rtol=0.02)
        everyone = mixed_low_rank_linear(x, base, adapters, [2] * 5)
        torch.testing.assert_close(everyone, low_rank_linear(x, base, *second, 2.0), atol=0.1, rtol=0.02)
        assert torch.equal(mixed_low_rank_linear(x, base, adapters, [0] * 5), off)


def test_updates_of_rows_have_gradients() -> None:
    base, x = make_base(), inputs(3, 2)
    a, b = factors()
    mixed = run(lambda x, a, b: mixed_low_rank_linear(x, base, [None, (a, b, SCALING)], [1, 0, 1]), x, a, b)

    def reference(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        off = torch.nn.functional.linear(x, base.weight, base.bias)
        return off + torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1) * (x @ a.t() @ b.t()) * SCALING

    for ours, wanted in zip(mixed, run(reference, x, a, b), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "nf4", "nf4-single"])
def test_fake_tensors(kind: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    base, leaves = make_base(kind), (inputs(2, 5), *factors())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, a, b = (mode.from_tensor(leaf) for leaf in leaves)
        out = low_rank_linear(x, base, a, b, SCALING, 0.1)
        out.sum().backward()
    assert out.shape == (2, 5, OUT)
    assert x.grad.shape == x.shape
    assert a.grad.shape == a.shape


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_its_result_may_be_changed_in_place(kind: str) -> None:
    base, (a, b), x = make_base(kind), factors(), inputs(2, 5, IN)
    gradients = []
    for in_place in (False, True):
        leaves = [t.detach().clone().requires_grad_() for t in (x, a, b)]
        y = low_rank_linear(leaves[0], base, *leaves[1:], 0.5)
        y = y.add_(1.0) if in_place else y + 1.0  # as Falcon's parallel attention adds its residual
        y.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))

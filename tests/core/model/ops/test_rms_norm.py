"""RMSNorm that saves less for the backward pass: output bitwise identical to the model's, gradients, other norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from budwood.model.ops.rms_norm import rms_norm, save_memory_in_norms


def norm(dtype: torch.dtype) -> LlamaRMSNorm:
    module = LlamaRMSNorm(48).to(dtype)
    nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
    return module.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_equal_those_of_the_model(dtype: torch.dtype) -> None:
    module = norm(dtype)
    x = torch.randn(2, 5, 48).to(dtype).requires_grad_()
    pull = torch.randn(2, 5, 48).to(dtype)
    own = module(x)
    (own_gradient,) = torch.autograd.grad(own, x, pull)
    assert save_memory_in_norms(module) == 1
    ours = module(x)
    assert torch.equal(ours, own)
    (gradient,) = torch.autograd.grad(ours, x, pull)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(gradient, own_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_as_near_to_float64_as_the_model_s(dtype: torch.dtype) -> None:
    """The gradient's mean is far from zero, so that the term that a layer norm subtracts would show; it is then rounded
    once more than the model's, which shows as a tenth."""
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(100, 48, generator=draw) + 1).to(dtype).requires_grad_()
    pull = (torch.randn(100, 48, generator=draw) + 2).to(dtype)
    module, exact_x = norm(dtype), x.detach().double().requires_grad_()
    scale = torch.rsqrt(exact_x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    (exact,) = torch.autograd.grad(module.weight.double() * exact_x * scale, exact_x, pull.double())
    (own,) = torch.autograd.grad(module(x), x, pull)
    (found,) = torch.autograd.grad(rms_norm(x, module.weight, module.variance_epsilon), x, pull)
    distance = (found.double() - exact).norm() / exact.norm()
    assert distance <= max(1.15 * float((own.double() - exact).norm() / exact.norm()), 1e-6)


def test_it_saves_the_input_without_a_copy() -> None:
    x = torch.randn(64, 48).bfloat16().requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, norm(torch.bfloat16).weight, 1e-6)
    large = [t for t in kept if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


def test_a_norm_with_another_formula_is_unchanged() -> None:
    other = Gemma2RMSNorm(48)
    nn.init.normal_(other.weight)
    assert save_memory_in_norms(other) == 0
    assert "forward" not in vars(other)


def test_a_norm_with_a_trainable_weight_computes_its_gradient() -> None:
    module = norm(torch.float32)
    save_memory_in_norms(module)
    module.weight.requires_grad_(True)
    module(torch.randn(3, 48)).sum().backward()
    assert module.weight.grad is not None and module.weight.grad.abs().sum() > 0

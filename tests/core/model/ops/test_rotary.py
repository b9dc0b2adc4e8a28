"""Rotary embeddings in training on a CPU: as near to float64 as the model's own function; other passes are its own."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama import modeling_llama

from budwood.model.ops.rotary import _replace, rotary, rotate


def draw(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("size", [16, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_no_further_from_float64_than_the_formula(dtype: torch.dtype, size: int) -> None:
    """The halves of the tables differ here, as no model's do, so that a wrong transposition shows."""
    query, key, pull, cosine, sine = draw(
        (2, 5, 3, 16), (2, 5, 1, 16), (2, 3, 5, 16), (2, 5, size), (1, 5, size), dtype=dtype
    )
    query, key = query.transpose(1, 2).requires_grad_(), key.transpose(1, 2).requires_grad_()
    wide = query.detach().double().requires_grad_()
    exact = rotate(wide, cosine.double(), sine.double())
    (exact_gradient,) = torch.autograd.grad(exact, wide, pull.double())
    formula = rotate(query, cosine, sine)
    (formula_gradient,) = torch.autograd.grad(formula, query, pull)
    found, other = rotary(query, key, cosine, sine)
    (gradient,) = torch.autograd.grad(found, query, pull)
    slack = 1e-7
    assert error(found, exact.detach()) <= error(formula.detach(), exact.detach()) + slack
    assert error(gradient, exact_gradient) <= error(formula_gradient, exact_gradient) + slack
    assert error(other, rotate(key.double(), cosine.double(), sine.double()).detach()) < 2**-7


def test_passes_without_gradients_are_the_model_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = getattr(modeling_llama.apply_rotary_pos_emb, "__wrapped__", modeling_llama.apply_rotary_pos_emb)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", own)
    assert _replace(modeling_llama)
    query, key, cosine, sine = draw((1, 2, 5, 8), (1, 1, 5, 8), (1, 5, 8), (1, 5, 8), dtype=torch.bfloat16)
    assert torch.equal(
        modeling_llama.apply_rotary_pos_emb(query, key, cosine, sine)[0], own(query, key, cosine, sine)[0]
    )
    trained, _ = modeling_llama.apply_rotary_pos_emb(query.requires_grad_(), key, cosine, sine)
    assert type(trained.grad_fn).__name__ == "_TurnBackward"

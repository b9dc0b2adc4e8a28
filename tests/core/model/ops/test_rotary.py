"""Rotary embeddings on a CPU: the bits of the models' own operations, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from budwood.model.ops import rotary as module
from budwood.model.ops.rotary import fuse_rotations


def functions() -> tuple[Any, Any]:
    """Return what replaces the function of a model's file, and that function."""
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=8)
    assert fuse_rotations(modeling_llama.LlamaModel(config)) == 1
    replaced: Any = modeling_llama.apply_rotary_pos_emb
    return replaced, replaced.__wrapped__


def draw(dtype: torch.dtype, batches: int = 2, size: int = 16) -> list[Tensor]:
    """Return query and key as attention has them, cosine and sine, and a gradient of each result."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((batches, 7, 4, 16), (batches, 7, 2, 16), (batches, 7, size), (batches, 7, size))
    q, k, cosine, sine, above, other = (
        torch.randn(shape, generator=generator).to(dtype) for shape in (*shapes, *shapes[:2])
    )
    return [q.transpose(1, 2), k.transpose(1, 2), cosine, sine, above.transpose(1, 2), other.transpose(1, 2)]


def results(function: Any, q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor, *above: Tensor) -> list[Tensor]:
    leaves = [q.detach().requires_grad_(), k.detach().requires_grad_()]
    found = function(*leaves, cosine, sine)
    gradients = torch.autograd.grad(found, leaves, [g.to(f.dtype) for g, f in zip(above, found, strict=True)])
    with torch.no_grad():
        again = function(*leaves, cosine, sine)
    return [*(tensor.detach() for tensor in found), *gradients, *again]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batches", [1, 2])
def test_the_bits_are_those_of_the_models_operations(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, batches: int
) -> None:
    calls: list[Any] = []
    replaced, own = functions()
    monkeypatch.setattr(module, "rotate", lambda *_: calls.append(1))  # the formula
    tensors = draw(dtype, batches)
    found = results(replaced, *tensors)
    assert not calls
    for mine, theirs in zip(found, results(own, *tensors), strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
    rows = found[2].transpose(1, 2).reshape(batches * 7, -1)  # the gradient of a projection's output
    assert rows.data_ptr() == found[2].data_ptr()


@pytest.mark.parametrize("tables", [torch.float32, torch.bfloat16])
def test_tables_of_another_dtype_and_parts_of_a_head_are_left_to_the_model(tables: torch.dtype) -> None:
    replaced, own = functions()
    q, k, cosine, sine, *above = draw(torch.bfloat16)
    mixed = [q, k, cosine.to(tables), sine.to(tables), *above]
    for mine, theirs in zip(results(replaced, *mixed), results(own, *mixed), strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
    part, table = draw(torch.float32, size=8), draw(torch.float32)[2]
    with pytest.raises(RuntimeError):  # Llama's own function rotates whole heads
        own(part[0], part[1], part[2], part[3])
    with pytest.raises(RuntimeError):
        replaced(part[0], part[1], part[2], part[3])
    assert replaced(part[0], part[1], table, table)[0].shape == part[0].shape

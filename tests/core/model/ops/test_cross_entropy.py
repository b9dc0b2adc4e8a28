"""Cross-entropy in blocks: torch's own numbers, to the last bits of fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from budwood.model.ops import cross_entropy as module
from budwood.model.ops.cross_entropy import cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows, classes", [(1, 7), (70, 2000), (3, 40_000)])
def test_values_and_gradient_are_those_of_torch(dtype, rows, classes, monkeypatch) -> None:
    monkeypatch.setattr(module, "CACHED", 16_000)  # several blocks, the last of them smaller
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, classes, generator=draw) * 4).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (rows,), generator=draw)
    pull = torch.rand(rows, generator=draw, dtype=torch.float64)
    exact = F.cross_entropy(logits.detach().double().requires_grad_(), labels, reduction="none")
    wide = logits.detach().double().requires_grad_()
    (exact_gradient,) = torch.autograd.grad(F.cross_entropy(wide, labels, reduction="none"), wide, pull)
    values = cross_entropy(logits, labels)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (gradient,) = torch.autograd.grad(values, logits, pull.to(values.dtype))
    assert gradient.dtype == dtype
    torch.testing.assert_close(values.double(), exact, rtol=1e-6, atol=1e-5)
    # A sum of n numbers loses up to n · eps, and it scales every probability of its row; bf16 rounds the result itself.
    computed = torch.promote_types(dtype, torch.float32)
    tolerance = classes * torch.finfo(computed).eps + (2**-8 if dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=max(tolerance, 1e-5), atol=1e-7)


def test_a_hopeless_label_has_a_finite_loss() -> None:
    logits = torch.tensor([[0.0, 300.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0]))
    assert loss.item() == 300.0


def test_no_labels() -> None:
    logits = torch.empty(0, 5, requires_grad=True)
    assert cross_entropy(logits, torch.empty(0, dtype=torch.int64)).shape == (0,)

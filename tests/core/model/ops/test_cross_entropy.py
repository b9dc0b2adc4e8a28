"""Cross-entropy in blocks, against float64 to within the rounding of its dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from budwood.model.ops import cross_entropy as module
from budwood.model.ops.cross_entropy import cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows, classes", [(1, 7), (70, 2000), (3, 40_000)])
def test_values_and_gradient_are_those_of_torch(dtype, rows, classes, monkeypatch) -> None:
    monkeypatch.setattr(module, "CACHED", 16_000)  # several blocks, the last one smaller
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
    # The error of a sum of n terms in any order is about sqrt(n) roundings; 4 sqrt(n) almost always holds (Higham
    # & Mary, 2019). A probability has that error, the rounding of its exponent, and a few more.
    eps = torch.finfo(values.dtype).eps
    spread = wide.detach().amax(-1, keepdim=True) - wide.detach()
    relative = eps / 2 * (4 * classes**0.5 + spread + 4)
    assert ((values.double() - exact).abs() <= relative.amax(-1) + 2 * eps * exact.abs()).all()
    last = torch.finfo(dtype).eps + 2 * eps
    allowed = pull[:, None] * wide.detach().softmax(-1) * relative + last * exact_gradient.abs()
    assert ((gradient.double() - exact_gradient).abs() <= allowed).all()


def test_a_label_of_zero_probability_has_a_finite_loss() -> None:
    logits = torch.tensor([[0.0, 300.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0]))
    assert loss.item() == 300.0


def test_no_labels() -> None:
    logits = torch.empty(0, 5, requires_grad=True)
    assert cross_entropy(logits, torch.empty(0, dtype=torch.int64)).shape == (0,)

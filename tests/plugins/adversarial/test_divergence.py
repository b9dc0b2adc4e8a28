"""The divergences against torch's own, with gradients, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from budwood_adversarial import divergence
from budwood_adversarial.divergence import kl, symmetric_kl


@pytest.mark.parametrize("block", [1, 50, 1 << 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, block: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(divergence, "BLOCK", block)
    torch.manual_seed(0)
    clean, noisy = ((torch.randn(7, 13) * 3).to(dtype).requires_grad_() for _ in range(2))
    exact = [t.detach().double().requires_grad_() for t in (clean, noisy)]
    p, q = (t.log_softmax(-1) for t in exact)
    there = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    back = F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    weights = torch.rand(7)
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}

    values = symmetric_kl(clean, noisy)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), there + back, atol=1e-5, rtol=1e-5)
    (values * weights).sum().backward()
    ((there + back) * weights.double()).sum().backward(retain_graph=True)
    for ours, theirs in zip((clean, noisy), exact, strict=True):
        assert ours.grad.dtype == dtype
        torch.testing.assert_close(ours.grad.double(), theirs.grad, **tolerance)

    clean.grad = noisy.grad = exact[1].grad = None
    values = kl(clean, noisy)
    torch.testing.assert_close(values.double(), there, atol=1e-5, rtol=1e-5)
    (values * weights).sum().backward()
    (there * weights.double()).sum().backward()
    assert clean.grad is None
    torch.testing.assert_close(noisy.grad.double(), exact[1].grad, **tolerance)

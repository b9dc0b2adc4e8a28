"""The divergences against their definitions in float64, and Jensen-Shannon against the peer library."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from budwood_distillation.divergence import bucketed, divergence, log_probabilities

CASES = [("forward-kl", 0.5), ("reverse-kl", 0.5), ("jensen-shannon", 0.5), ("jensen-shannon", 0.1)]
SIZE = 37


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(-1)


def exact(p: np.ndarray, q: np.ndarray, kind: str, beta: float) -> np.ndarray:
    """The definitions, in float64."""
    m = beta * p + (1 - beta) * q
    return {
        "forward-kl": kl(p, q),
        "reverse-kl": kl(q, p),
        "jensen-shannon": beta * kl(p, m) + (1 - beta) * kl(q, m),
    }[kind]


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of teacher and student, [6, 41] fp32, of which the last four are padding."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(6, SIZE + 4, generator=generator) * 3 for _ in range(2))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("kind", "beta"), CASES)
def test_values_and_gradients_match_the_definitions(logits: tuple, kind: str, beta: float, temperature: float) -> None:
    teacher, student = logits
    student.requires_grad_()
    log_p = log_probabilities(teacher, SIZE, temperature)
    values = divergence(log_p, log_probabilities(student, SIZE, temperature), kind, beta)
    values.sum().backward()
    z_p, z_q = (t.detach().double().numpy()[:, :SIZE] / temperature for t in (teacher, student))
    p, q = softmax(z_p), softmax(z_q)
    np.testing.assert_allclose(values.detach(), exact(p, q, kind, beta), rtol=1e-5, atol=1e-6)
    # dD/dz = (q ⊙ (g - Σ q g)) / T with g = dD/dq
    m = beta * p + (1 - beta) * q
    g = {"forward-kl": -p / q, "reverse-kl": np.log(q / p) + 1, "jensen-shannon": (1 - beta) * np.log(q / m)}[kind]
    gradient = q * (g - (q * g).sum(-1, keepdims=True)) / temperature
    np.testing.assert_allclose(student.grad[:, :SIZE], gradient, rtol=1e-4, atol=1e-6)
    assert not student.grad[:, SIZE:].any(), "padding has no gradient"


def test_the_gradient_keeps_its_scale_at_high_temperatures(logits: tuple) -> None:
    """T² · d KL / dz tends to the centred (z_q - z_p) / V as T grows (Hinton et al., 2015, eq. 4)."""
    teacher, student = (t[:, :SIZE].double() for t in logits)
    student.requires_grad_()
    temperature = 1e4
    log_p, log_q = ((z / temperature).log_softmax(-1) for z in (teacher, student))
    (divergence(log_p, log_q, "forward-kl") * temperature**2).sum().backward()
    centred = [z.detach() - z.detach().mean(-1, keepdim=True) for z in (student, teacher)]
    torch.testing.assert_close(student.grad, (centred[0] - centred[1]) / SIZE, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("kind", "beta"), CASES)
@pytest.mark.parametrize("k", [1, 5, SIZE - 1])
def test_the_top_k_and_the_rest_are_a_coarser_distribution(logits: tuple, kind: str, beta: float, k: int) -> None:
    teacher, student = logits
    student.requires_grad_()
    ids = teacher[:, :SIZE].topk(k).indices
    log_p, log_q = bucketed(teacher, SIZE, 2.0, ids), bucketed(student, SIZE, 2.0, ids)
    values = divergence(log_p, log_q, kind, beta)
    values.sum().backward()
    assert torch.isfinite(student.grad).all()
    p, q = (softmax(t.detach().double().numpy()[:, :SIZE] / 2) for t in (teacher, student))
    coarse = [np.take_along_axis(x, ids.numpy(), 1) for x in (p, q)]
    coarse = [np.concatenate([x, 1 - x.sum(-1, keepdims=True)], 1) for x in coarse]
    np.testing.assert_allclose(values.detach(), exact(*coarse, kind, beta), rtol=1e-4, atol=1e-6)
    full = exact(p, q, kind, beta)
    # Each log-probability and each of their products is rounded some times in fp32, relative to its own size.
    rounding = 16 * 2**-24 * ((p + q) * (1 + np.abs(np.log(p)) + np.abs(np.log(q)))).sum(-1)
    assert (values.detach().numpy() <= full + rounding).all(), "merging outcomes cannot raise a divergence"
    if k == SIZE - 1:
        np.testing.assert_allclose(values.detach(), full, rtol=1e-4, atol=1e-6)


def test_a_tiny_rest_keeps_its_precision() -> None:
    """One minus the sum of the top k would be 0, or noise, in fp32."""
    logits = torch.full((1, 10), -40.0)
    logits[0, :2] = torch.tensor([3.0, 1.0])
    rest = bucketed(logits, 10, 1.0, torch.tensor([[0, 1]]))[0, -1]
    z = logits.double()
    expected = z[0, 2:].logsumexp(0) - z[0].logsumexp(0)
    assert float(rest) == pytest.approx(float(expected), rel=1e-6)


def test_jensen_shannon_tends_to_both_divergences(logits: tuple) -> None:
    log_p, log_q = (t[:, :SIZE].double().log_softmax(-1) for t in logits)
    for beta, kind in ((1e-9, "forward-kl"), (1 - 1e-9, "reverse-kl")):
        scaled = divergence(log_p, log_q, "jensen-shannon", beta) / min(beta, 1 - beta)
        torch.testing.assert_close(scaled, divergence(log_p, log_q, kind), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_conventions_match_the_peer_library(logits: tuple, beta: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    teacher, student = (t[None, :, :SIZE] for t in logits)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=2.0, reduction="sum")
    kind = {0.0: "forward-kl", 1.0: "reverse-kl"}.get(beta, "jensen-shannon")
    ours = divergence(log_probabilities(teacher[0], SIZE, 2.0), log_probabilities(student[0], SIZE, 2.0), kind, beta)
    assert float(ours.sum()) == pytest.approx(float(theirs), rel=1e-5)

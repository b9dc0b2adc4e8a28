"""Schedule, importance, allocation and penalty against the paper's equations in float64, and against PEFT."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import RankAllocator
from pydantic import ValidationError
from torch import nn

from budwood_adalora.importance import Importance, choose
from budwood_adalora.options import AdaLoRAOptions
from budwood_adalora.penalty import orthogonality
from budwood_adalora.picture import draw_ranks
from budwood_adalora.schedule import Schedule, smallest_steps

SHAPES = [(6, 9), (5, 9), (6, 9)]
RANK = 4


def triplets(seed: int = 0) -> list[nn.Parameter]:
    """Return random A [r, in], B [out, r], E [r, 1] for modules of SHAPES (out, in)."""
    torch.manual_seed(seed)
    parts = [torch.randn(s) for out, inside in SHAPES for s in ((RANK, inside), (out, RANK), (RANK, 1))]
    return [nn.Parameter(part) for part in parts]


def test_importance_matches_the_equations() -> None:
    """A naive implementation of eq. 8 to 11 and the score of a triplet, over several steps with changing weights."""
    beta1, beta2 = 0.85, 0.7
    parameters = triplets()
    importance = Importance(parameters, beta1, beta2)
    mean = [np.zeros(p.shape) for p in parameters]
    spread = [np.zeros(p.shape) for p in parameters]
    for _ in range(5):
        for i, p in enumerate(parameters):
            p.data.add_(torch.randn_like(p) * 0.1)
            p.grad = torch.randn_like(p)
            now = np.abs(p.detach().double().numpy() * p.grad.double().numpy())
            mean[i] = beta1 * mean[i] + (1 - beta1) * now
            spread[i] = beta2 * spread[i] + (1 - beta2) * np.abs(now - mean[i])
        importance.update(parameters)
    for module, scores in enumerate(importance.scores()):
        s_q, s_p, s_l = (mean[3 * module + part] * spread[3 * module + part] for part in range(3))
        out, inside = SHAPES[module]
        for i in range(RANK):
            expected = s_l[i, 0] + sum(s_p[j, i] for j in range(out)) / out + sum(s_q[i]) / inside
            assert float(scores[i]) == pytest.approx(expected, rel=1e-5)


def test_allocation_matches_pefts_allocator() -> None:
    """The masks of several steps on the same weights and gradients, without equal scores."""

    class Layer(nn.Module):
        def __init__(self, a: nn.Parameter, b: nn.Parameter, e: nn.Parameter) -> None:
            super().__init__()
            parts = {"lora_A": a, "lora_B": b, "lora_E": e}
            for name, part in parts.items():
                setattr(self, name, nn.ParameterDict({"default": nn.Parameter(part.detach().clone())}))

    ours = triplets()
    peer = nn.ModuleList([Layer(*ours[i : i + 3]) for i in range(0, len(ours), 3)])
    theirs = [getattr(layer, part)["default"] for layer in peer for part in ("lora_A", "lora_B", "lora_E")]
    options = AdaLoRAOptions(initial_rank=RANK, target_rank=1, initial_phase=4, final_phase=5, interval=2)
    schedule = Schedule.of(options, 20)
    config = AdaLoraConfig(init_r=RANK, target_r=1, tinit=4, tfinal=5, deltaT=2, total_step=20)
    allocator = RankAllocator(peer, config, "default")
    importance = Importance(ours, options.beta1, options.beta2)
    budgets = []
    for step in range(1, schedule.last):
        for mine, other in zip(ours, theirs, strict=True):
            noise = torch.randn_like(mine)
            mine.data.add_(noise * 0.05)
            other.data.add_(noise * 0.05)
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        importance.update(ours)
        budget = schedule.budget(step, RANK * len(SHAPES), len(SHAPES))
        if schedule.allocates(step):
            for values, mask in zip(ours[2::3], choose(importance.scores(), budget), strict=True):
                values.data.masked_fill_(~mask[:, None], 0.0)
        assert allocator.update_and_allocate(peer, step)[0] == budget
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine == 0, other == 0)
            torch.testing.assert_close(mine, other)
        budgets.append(budget)
    assert budgets[:4] == [12] * 4
    assert budgets[-1] < 5
    assert sum(int((values != 0).sum()) for values in ours[2::3]) == budgets[-1]


def test_the_budget_is_met_exactly_with_equal_scores() -> None:
    scores = [torch.zeros(4), torch.ones(4), torch.ones(3)]
    for budget in range(1, 12):
        masks = choose(scores, budget)
        assert [len(mask) for mask in masks] == [4, 4, 3]
        assert sum(int(mask.sum()) for mask in masks) == budget
    assert choose(scores, 2)[1].tolist() == [True, True, False, False], "the first of equal ones"


def test_the_schedule_is_cubic_between_its_phases() -> None:
    options = AdaLoRAOptions(initial_rank=10, target_rank=2, initial_phase=0.1, final_phase=30, interval=10)
    schedule = Schedule.of(options, 100)
    assert (schedule.initial, schedule.last) == (10, 70)
    assert [schedule.budget(t, 100, 20) for t in (0, 1, 10)] == [100] * 3
    for step in range(10, 71):
        assert schedule.budget(step, 100, 20) == int(20 + 80 * (1 - (step - 10) / 60) ** 3)
    assert [schedule.budget(t, 100, 20) for t in (70, 71, 100)] == [20] * 3
    assert [t for t in range(101) if schedule.allocates(t)] == [20, 30, 40, 50, 60]


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ({"initial_phase": 0, "final_phase": 1, "interval": 1}, 2),
        ({"initial_phase": 5, "final_phase": 7, "interval": 3}, 15),
        ({"initial_phase": 0.1, "final_phase": 0.3, "interval": 10}, 17),
        ({"initial_phase": 0.5, "final_phase": 0.49, "interval": 1}, None),
        ({"initial_phase": 0.3, "final_phase": 20, "interval": 4}, None),
    ],
)
def test_smallest_steps_is_minimal(phases: dict[str, float], expected: int | None) -> None:
    options = AdaLoRAOptions(**phases)
    steps = smallest_steps(options)
    assert steps == next(n for n in range(1, 1000) if Schedule.of(options, n).fits)
    if expected is not None:
        assert steps == expected


def test_the_penalty_and_its_gradient_match_the_formula() -> None:
    parameters = triplets()
    right, left = parameters[0::3], parameters[1::3]
    value = orthogonality(right, left)
    (2.5 * value).backward()
    exact = [p.detach().double().requires_grad_() for p in (*right, *left)]
    eye = torch.eye(RANK, dtype=torch.float64)
    expected = sum(((q @ q.T - eye) ** 2).sum() for q in exact[:3])
    expected = expected + sum(((p.T @ p - eye) ** 2).sum() for p in exact[3:])
    (2.5 * expected).backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip((*right, *left), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert orthogonality(right, left).item() == value.item(), "fp32 under any precision"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_rank": 13}, "target_rank 13 is above initial_rank 12"),
        ({"initial_phase": 1.5}, "must be integers"),
        ({"initial_phase": 0.6, "final_phase": 0.4}, "leave no share"),
        ({"interval": 0}, "greater than or equal to 1"),
        ({"beta1": 1.0}, "less than 1"),
        ({"orthogonality": -0.1}, "greater than or equal to 0"),
        ({"targets": []}, "at least one module"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AdaLoRAOptions(**options)


@pytest.mark.parametrize(
    "ranks",
    [
        {f"model.layers.{i}.mlp.up_proj": 4 for i in range(3)},
        {"model.layers.0.q": 0, "model.layers.2.k": 3},
        {"encoder.layer.0.query": 1, "decoder.layer.0.query": 2, "pooler.dense": 1},
        {f"h.{i}.c": i % 5 for i in range(100)},
    ],
    ids=["equal", "with holes", "two stacks", "deep"],
)
def test_the_picture_is_drawn(tmp_path: object, ranks: dict[str, int]) -> None:
    draw_ranks(ranks, [12, 12, 8], 8, 4, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")

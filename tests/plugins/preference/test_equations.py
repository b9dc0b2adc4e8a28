"""Every objective and its gradient in float64 against its paper's equation, for every split of an optimizer step.

The log-probabilities of the equations are those of transformers' own model, one example at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.core.training import float64 as f64
from tests.plugins.preference.conftest import judge, make_pairs
from torch import Tensor, nn

from budwood import Strategy, hookimpl
from budwood.testing.bench import register

WEIGHTS = (1.0, 0.5, 2.0, 1.0)


class Wide(Strategy):
    """Converts the model to float64."""

    api = 2
    after = ("adapter",)
    before = ("objective",)

    @hookimpl
    def prepare_model(self, model: nn.Module) -> nn.Module:
        return f64.wide(model)


def log_sigmoid(x: Tensor) -> Tensor:
    return torch.log(1 / (1 + torch.exp(-x)))


def odds(mean: Tensor) -> Tensor:
    return torch.exp(mean) / (1 - torch.exp(mean))


def of_pairs(loss: Callable[..., Tensor], weight: float = 1.0, sft: float = 0.0) -> Callable[..., Tensor]:
    """Return the total loss: the weighted mean over pairs of `loss(chosen, rejected)`, and the chosen labels."""

    def total(answers: list[f64.Scored]) -> Tensor:
        pairs = list(zip(answers[0::2], answers[1::2], strict=True))
        share = sum(WEIGHTS[: len(pairs)])
        mean = sum(w * loss(*pair) for w, pair in zip(WEIGHTS, pairs, strict=True)) / share
        chosen = answers[0::2]
        labels = sum(float(c.weights.sum()) for c in chosen)
        return weight * mean + sft * sum(-(c.log_probs * c.weights).sum() for c in chosen) / labels

    return total


def gain(answer: f64.Scored) -> Tensor:
    return answer.log_probs.sum() - answer.base.sum()


def mean_gain(answer: f64.Scored) -> Tensor:
    return gain(answer) / len(answer.labels)


def mean(answer: f64.Scored) -> Tensor:
    return answer.log_probs.sum() / len(answer.labels)


def dpo_sigmoid(c: f64.Scored, r: f64.Scored) -> Tensor:
    return -log_sigmoid(0.3 * (gain(c) - gain(r)))


def conservative(c: f64.Scored, r: f64.Scored) -> Tensor:
    margin = 0.3 * (gain(c) - gain(r))
    return -0.8 * log_sigmoid(margin) - 0.2 * log_sigmoid(-margin)


def robust(c: f64.Scored, r: f64.Scored) -> Tensor:
    margin = 0.3 * (gain(c) - gain(r))
    return (-0.8 * log_sigmoid(margin) + 0.2 * log_sigmoid(-margin)) / 0.6


CASES: dict[str, tuple[dict[str, Any], Callable[..., Tensor]]] = {
    "dpo": ({"dpo": {"beta": 0.3}}, of_pairs(dpo_sigmoid)),
    "dpo conservative": ({"dpo": {"beta": 0.3, "label_smoothing": 0.2}}, of_pairs(conservative)),
    "dpo robust": ({"dpo": {"loss": "robust", "beta": 0.3, "label_smoothing": 0.2}}, of_pairs(robust)),
    "dpo hinge": (
        {"dpo": {"loss": "hinge", "beta": 0.3}}, of_pairs(lambda c, r: F.relu(1 - 0.3 * (gain(c) - gain(r)))),
    ),
    "dpo ipo": (
        {"dpo": {"loss": "ipo", "beta": 0.3}}, of_pairs(lambda c, r: (mean_gain(c) - mean_gain(r) - 1 / 0.6) ** 2),
    ),
    "dpo normalised": (
        {"dpo": {"beta": 0.3, "length_normalized": True}},
        of_pairs(lambda c, r: -log_sigmoid(0.3 * (mean_gain(c) - mean_gain(r)))),
    ),
    "dpo with sft": ({"dpo": {"beta": 0.3, "sft": 0.4}}, of_pairs(dpo_sigmoid, sft=0.4)),
    "orpo": (
        {"orpo": {"weight": 0.7}},
        of_pairs(lambda c, r: -log_sigmoid(torch.log(odds(mean(c)) / odds(mean(r)))), weight=0.7, sft=1.0),
    ),
    "simpo": (
        {"simpo": {"beta": 1.5, "gamma": 0.4}}, of_pairs(lambda c, r: -log_sigmoid(1.5 * (mean(c) - mean(r)) - 0.4)),
    ),
    "cpo": (
        {"cpo": {"beta": 0.2, "sft": 0.6}},
        of_pairs(lambda c, r: -log_sigmoid(0.2 * (c.log_probs.sum() - r.log_probs.sum())), sft=0.6),
    ),
}  # fmt: skip


@pytest.fixture
def ready(make_recipe: Callable[..., Any]) -> Callable[..., Any]:
    """Function (strategy, rows) -> a float64 run and its engine before the first step, with a non-zero adapter."""
    name = register(Wide, "wide")

    def make(strategy: dict[str, Any], rows: list[Any]) -> Any:
        return f64.ready(make_recipe([{"lora": {"rank": 3}}, name, strategy], rows))

    return make


def splits(run: Any) -> dict[str, list[list[int]]]:
    """Return the run's examples in one, two and four micro-batches."""
    groups = [[i for i, g in enumerate(run.examples.groups) if g == group] for group in range(4)]
    return {
        "1x4": [sum(groups, [])],
        "2x2": [groups[0] + groups[1], groups[2] + groups[3]],
        "4x1": groups,
    }


def check(run: Any, engine: Any, expected: Tensor) -> None:
    """Compare loss and gradients of every split with those of `expected`, which has a graph to the parameters."""
    names, parameters = zip(*f64.named(run).items(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(expected, parameters), strict=True))
    for name, rows in splits(run).items():
        result = f64.take(run, engine, rows)
        torch.testing.assert_close(result.values["loss"], expected.detach(), rtol=1e-10, atol=1e-12, msg=name)
        torch.testing.assert_close(result.gradients, gradients, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_a_pair_objective_is_its_equation_in_any_split(case: str, ready: Callable[..., Any]) -> None:
    strategy, equation = CASES[case]
    rows = [{**row, "weight": weight} for row, weight in zip(make_pairs(4), WEIGHTS, strict=True)]
    run, engine = ready(strategy, rows)
    stock = f64.Stock(run)
    check(run, engine, equation([stock.score(i) for i in range(8)]))


@pytest.mark.parametrize("higher", [True, False], ids=["a positive baseline", "a baseline clipped at 0"])
def test_kto_is_its_equation_with_the_baseline_of_the_whole_step(higher: bool, ready: Callable[..., Any]) -> None:
    """Weights 1.3 and 0.8, β = 0.3; the baseline is the mean over the other rows' answers, without a gradient."""
    rows = [{**row, "weight": weight} for row, weight in zip(judge(make_pairs(4)), WEIGHTS, strict=True)]
    options = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8, "sft": 0.2}
    run, engine = ready({"kto": options}, rows)
    stock = f64.Stock(run)
    scored = [stock.score(i) for i in range(len(run.examples))]
    sign = 1 if (sum(float(gain(e)) for e in scored if e.columns["kto_mismatched"]) > 0) == higher else -1
    if sign < 0:  # move the policy to the other side of the reference
        with torch.no_grad():
            for name, parameter in f64.named(run).items():
                if name.endswith("lora_B"):
                    parameter.neg_()
        scored = [stock.score(i) for i in range(len(run.examples))]
    answers = [e for e in scored if not e.columns["kto_mismatched"]]
    others = [e for e in scored if e.columns["kto_mismatched"]]
    assert (len(answers), len(others)) == (4, 4)
    baseline = max(float(sum(gain(e) for e in others)) / len(others), 0.0)
    assert (baseline > 0) == higher, "the other case"
    total: Any = 0.0
    for e, weight in zip(answers, WEIGHTS, strict=True):
        if e.columns["desirable"]:
            total = total + weight * 1.3 * (1 - torch.sigmoid(0.3 * (gain(e) - baseline)))
        else:
            total = total + weight * 0.8 * (1 - torch.sigmoid(0.3 * (baseline - gain(e))))
    good = [e for e in answers if e.columns["desirable"]]
    sft = sum(-(e.log_probs * e.weights).sum() for e in good) / sum(float(e.weights.sum()) for e in good)
    check(run, engine, total / sum(WEIGHTS) + 0.2 * sft)

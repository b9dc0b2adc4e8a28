"""Each regulariser against its paper's equation in float64, and all of them together with the other strategies."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.conftest import make_base
from torch import Tensor

from budwood import CausalLM, InputError, LossTerm, tune
from budwood.contract.loading import build_strategy
from budwood.recipe.schema import Recipe

N, V = 5, 7
"""Labels and classes of the equations."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def step_of(labels: Tensor, reference: Tensor | None = None, task_weight: float = 0.6, **more: Any) -> Any:
    """A micro-step with these labels; `reference` are the logits of the start."""
    run = SimpleNamespace(task=CausalLM(), task_weight=task_weight, process_index=0, **more)
    found = None if reference is None else SimpleNamespace(logits=lambda positions: reference[positions].detach())
    return SimpleNamespace(
        run=run,
        batch=SimpleNamespace(labels=labels, columns={}),
        reference=lambda: found,
        micro_step=0,
        replaying=False,
        noise=None,
    )


def made(name: str, **options: Any) -> Any:
    return build_strategy(name, options, "test")


def total(terms: Any, plain: Tensor | None = None, task_weight: float = 0.6) -> Tensor:
    """The loss of terms of unit "label", and of the task's own values."""
    terms = [terms] if isinstance(terms, LossTerm) else terms
    assert all(term.unit == "label" and term.values.shape == (N,) for term in terms)
    loss = sum((term.weight * term.values.sum() for term in terms), torch.zeros((), dtype=torch.float64))
    return loss if plain is None else loss + task_weight * plain.sum()


def agree(loss: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """Compare values and gradients."""
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(value, inputs, retain_graph=True) for value in (loss, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


LABELS = torch.tensor([3, 0, 6, 2, 2])
POSITIONS = torch.arange(N)


def probabilities(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum(-1, keepdim=True)


def test_kl_start_is_the_divergence_in_either_direction() -> None:
    logits, start = draw(N, V), draw(N, V, seed=1)
    p, q = probabilities(logits), probabilities(start.detach())
    for direction, expected in (("reverse", p * (p / q).log()), ("forward", q * (q / p).log())):
        term = made("kl-start", weight=0.3, direction=direction).token_terms(
            step_of(LABELS, start), logits=logits, positions=POSITIONS
        )
        agree(total(term), 0.3 * expected.sum(), logits)


def test_entropy_is_subtracted_or_added() -> None:
    """Pereyra et al. (2017), equation 3: L − β H."""
    logits = draw(N, V)
    p = probabilities(logits)
    entropy = -(p * p.log()).sum()
    for direction, sign in (("bonus", -1), ("penalty", 1)):
        term = made("entropy", weight=0.2, direction=direction).token_terms(None, logits=logits, positions=POSITIONS)
        agree(total(term), sign * 0.2 * entropy, logits)


def test_label_smoothing_is_the_cross_entropy_with_smoothed_labels() -> None:
    """Szegedy et al. (2016), section 7: q'(k) = (1 − ε) δ + ε / K, with the weight that other strategies leave."""
    logits, epsilon = draw(N, V), 0.2
    strategy, run = made("label-smoothing", epsilon=epsilon), SimpleNamespace(task_weight=0.75)
    strategy.prepare_model(run, model=None)
    assert run.task_weight == pytest.approx(0.6)
    nll = -probabilities(logits).log()
    term = strategy.token_terms(step_of(LABELS), logits=logits, positions=POSITIONS)
    target = torch.full((N, V), epsilon / V, dtype=torch.float64)
    target[POSITIONS, LABELS] += 1 - epsilon
    agree(total(term, nll[POSITIONS, LABELS]), 0.75 * (target * nll).sum(), logits)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss(gamma: float) -> None:
    """Lin et al. (2017), equation 4: −(1 − p)^γ log p."""
    logits = draw(N, V)
    p = probabilities(logits)[POSITIONS, LABELS]
    log_probs = logits.log_softmax(-1)[POSITIONS, LABELS]
    term = made("focal", gamma=gamma).sequence_terms(step_of(LABELS), log_probs=log_probs)
    agree(total(term, -p.log()), 0.6 * (-((1 - p) ** gamma) * p.log()).sum(), logits)
    certain = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    sure = made("focal", gamma=gamma).sequence_terms(step_of(LABELS), log_probs=certain)
    assert torch.autograd.grad(total(sure, -certain), certain)[0].isfinite().all()


def test_r_drop_is_half_of_the_papers_loss() -> None:
    """Wu et al. (2021), equations 2 to 4: −log P₁ − log P₂ + α / 2 · (KL(P₁ ‖ P₂) + KL(P₂ ‖ P₁))."""
    one, two, alpha = draw(N, V), draw(N, V, seed=1), 0.7
    strategy, run = made("r-drop", alpha=alpha), SimpleNamespace(task_weight=1.0)
    strategy.prepare_model(run, model=None)
    step = step_of(LABELS, task_weight=run.task_weight)
    passes: list[Any] = []
    step.forward = lambda noise: passes.append(noise) or "second"
    step.logits = lambda outputs, positions: two[positions]
    p, q = probabilities(one), probabilities(two)
    paper = -(p.log() + q.log())[POSITIONS, LABELS].sum()
    paper = paper + alpha / 2 * (p * (p / q).log() + q * (q / p).log()).sum()
    terms = strategy.token_terms(step, logits=one, positions=POSITIONS)
    agree(total(terms, -p.log()[POSITIONS, LABELS], run.task_weight), paper / 2, one, two)
    strategy.token_terms(step, logits=one[:2], positions=POSITIONS[:2])
    assert len(passes) == 1, "one second pass for all chunks"


def test_penalties_of_parameters() -> None:
    """Li et al. (2018), equation 2, and a decay of ½ Σ λₗ ‖θₗ‖² with λ = 0.1 · 2^(last − l)."""
    values = {f"model.layers.{layer}.q_proj.lora_A": draw(2, 3, seed=layer) for layer in range(3)}
    values["score.weight"] = draw(3, 2, seed=9)
    trainable = [*values.values()]
    start = [draw(*value.shape, seed=20 + i).detach() for i, value in enumerate(trainable)]
    groups = [SimpleNamespace(parameters=values)]
    more = {"groups": groups, "trainable": trainable, "start": start, "start_adapter": None}
    step = step_of(LABELS, base=SimpleNamespace(new=("score.weight",)), **more)
    near = sum((p - p0).square().sum() for p, p0 in zip(trainable[:3], start[:3], strict=True))
    new = trainable[3].square().sum()
    strategy = made("l2-sp", alpha=0.4, beta=0.3)
    terms = strategy.loss_terms(step)
    loss = sum(term.weight * term.values for term in terms)
    agree(loss, 0.4 / 2 * near + 0.3 / 2 * new, *trainable)
    step.run.start_adapter = SimpleNamespace(
        infos={"base_model.model.score.weight": None}
    )  # a head that is continued is not new
    (term,) = strategy.loss_terms(step)
    head = (trainable[3] - start[3]).square().sum()
    agree(term.weight * term.values, 0.4 / 2 * (near + head), *trainable)
    decay = made("layer-decay", weight=0.1, factor=2.0)
    term = decay.loss_terms(step)
    expected = sum(0.1 / 2 * 2.0 ** (2 - layer) * trainable[layer].square().sum() for layer in range(3))
    agree(term.weight * term.values, expected, *trainable[:3])
    for change in ({"micro_step": 1}, {"replaying": True}):
        other = SimpleNamespace(**{**vars(step), **change})
        assert strategy.loss_terms(other) is None and decay.loss_terms(other) is None


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("regularised")
    make_base(folder / "base", num_hidden_layers=2, hidden_size=32, intermediate_size=64)
    rows = [{"prompt": f"word {'abc'[i % 3]}{i}:", "completion": f" data {i % 3}"} for i in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def recipe_of(files: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(*strategies: Any, quantization: str = "none", **train: Any) -> Recipe:
        return Recipe.from_dict(
            {
                "base": {"model": str(files / "base"), "quantization": quantization},
                "data": {"train": str(files / "train.jsonl"), "max_length": 32, "eval": "none"},
                "strategies": list(strategies),
                "train": {
                    "steps": 3, "batch_examples": 4, "micro_tokens": 48, "learning_rate": 1e-2, "precision": "fp32",
                    "schedule": "constant", "warmup": 0, **train,
                },
                "output": str(tmp_path / "run"),
            }
        )  # fmt: skip

    return make


ALL = [
    {"l2-sp": {}}, {"kl-start": {}}, {"r-drop": {}}, {"entropy": {}}, {"label-smoothing": {}}, {"focal": {}},
    {"layer-decay": {}},
]  # fmt: skip
WEIGHTS = {
    "causal_lm": 0.5 * 0.9, "l2_sp": 0.01, "kl_start": 0.1, "r_drop_nll": 0.45, "r_drop": 0.5, "entropy": -0.01,
    "label_smoothing": 0.05, "focal": 0.45, "layer_decay": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    ("adapter", "quantization"),
    [
        ({"lora": {"rank": 2, "dropout": 0.2}}, "none"),
        ({"adalora": {"initial_rank": 3, "target_rank": 2, "interval": 1, "final_phase": 1, "dropout": 0.2}}, "nf4"),
    ],
    ids=["lora", "adalora nf4"],
)
def test_all_of_them_compose(adapter: Any, quantization: str, recipe_of: Callable[..., Recipe]) -> None:
    others = [{"adversarial": {"method": "fgm", "epsilon": 0.5}}, {"distillation": {"teacher": "base", "weight": 0.2}}]
    run = tune(recipe_of(adapter, *others, *ALL, quantization=quantization), quiet=True)
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    weights = {name: weight * (0.8 if name in SHARES else 1) for name, weight in WEIGHTS.items()}
    weights |= {"distillation": 0.2, **({"orthogonality": 0.1} if "adalora" in adapter else {})}
    for line in (line for line in lines if line["kind"] == "step"):
        assert all(math.isfinite(line[name]) for name in weights)
        assert line["loss"] == pytest.approx(sum(weight * line[name] for name, weight in weights.items()), rel=1e-5)
        assert line["focal"] < 0 < line["entropy"]
    first, *_, last = [line for line in lines if line["kind"] == "step"]
    for name in ("l2_sp", "kl_start", "r_drop"):  # a new adapter changes nothing, with dropout or without
        assert first[name] == 0 < last[name]


SHARES = ("causal_lm", "r_drop_nll", "label_smoothing", "focal")
"""Terms of the task's share, of which the distillation takes a part."""


def test_r_drop_without_dropout_is_refused(recipe_of: Callable[..., Recipe]) -> None:
    with pytest.raises(InputError, match="nothing drops out, so both passes are equal: set dropout of the adapter"):
        tune(recipe_of("lora", "r-drop"), quiet=True)
    with pytest.raises(InputError, match="kl-start.* needs adapter|adapter"):
        tune(recipe_of("kl-start"), quiet=True)

"""Terms of log-probabilities in float64, against autograd on the full logits of a stock model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.training import float64 as f64

from budwood import LossTerm, PluginError, Step, Strategy, hookimpl
from budwood.model.evaluation import collate_for
from budwood.testing.bench import register

ROWS = {"1×8": [list(range(8))], "2×4": [[0, 1, 2, 3], [4, 5, 6, 7]], "4×2": [[0, 1], [2, 3], [4, 5], [6, 7]]}
ALONE = [[i] for i in range(8)]
FGM = {"adversarial": {"method": "fgm", "epsilon": 0.5, "weight": 0.6}}
FREELB = {"adversarial": {"method": "freelb", "epsilon": 0.5, "steps": 2}}
DISTILLATION = {"distillation": {"teacher": "base", "temperature": 2.0, "weight": 0.4}}


@pytest.fixture(autouse=True)
def installed() -> None:
    f64.install()


@pytest.fixture
def ready(make_recipe: Callable) -> Callable:
    """Function (strategies, pairs, lora, **sections) -> a float64 run and its engine."""

    def make(*strategies: Any, pairs: bool = True, lora: dict[str, Any] | None = None, **sections: Any) -> Any:
        chosen = [{"lora": {"rank": 3, **(lora or {})}}, {"exact": {"pairs": pairs}}, *strategies]
        return f64.ready(make_recipe(strategies=chosen, **sections))

    return make


@pytest.mark.parametrize("split", ROWS)
@pytest.mark.parametrize("share", [1.0, 0.0])
def test_a_preference_over_pairs(ready: Callable, split: str, share: float) -> None:
    run, engine = ready("preference")
    run.task_weight = share
    result = f64.take(run, engine, ROWS[split])
    f64.agree(result, f64.expect(run, ROWS[split], [f64.own("causal_lm", share), f64.preference]))


@pytest.mark.parametrize("rows", [ROWS["1×8"], ROWS["2×4"], ALONE])
@pytest.mark.parametrize("chunk", [3, 256])
def test_clipped_ratios_over_labels_and_a_custom_unit(
    ready: Callable, rows: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from budwood.model import evaluation

    monkeypatch.setattr(evaluation, "CHUNK", chunk)
    run, engine = ready("ratio", pairs=False)
    result = f64.take(run, engine, rows)
    f64.agree(result, f64.expect(run, rows, [f64.own("causal_lm", 1.0), f64.ratio(run.counts)]))


@pytest.mark.parametrize("rows", [ROWS["1×8"], ROWS["4×2"]])
@pytest.mark.parametrize(("method", "main", "replay"), [(FGM, 1.0, 0.6), (FREELB, 0.5, 0.5)])
def test_under_noise_combined_with_distillation(
    ready: Callable, rows: Any, method: Any, main: float, replay: float
) -> None:
    run, engine = ready("preference", "ratio", method, DISTILLATION, "spy")
    result = f64.take(run, engine, rows)
    passes = f64.noise_of(run, result, main, replay)
    assert len(passes) == 2
    terms = [f64.own("causal_lm", 0.6), f64.preference, f64.ratio(run.counts), f64.distilled]
    f64.agree(result, f64.expect(run, rows, terms, passes=passes))


@pytest.mark.parametrize("lora", [{"modules_to_save": ["lm_head"]}, {}])
def test_a_trainable_head_runs_twice_and_a_frozen_one_once(ready: Callable, lora: dict[str, Any]) -> None:
    run, engine = ready("preference", "ratio", DISTILLATION, lora=lora)
    run.hooks.register_core(Heads(), "heads")
    rows, frozen = ROWS["2×4"], not lora
    f64.take(run, engine, rows)  # detects whether the head is trainable
    Heads.calls = 0
    result = f64.take(run, engine, rows)
    assert Heads.calls == (2 if frozen else 4), "one chunk per micro-batch"
    terms = [f64.own("causal_lm", 0.6), f64.preference, f64.ratio(run.counts), f64.distilled]
    f64.agree(result, f64.expect(run, rows, terms))


class Heads:
    """Counts the forward passes of the head that build a graph."""

    calls = 0

    @hookimpl(wrapper=True)
    def forward(self, step: Any) -> Any:
        outputs = yield
        head = outputs.head

        def counted(rows: torch.Tensor) -> torch.Tensor:
            Heads.calls += torch.is_grad_enabled()
            return head(rows)

        outputs.head = counted
        return outputs


def test_a_classification(ready: Callable, write: Callable) -> None:
    words = ("games", "fonts", "libs")
    rows = [{"text": f"{words[i % 3]} number {i} " + "x " * (i % 5), "label": words[i % 3]} for i in range(12)]
    labelled = write(rows, "labelled.jsonl")
    run, engine = ready("preference", "ratio", base={"task": "sequence-classification"}, data={"train": str(labelled)})
    for rows in (ROWS["1×8"], ROWS["4×2"]):
        result = f64.take(run, engine, rows)
        terms = [f64.own("sequence_classification", 1.0), f64.preference, f64.ratio(run.counts)]
        f64.agree(result, f64.expect(run, rows, terms))


@pytest.mark.parametrize("lora", [{}, {"modules_to_save": ["lm_head"]}])
def test_a_loss_scale_multiplies_the_gradients_but_not_the_values(ready: Callable, lora: dict[str, Any]) -> None:
    run, engine = ready("preference", "ratio", lora=lora)
    engine.loss_scale = torch.tensor(512.0)
    result = f64.take(run, engine, ROWS["2×4"])
    terms = [f64.own("causal_lm", 1.0), f64.preference, f64.ratio(run.counts)]
    f64.agree(result, f64.expect(run, ROWS["2×4"], terms), scale=512.0)


def test_the_reference_is_the_base_or_the_start_and_is_computed_once(ready: Callable) -> None:
    run, engine = ready("preference", DISTILLATION)
    stock, rows = f64.Stock(run), [0, 1, 2, 3]
    batch = collate_for(run, [run.examples[i] for i in rows], 0)
    run.start = [p.detach().clone() for p in run.trainable]
    before = torch.cat([stock.score(i).log_probs for i in rows]).detach()
    base = torch.cat([stock.score(i).base for i in rows])
    torch.testing.assert_close(Step(run, batch, engine).reference().log_probs, base, atol=1e-12, rtol=1e-12)
    for _ in range(3):
        f64.take(run, engine, [rows])
        run.optimizer.step()
    step = Step(run, batch, engine)
    now = torch.cat([stock.score(i).log_probs for i in rows])
    assert bool(((now - before).abs() > 1e-3).any()), "the steps must have moved the adapter"
    run.start_adapter = object()  # as if the run continued an adapter
    start = step.reference()
    torch.testing.assert_close(start.log_probs, before, atol=1e-12, rtol=1e-12)
    assert not start.log_probs.requires_grad
    positions = torch.tensor([1, 0])
    chosen = start.logits(positions).log_softmax(-1).gather(-1, batch.labels[positions][:, None])[:, 0]
    torch.testing.assert_close(chosen, before[positions], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(step.reference("base").log_probs, base, atol=1e-12, rtol=1e-12)
    again = torch.cat([stock.score(i).log_probs for i in rows])
    assert torch.equal(now, again), "the adapter is unchanged"
    assert run.model.training


def test_two_strategies_share_one_reference_before_the_policys_forward(ready: Callable) -> None:
    run, engine = ready("preference", DISTILLATION, FGM)
    order: list[str] = []
    handle = run.model.get_decoder().register_forward_pre_hook(
        lambda module, args: order.append("policy" if torch.is_grad_enabled() else "reference")
    )
    f64.take(run, engine, ROWS["2×4"])
    handle.remove()
    assert order == ["reference", "policy", "policy"] * 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_log_probabilities_at_a_temperature(ready: Callable, temperature: float) -> None:
    run, _ = ready("ratio")
    logits = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (7,))
    result = run.task.log_probs(logits, labels, temperature)
    expected = (logits / temperature).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(result, expected, atol=1e-13, rtol=1e-13)
    factors = torch.randn(7, dtype=torch.float64)
    (one,) = torch.autograd.grad((result * factors).sum(), logits)
    (other,) = torch.autograd.grad((expected * factors).sum(), logits)
    torch.testing.assert_close(one, other, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("lora", [{}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("rows", [ROWS["1×8"], ROWS["4×2"]])
def test_strategies_with_different_temperatures(
    ready: Callable, lora: dict[str, Any], rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy's ratio at its sampling temperature, alongside a preference and the task's loss at 1."""
    hot: dict[str, float] = {"ratio": 1.7, "contrast": 0.6}
    monkeypatch.setattr(f64.Ratio, "log_prob_temperature", hot["ratio"])
    monkeypatch.setattr(f64.Contrast, "log_prob_temperature", hot["contrast"])
    run, engine = ready("preference", "ratio", "contrast", lora=lora)
    found = f64.take(run, engine, rows)

    def ratio(examples: list[f64.Scored]) -> dict[str, tuple[torch.Tensor, float]]:
        return f64.ratio(run.counts)([example.at(hot["ratio"]) for example in examples])

    terms = [f64.own("causal_lm", 1.0), f64.preference, ratio]
    f64.agree(found, f64.expect(run, rows, terms, f64.across, step_temperature=hot["contrast"]))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), "hot"])
def test_a_temperature_that_is_not_a_positive_number(
    ready: Callable, temperature: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f64.Ratio, "log_prob_temperature", temperature)
    with pytest.raises(PluginError, match=r"'ratio'.*: log_prob_temperature must be positive and finite, not"):
        ready("ratio")


class Detached(Strategy):
    api = 2

    @hookimpl
    def sequence_terms(self, step: Any, log_probs: torch.Tensor) -> LossTerm:
        return LossTerm("detached", log_probs.detach() * 2)


class Elsewhere(Strategy):
    api = 2

    @hookimpl
    def sequence_terms(self, step: Any, log_probs: torch.Tensor) -> LossTerm:
        return LossTerm("elsewhere", log_probs.detach() * step.run.trainable[0].sum())


class Short(Strategy):
    api = 2

    @hookimpl
    def sequence_terms(self, step: Any, log_probs: torch.Tensor) -> LossTerm:
        return LossTerm("short", log_probs[1:])


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Detached, "loss term 'detached' of sequence_terms has no graph to the log-probabilities"),
        (Elsewhere, "loss term 'elsewhere' of sequence_terms has no graph to the log-probabilities"),
        (Short, "loss term 'short' of sequence_terms: values must be .* of unit 'label'"),
    ],
)
def test_a_term_that_cannot_be_used_is_named(ready: Callable, strategy: Any, message: str) -> None:
    run, engine = ready(register(strategy))
    with pytest.raises(PluginError, match=message) as error:
        f64.take(run, engine, ROWS["1×8"])
    assert f"strategy '{strategy.__name__.lower()}'" in str(error.value)

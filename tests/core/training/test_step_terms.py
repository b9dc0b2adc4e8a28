"""Losses across an optimizer step in float64: equal for every split, and equal to autograd on the complete step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.core.training import float64 as f64

from budwood import LossTerm, PluginError, Strategy, hookimpl
from budwood.testing.bench import register, registered
from budwood.testing.probe import named_parameters
from budwood.testing.processes import tune_in_processes
from budwood.training.loop import tune

SPLITS = {"1×8": [list(range(8))], "2×4": [[0, 1, 2, 3], [4, 5, 6, 7]], "8×1": [[i] for i in range(8)]}
FGM = {"adversarial": {"method": "fgm", "epsilon": 0.5, "weight": 0.6}}
FREELB = {"adversarial": {"method": "freelb", "epsilon": 0.5, "steps": 2}}
DISTILLATION = {"distillation": {"teacher": "base", "temperature": 2.0, "weight": 0.4}}


@pytest.fixture(autouse=True)
def installed() -> None:
    f64.install()


@pytest.fixture
def ready(make_recipe: Callable) -> Callable:
    """Function (strategies, pairs, lora, **sections) -> a float64 run and its engine."""

    def make(*strategies: Any, pairs: bool = False, lora: dict[str, Any] | None = None, **sections: Any) -> Any:
        chosen = [{"lora": {"rank": 3, **(lora or {})}}, {"exact": {"pairs": pairs}}, *strategies]
        return f64.ready(make_recipe(strategies=chosen, **sections))

    return make


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("lora", [{}, {"modules_to_save": ["lm_head"]}])
def test_in_batch_negatives_however_the_step_is_split(ready: Callable, split: str, lora: dict[str, Any]) -> None:
    run, engine = ready("contrast", lora=lora)
    expected = f64.expect(run, SPLITS["1×8"], [f64.own("causal_lm", 1.0)], f64.across)
    f64.agree(f64.take(run, engine, SPLITS[split]), expected)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("method", "main", "replay"), [(FGM, 1.0, 0.6), (FREELB, 0.5, 0.5)])
def test_coefficients_under_noise_are_those_of_the_clean_model(
    ready: Callable, split: str, method: Any, main: float, replay: float
) -> None:
    run, engine = ready("contrast", "ratio", method, DISTILLATION, "spy")
    result = f64.take(run, engine, SPLITS[split])
    passes = f64.noise_of(run, result, main, replay)
    assert len(passes) == 2
    terms = [f64.own("causal_lm", 0.6), f64.ratio(run.counts), f64.distilled]
    f64.agree(result, f64.expect(run, SPLITS[split], terms, f64.across, passes))


def test_a_classification_and_a_loss_scale(ready: Callable, write: Callable) -> None:
    rows = [{"text": f"text number {i} " + "x " * (i % 5), "label": "abc"[i % 3]} for i in range(12)]
    sections = {"base": {"task": "sequence-classification"}, "data": {"train": str(write(rows, "labelled.jsonl"))}}
    run, engine = ready("contrast", **sections)
    engine.loss_scale = torch.tensor(256.0)
    expected = f64.expect(run, SPLITS["1×8"], [f64.own("sequence_classification", 1.0)], f64.across)
    for split in SPLITS.values():
        f64.agree(f64.take(run, engine, split), expected, scale=256.0)


@pytest.mark.parametrize("strategies", [["contrast"], ["contrast", "ratio"]])
def test_with_dropout_a_micro_batch_replays_the_collected_values(
    ready: Callable, strategies: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, torch.Tensor]] = []
    original = f64.Contrast.step_values

    def step_values(self: Any, step: Any, outputs: Any, log_probs: torch.Tensor) -> dict[str, torch.Tensor]:
        values = original(self, step, outputs, log_probs)
        seen.append((torch.is_grad_enabled(), torch.cat([values["embedding"].flatten(), values["score"]]).detach()))
        return values

    monkeypatch.setattr(f64.Contrast, "step_values", hookimpl(step_values))
    run, engine = ready(*strategies, lora={"dropout": 0.5})
    torch.manual_seed(3)
    f64.take(run, engine, SPLITS["2×4"])
    assert [graph for graph, _ in seen] == [False, False, True, True]
    for (_, gathered), (_, replayed) in zip(seen[:2], seen[2:], strict=True):
        torch.testing.assert_close(gathered, replayed, atol=0, rtol=0)
    seen.clear()
    f64.take(run, engine, SPLITS["2×4"])
    assert not torch.equal(seen[0][1], gathered), "another step draws another dropout mask"


def test_a_single_unperturbed_micro_batch_needs_no_first_pass(ready: Callable) -> None:
    run, engine = ready("contrast")
    with f64.count_calls(run.task, "outputs") as calls:
        f64.take(run, engine, SPLITS["1×8"])
        assert len(calls) == 1
        f64.take(run, engine, SPLITS["2×4"])
        assert len(calls) == 5


@pytest.mark.parametrize("graph", [False, True])
def test_out_of_memory_while_values_are_collected_or_replayed(
    ready: Callable, graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, engine = ready("contrast", pairs=True)  # the step is split again, and pairs stay adjacent
    expected = f64.expect(run, SPLITS["1×8"], [f64.own("causal_lm", 1.0)], f64.across)
    original, failed = type(run.task).outputs, []

    def outputs(self: Any, model: Any, batch: Any) -> Any:
        if len(batch.keys) > 3 and torch.is_grad_enabled() == graph:
            failed.append(batch)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, model, batch)

    monkeypatch.setattr(type(run.task), "outputs", outputs)
    result = f64.take(run, engine, SPLITS["2×4"])
    assert failed
    f64.agree(result, expected)


@pytest.mark.scale
def test_two_processes_equal_one_process(make_recipe: Callable, tmp_path: Path) -> None:
    """In float64, so that rounding does not flip the sign of AdamW's normalised update."""
    strategies = [
        {"lora": {"rank": 3}}, {"exact": {"pairs": True}}, "contrast", "preference", "ratio", FGM,
    ]  # fmt: skip
    train = {"steps": 3, "micro_tokens": 128, "batch_examples": 4}
    recipes = [make_recipe(name, strategies=strategies, train=train) for name in ("two", "one")]
    (two,) = tune_in_processes([recipes[0].to_dict()], registered(), tmp_path)
    assert not two.error, two.error
    assert two.world == two.processes == 2
    one = tune(recipes[1], quiet=True)
    for name in ("loss", "causal_lm", "contrast", "spread", "preference", "ratio", "answer_ratio", "gradient_norm"):
        assert two.metrics[name] == pytest.approx(one.metrics[name], rel=1e-6), name
    parameters = load_file(two.parameters)
    expected = named_parameters(one)
    assert set(parameters) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(parameters[name].double(), tensor.double(), atol=1e-5, rtol=0)
        assert float(tensor.detach().abs().max()) > 1e-3


class Alone(Strategy):
    api = 2

    @hookimpl
    def step_terms(self, values: dict[str, torch.Tensor]) -> LossTerm:
        return LossTerm("alone", values["none"].sum(), "step")


class Valued(Strategy):
    """Returns one value; each subclass defines its term."""

    api = 2

    @hookimpl
    def step_values(self, log_probs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mean": log_probs.mean()[None]}


class Constant(Valued):
    @hookimpl
    def step_terms(self, values: dict[str, torch.Tensor]) -> LossTerm:
        return LossTerm("constant", values["mean"].detach().sum(), "step")


class PerLabel(Valued):
    @hookimpl
    def step_terms(self, values: dict[str, torch.Tensor]) -> LossTerm:
        return LossTerm("per_label", values["mean"])


class Twice(Valued):
    @hookimpl
    def step_terms(self, values: dict[str, torch.Tensor]) -> list[LossTerm]:
        return [LossTerm("twice", values["mean"].sum(), "step")] * 2


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Alone, "hook 'step_terms' has no effect without 'step_values'"),
        (Constant, "loss term 'constant' of step_terms does not depend on its values"),
        (PerLabel, "loss term 'per_label' of step_terms must be a scalar of unit 'step', not .* of unit 'label'"),
        (Twice, "two loss terms of step_terms are called 'twice'"),
    ],
)
def test_step_terms_that_cannot_be_used_are_named(ready: Callable, strategy: Any, message: str) -> None:
    with pytest.raises(PluginError, match=message) as error:
        f64.take(*ready(register(strategy)), SPLITS["2×4"])
    assert "strategy '" in str(error.value)

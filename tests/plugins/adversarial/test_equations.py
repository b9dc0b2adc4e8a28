"""Each method against its paper's equations in float64: the noise, and the accumulated gradient of a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from budwood.contract.examples import Example
from budwood.model import text_tasks
from budwood.model.text_tasks import SequenceClassification

from .conftest import Ready
from .reference import Reference, median_norm, naive

METHODS: list[dict[str, Any]] = [
    {"method": "fgm", "epsilon": 0.7},
    {"method": "fgm", "epsilon": 0.02, "norm": "linf", "weight": 0.5, "clean_weight": 2.0},
    {"method": "fgm", "clean_weight": 0},
    {"method": "pgd", "epsilon": 0.6, "steps": 3, "step_size": 0.3},
    {"method": "pgd", "epsilon": 0.02, "steps": 2, "norm": "linf", "weight": 0.5},
    {"method": "pgd", "steps": 2, "clean_weight": 0, "skip_special": True},
    {"method": "freelb", "epsilon": 0.5, "steps": 3, "step_size": 0.3},
    {"method": "freelb", "epsilon": 0.02, "steps": 2, "norm": "linf", "skip_masked": True},
    {"method": "smart", "epsilon": 0.02, "step_size": 0.05},
    {"method": "smart", "epsilon": 0.5, "norm": "l2", "steps": 2, "step_size": 0.3, "sigma": 0.01, "weight": 3.0},
    {"method": "vat", "epsilon": 1.5, "skip_special": True},
    {"method": "vat", "epsilon": 1.0, "steps": 2, "weight": 0.5, "xi": 0.5},
    {"method": "neftune"},
    {"method": "neftune", "alpha": 2.0, "skip_masked": True, "skip_special": True},
]


def name(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


def by_example(ready: Ready, noise_of_step: list[Tensor]) -> dict[int, Tensor]:
    """Return the noise [T, d] of each example, extracted from the batches."""
    result: dict[int, Tensor] = {}
    for step, noise in zip(ready.steps, noise_of_step, strict=True):
        flat = noise.flatten(0, 1)
        for index, example in enumerate(step.batch.keys):
            result[example] = flat[step.batch.example_of_position == index]
        assert not flat[step.batch.example_of_position < 0].any(), "noise on padding"
    return result


def compare(recipe: Any, noises: list[Any], scaling: float = 2.0) -> None:
    ready = Ready(recipe)
    noises.clear()
    gradients = ready.step()
    per_step = len(noises) // len(ready.steps)
    last = [noises[(i + 1) * per_step - 1] for i in range(len(ready.steps))]
    strategy = next(s for s in ready.run.strategies if s.name == "adversarial")
    options = strategy.options
    special = set(ready.run.tokenizer.all_special_ids)

    def mask(example: Example) -> Tensor:
        allowed = torch.ones(len(example.inputs["input_ids"]), 1, dtype=torch.float64)
        if options.skip_special:
            allowed *= torch.tensor([[i not in special] for i in example.inputs["input_ids"].tolist()])
        if options.skip_masked:
            labelled = torch.zeros(len(allowed), dtype=torch.bool)
            labelled[example.label_positions + 1] = True
            allowed *= labelled[:, None]
        return allowed

    reference = Reference(ready.run, scaling)
    if options.method != "neftune":
        assert strategy.scale.norm == pytest.approx(median_norm(reference), rel=1e-6)
    expected, total = naive(reference, strategy, mask)
    actual = by_example(ready, last)
    assert actual.keys() == expected.keys()
    for example, noise in expected.items():
        torch.testing.assert_close(actual[example].double(), noise, atol=1e-5, rtol=1e-3)
        assert float(noise.abs().max()) > 1e-3
    expected_gradients = reference.gradients(total / ready.run.counts["label"])
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[key].double(), gradient, atol=1e-5, rtol=1e-3, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("options", METHODS, ids=name)
def test_packed_rows(make_recipe: Callable, noises: list[Any], options: dict[str, Any]) -> None:
    compare(make_recipe(options, train={"micro_tokens": 200}), noises)


ONE_EACH = [METHODS[0], METHODS[3], METHODS[6], METHODS[8], METHODS[11], METHODS[12]]


@pytest.mark.parametrize("options", ONE_EACH, ids=name)
def test_decoder_classifier(make_recipe: Callable, noises: list[Any], options: dict[str, Any]) -> None:
    compare(make_recipe(options, base={"task": "sequence-classification"}), noises)


@pytest.mark.parametrize(
    ("options", "packed"),
    [*((options, False) for options in ONE_EACH), *((options, True) for options in ONE_EACH[2:4])],
    ids=lambda value: ("packed" if value else "padded") if isinstance(value, bool) else name(value),
)
def test_encoder(
    make_recipe: Callable, noises: list[Any], bert: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any],
    packed: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(SequenceClassification, "packs_rows", lambda self, model: packed)
    monkeypatch.setattr(text_tasks, "width_multiple", lambda model: 32)  # as in 16 bit
    base = {"task": "sequence-classification", "model": str(bert)}
    compare(make_recipe(options, base=base, train={"micro_tokens": 256}), noises)


@pytest.mark.parametrize("options", ONE_EACH[1:4], ids=name)  # FGM and VAT replay passes as PGD and SMART do
def test_gradient_checkpointing_changes_nothing(make_recipe: Callable, options: dict[str, Any]) -> None:
    plain = Ready(make_recipe(options, "a")).step()
    checkpointed = Ready(make_recipe(options, "b", train={"gradient_checkpointing": True})).step()
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, atol=1e-6, rtol=1e-4)

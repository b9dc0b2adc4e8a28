"""The check of packed rows before the first step: it ignores rounding, and reports a model that needs padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.architectures import CHANGES, build

from budwood import PluginError
from budwood.model.ops import attention
from budwood.planning.check import check
from budwood.recipe.schema import Recipe
from budwood.training import packing_check
from budwood.training.loop import tune

Make = Callable[..., Recipe]
PADDED = "rows are padded, not packed, for this model"


@pytest.fixture
def leak(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Function `leak(share)`: from then on, attention adds this share of the mean over the complete packed row."""
    inside = attention._packed

    def install(share: float) -> None:
        def outside(*arguments: Any) -> torch.Tensor:
            out = inside(*arguments)
            return out + share * out.mean(1, keepdim=True)

        monkeypatch.setattr(attention, "_packed", outside)

    return install


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_are_packed(make_recipe: Make, said: list[str], precision: str) -> None:
    run = tune(make_recipe(train={"precision": precision, "steps": 1}))
    assert run.packed and not any(PADDED in line for line in said)


def test_a_last_bit_that_linears_with_8_bit_inputs_make_a_percent_of_is_rounding(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Core's attention and the model's own differ in it, on any machine that computes in fp32."""
    inside = attention._packed
    monkeypatch.setattr(attention, "_packed", lambda *arguments: inside(*arguments) * (1 + 1e-5))
    run = tune(make_recipe(train={"precision": "fp32", "steps": 1}, base={"quantization": "int8"}))
    assert run.packed


@pytest.mark.parametrize(("precision", "share"), [("fp32", 0.01), ("bf16", 0.5)])
def test_a_model_that_mixes_examples_gets_padded_rows(
    make_recipe: Make, said: list[str], leak: Callable[[float], None], precision: str, share: float
) -> None:
    leak(share)
    run = tune(make_recipe(train={"precision": precision, "steps": 1}))
    assert not run.packed
    assert any(line.startswith(f"{PADDED}: packed, its logits differ by ") for line in said)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_rounding_in_a_deep_model_does_not_cause_padding(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    """Simulates a model whose rounding exceeds the tolerance although its examples are independent."""
    monkeypatch.setattr(packing_check, "ROUNDING", -1.0)
    run = tune(make_recipe(train={"precision": "bf16", "steps": 1}, base={"quantization": quantization}))
    assert run.packed


def test_a_little_mixing_is_distinguished_from_rounding(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, said: list[str], leak: Callable[[float], None]
) -> None:
    monkeypatch.setattr(packing_check, "ROUNDING", 0.0)
    leak(0.02)
    run = tune(make_recipe(train={"precision": "bf16", "steps": 1}))
    assert not run.packed and any(PADDED in line for line in said)


def test_a_model_whose_logits_differ_even_unpacked_is_rejected(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = packing_check._own_logits
    monkeypatch.setattr(packing_check, "_own_logits", lambda run, batch: 2 * own(run, batch))
    with pytest.raises(
        PluginError, match="LlamaForCausalLM: logits at labels differ .* by 50.0%; the model class is not supported"
    ):
        tune(make_recipe(train={"steps": 1}))


def test_a_model_that_takes_packed_rows_only_below_a_length_gets_padded_ones(
    make_recipe: Make, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek-V4 compresses the keys of every 128 positions; examples are shorter here, the run's rows longer."""
    monkeypatch.delitem(CHANGES, "deepseek_v4")
    build("deepseek_v4", "causal-lm", tmp_path / "base")
    recipe = make_recipe(base={"model": str(tmp_path / "base")}, train={"steps": 1})
    assert "not planned" not in str(check(recipe).rows)
    run = tune(recipe)
    assert not run.packed and run.examples.lengths.max() < 128
    assert f"{PADDED}: it does not support packed rows (RuntimeError)" in said

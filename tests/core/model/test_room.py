"""Dequantised weights that a CPU keeps: the same bits, in the memory that is free, until the base changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from budwood import AdapterPool
from budwood.model.base import load_base
from budwood.model.ops.linear import frozen_linear, low_rank_linear
from budwood.model.quantizers import quantizer_of
from budwood.model.quantizers.room import ROOM, dequantized_bytes, keep_dequantized, room_in
from budwood.planning.admission import admit
from budwood.planning.estimate import estimate
from budwood.planning.options import Device
from budwood.recipe.schema import Recipe
from budwood.training.loop import tune

PLENTY = 1 << 40


def base(folder: Path, quantization: str = "nf4", dtype: torch.dtype = torch.bfloat16) -> Any:
    return load_base(folder, quantization, "AutoModelForCausalLM", dtype).model


def kept(model: Any) -> dict[str, Tensor]:
    """Return the weights that are kept."""
    keepers = {name: module.__dict__.get(ROOM) for name, module in model.named_modules()}
    return {name: keeper.weight for name, keeper in keepers.items() if keeper and keeper.weight is not None}


def pass_through(linear: Any, x: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    """Return outputs and gradients of the module itself, alone and with an update, and its output without a graph."""
    found = []
    for function in (linear, lambda x: frozen_linear(x, linear), lambda x: low_rank_linear(x, linear, a, b, 2.0)):
        inputs = x.clone().requires_grad_()
        y = function(inputs)
        y.sum().backward()
        found += [y.detach(), inputs.grad]
    with torch.no_grad():
        return [*found, linear(x[:1])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_results_are_the_same_bits(tiny_base: Path, quantization: str, dtype: torch.dtype) -> None:
    model = base(tiny_base, quantization, dtype)
    linear = model.model.layers[0].mlp.up_proj
    draw = torch.Generator().manual_seed(0)
    x, a, b = (
        torch.randn(*shape, generator=draw)
        for shape in ((3, 5, linear.in_features), (2, linear.in_features), (linear.out_features, 2))
    )
    for inputs, autocast in ((x.to(dtype), False), (x, dtype == torch.bfloat16)):
        with torch.autocast("cpu", dtype, autocast):
            expected = pass_through(linear, inputs, a.to(dtype), b.to(dtype))
            assert keep_dequantized(model, PLENTY, dtype) == dequantized_bytes(model, dtype) > 0
            pass_through(linear, inputs, a.to(dtype), b.to(dtype))
            found = pass_through(linear, inputs, a.to(dtype), b.to(dtype))
        assert list(kept(model)) == ["model.layers.0.mlp.up_proj"]
        assert all(y.dtype == other.dtype and torch.equal(y, other) for y, other in zip(found, expected, strict=True))
        model = base(tiny_base, quantization, dtype)
        linear = model.model.layers[0].mlp.up_proj


def test_as_many_are_kept_as_there_is_room_for(tiny_base: Path) -> None:
    model, ids = base(tiny_base), torch.tensor([[1, 5, 9]])
    total = dequantized_bytes(model, torch.bfloat16)
    expected = model(ids).logits
    assert keep_dequantized(model, 0, torch.bfloat16) == 0 and keep_dequantized(model, -1, torch.bfloat16) == 0
    assert keep_dequantized(model, 2 * total, torch.bfloat16) == room_in(2 * total) == total // 2
    assert torch.equal(model(ids).logits, expected)
    held = sum(weight.nbytes for weight in kept(model).values())
    assert 0 < held <= total // 2 and "model.layers.0.self_attn.q_proj" in kept(model)
    assert torch.equal(model(ids).logits, expected)


def test_a_base_that_changes_is_dequantised_again(tiny_base: Path) -> None:
    model = base(tiny_base)
    keep_dequantized(model, PLENTY, torch.bfloat16)
    linear = model.model.layers[0].mlp.down_proj
    quantizer: Any = quantizer_of(linear)
    first = quantizer.dequantized(linear, torch.bfloat16)
    assert quantizer.dequantized(linear, torch.bfloat16) is first
    assert quantizer.dequantized(linear, torch.float32).dtype == torch.float32
    left = linear.__dict__[ROOM].room.left
    weight = torch.randn(linear.out_features, linear.in_features)
    linear.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")  # as LoftQ
    second = quantizer.dequantized(linear, torch.bfloat16)
    assert torch.equal(second, quantizer.dequantize(linear, torch.bfloat16)) and not torch.equal(second, first)
    linear.weight.zero_()  # frozen, so that no graph forbids it
    third = quantizer.dequantized(linear, torch.bfloat16)
    assert torch.equal(third, quantizer.dequantize(linear, torch.bfloat16)) and not torch.equal(third, second)
    linear.weight.quant_state.absmax.add_(1)
    fourth = quantizer.dequantized(linear, torch.bfloat16)
    assert torch.equal(fourth, quantizer.dequantize(linear, torch.bfloat16))
    assert linear.__dict__[ROOM].room.left == left + first.nbytes  # that of fp32 took twice as much


def test_copies_and_inference_mode(tiny_base: Path) -> None:
    with torch.inference_mode():
        pool_like = base(tiny_base)
        keep_dequantized(pool_like, PLENTY, torch.bfloat16)
        expected = pool_like(torch.tensor([[1, 5, 9]])).logits
        assert not kept(pool_like)
        assert torch.equal(pool_like(torch.tensor([[1, 5, 9]])).logits, expected)
    model = base(tiny_base)
    keep_dequantized(model, PLENTY, torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(model(torch.tensor([[1, 5, 9]])).logits, expected)
    model(torch.tensor([[1, 5, 9]]))
    twin = copy.deepcopy(model)
    assert kept(model) and not kept(twin)
    assert torch.equal(twin(torch.tensor([[1, 5, 9]])).logits, expected)
    assert not kept(twin)  # the room is taken


def test_int8_and_16_bit_keep_nothing(tiny_base: Path) -> None:
    for quantization in ("int8", "none"):
        model = base(tiny_base, quantization)
        assert keep_dequantized(model, PLENTY, torch.bfloat16) == 0
        assert not any(ROOM in module.__dict__ for module in model.modules())


def test_a_run_keeps_what_its_plan_leaves_free(
    make_recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str], tiny_base: Path
) -> None:
    sections: dict[str, Any] = {"train": {"steps": 2}, "strategies": ["lora"]}
    model = {"model": str(tiny_base), "quantization": "nf4"}
    one = tune(make_recipe("one", base=model, **sections), planner=admit)
    assert "dequantised weights are kept, in " in capsys.readouterr().err
    assert len(kept(one.model)) == len(one.model.model.layers) * 7
    plain = make_recipe("two", base=model | {"keep_dequantized": False}, **sections)
    two = tune(plain, planner=admit)
    assert "dequantised weights" not in capsys.readouterr().err and not kept(two.model)
    first, second = (load_file(run.directory / "adapter" / "adapter_model.safetensors") for run in (one, two))
    assert all(torch.equal(first[name], second[name]) for name in first)
    planned = estimate(make_recipe("three", base=model, **sections), Device("a CPU", "cpu", 1 << 34))
    assert planned.kept == planned.dequantized == dequantized_bytes(base(tiny_base), one.dtype)
    tight = estimate(make_recipe("four", base=model, **sections), Device("a CPU", "cpu", planned.needed + 4000))
    assert tight.fits and tight.kept == pytest.approx(1000, abs=100_000) and tight.needed <= planned.needed + 4000
    assert estimate(plain, Device("a CPU", "cpu", 1 << 34)).kept == 0


def test_an_engine_keeps_them_and_answers_alike(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = AdapterPool(tiny_base, "nf4", device="cpu")
    answer = pool.generate(["The quick"], max_new_tokens=6)[0].text
    assert len(kept(pool.model)) == len(pool.model.model.layers) * 7
    monkeypatch.setattr("budwood.serving.engine.available", lambda _: 0)
    without = AdapterPool(tiny_base, "nf4", device="cpu")
    assert without.generate(["The quick"], max_new_tokens=6)[0].text == answer and not kept(without.model)

"""The conformance kit, and use in a pool together with a LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from budwood import AdapterPool, CorruptError, InputError
from budwood.testing import StrategyConformance
from budwood.testing.bench import Bench, Spec
from budwood_lora import LoRA
from safetensors.torch import load_file

from budwood_scaling import Scaling


class TestScaling(StrategyConformance):
    strategy = Scaling


class TestScalingEverything(StrategyConformance):
    strategy = Scaling
    options = {"targets": "all-linear"}
    does_not_apply = {"composes_with": "tested with the default targets"}


@pytest.fixture(scope="module")
def adapters() -> dict[str, Path]:
    """Folders of a trained scaling and a trained LoRA on the kit's base."""
    runs = {"scaling": TestScaling.bench().run("a run"), "lora": Bench(Spec(LoRA, {"rank": 2})).run("a run")}
    return {name: run.adapter for name, run in runs.items()}


@pytest.mark.parametrize("order", [("scaling", "lora"), ("lora", "scaling")])
def test_it_swaps_with_a_lora_and_shares_a_batch_with_it(adapters: dict[str, Path], order: tuple[str, str]) -> None:
    pool = AdapterPool(TestScaling.bench().files.base, precision="fp32", device="cpu")
    prompts = ["the quick", "brown fox", "jumps over"]
    base = pool.logits(prompts)
    alone = {}
    for name in order:
        pool.load(name, adapters[name])
        pool.use(name)
        alone[name] = pool.logits(prompts)
        assert float((alone[name] - base).abs().max()) > 0.01
    for name in order:
        pool.use(name)
        assert torch.equal(pool.logits(prompts), alone[name])
    pool.use(None)
    assert torch.equal(pool.logits(prompts), base)

    mixed = pool.generate(prompts, adapters=["lora", "scaling", None], max_new_tokens=8)
    for prompt, name, answer in zip(prompts, ("lora", "scaling", None), mixed, strict=True):
        pool.use(name)
        assert pool.generate([prompt], max_new_tokens=8)[0].text == answer.text

    pool.use(order[1])
    pool.unload(order[0])
    assert torch.equal(pool.logits(prompts), alone[order[1]])
    pool.unload(order[1])
    assert torch.equal(pool.logits(prompts), base)


def test_rows_and_positions_are_scaled_by_their_adapter() -> None:
    model = AdapterPool(TestScaling.bench().files.base, precision="fp32", device="cpu").model
    path = "model.layers.0.self_attn.k_proj"
    linear = model.get_submodule(path)
    x = torch.randn(3, 2, linear.in_features)
    with torch.no_grad():
        base = linear(x)
        strategy, vectors = Scaling(), {name: torch.rand(base.shape[-1]) for name in ("a", "b")}
        for name, vector in vectors.items():
            strategy.attach_adapter(model, {"modules": [path]}, {path: vector}, name)
        strategy.use_adapters(model, ["a", "b"], index=[1, -1, 0])
        expected = torch.stack([base[0] * vectors["b"], base[1], base[2] * vectors["a"]])
        assert torch.equal(linear(x), expected)
        strategy.use_adapters(model, ["a", "b"], index=[1, 1, -1, -1, 0, 0])  # one packed row
        torch.testing.assert_close(linear(x.reshape(1, 6, -1)), expected.reshape(1, 6, -1))
        strategy.use_adapters(model, [], index=[])
        assert torch.equal(linear(x), base)


def test_merging_multiplies_rows(adapters: dict[str, Path]) -> None:
    pool = AdapterPool(TestScaling.bench().files.base, precision="fp32", device="cpu")
    path = "model.layers.0.self_attn.k_proj"
    before = pool.model.get_submodule(path).weight.clone()
    pool.load("scaling", adapters["scaling"])
    pool.merge("scaling")
    vector = load_file(adapters["scaling"] / "adapter_model.safetensors")[path]
    torch.testing.assert_close(pool.model.get_submodule(path).weight, before * vector[:, None])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "'modules' must be a list of names"),
        ({"modules": ["model.norm"]}, "the base has no linear module 'model.norm'"),
        ({"modules": ["model.layers.0.self_attn.k_proj"]}, "not expected"),
    ],
)
def test_invalid_adapters_are_refused(adapters: dict[str, Path], config: dict, message: str) -> None:
    model = TestScaling.bench().run("a run").run.model
    with pytest.raises(CorruptError, match=message):
        Scaling().attach_adapter(model, config, {"x": torch.ones(1)}, "a")


def test_an_unknown_target_is_refused_before_the_base_loads() -> None:
    recipe = Bench(Spec(Scaling, {"targets": ["k_porj"]})).recipe("refused")
    from budwood import tune

    with pytest.raises(InputError, match="no linear module is called 'k_porj'. Did you mean 'k_proj'?"):
        tune(recipe, quiet=True, overwrite=True)


def test_the_file_matches_the_readme(adapters: dict[str, Path]) -> None:
    config = json.loads((adapters["scaling"] / "adapter_config.json").read_text())
    tensors = load_file(adapters["scaling"] / "adapter_model.safetensors")
    assert config["modules"] == sorted(tensors, key=config["modules"].index)
    assert all(tensor.ndim == 1 and tensor.dtype == torch.float32 for tensor in tensors.values())

"""LoRA against float64 and stock PEFT: initialisation, file, attaching, detaching and merging."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from budwood import load_base
from budwood.adapters.peft_layers import live_adapters
from budwood.adapters.use import use_adapters
from budwood.errors import CorruptError, InputError
from budwood.model.text_tasks import CausalLM
from budwood_lora.layers import plan_dora
from budwood_lora.options import LoRAOptions
from budwood_lora.strategy import LoRA

IDS = torch.arange(5, 25)[None]


def load(folder: Path, quantization: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    config = None
    if quantization:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False).eval()


def put_on(model: Any, folder: Path, randomise: bool = True, **options: Any) -> tuple[LoRA, Any]:
    """Set up LoRA on `model` as a run does, with random weights instead of zeros."""
    strategy = LoRA(LoRAOptions(**options), "lora")
    section = SimpleNamespace(task="causal-lm", model=str(folder))
    task = CausalLM()
    run = SimpleNamespace(
        task=task,
        recipe=SimpleNamespace(base=section),
        seed=0,
        model=model,
        base=None,
        start_adapter=None,
        planning=False,
    )
    strategy.prepare_model(run=run, model=model)
    run.groups = strategy.trainable_parameters(run=run, model=model)
    if randomise:
        torch.manual_seed(1)
        with torch.no_grad():
            for group in run.groups:
                for parameter in group.parameters.values():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    return strategy, run


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def test_a_plan_in_this_process_changes_no_later_run(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's DoRA then reads a weight as before: another last bit of its norm would be another adapter."""
    from peft.tuners.lora import dora

    bases = [load_base(str(tiny_base), kind, "AutoModelForCausalLM", torch.float32) for kind in ("int8", "nf4", "none")]
    linears = [base.model.model.layers[0].mlp.up_proj for base in bases]
    before = [dora.dequantize_module_weight(linear) for linear in linears]
    monkeypatch.setattr(dora, "dequantize_module_weight", dora.dequantize_module_weight)
    plan_dora(torch.float16)
    assert all(torch.equal(dora.dequantize_module_weight(one), old) for one, old in zip(linears, before, strict=True))


VARIANTS: list[dict[str, Any]] = [
    {},
    {"rank": 3, "alpha": 7, "rslora": True, "targets": ["q_proj", "down_proj"], "layers": [1]},
    {"dora": True},
    {"init": "gaussian", "targets": r".*\.mlp\..*", "dropout": 0.2},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["norm", "embed_tokens"]},
    {"targets": ["q_proj", "lm_head"]},
]


@pytest.mark.parametrize("quantization", [None, "nf4", "fp4"])
@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(o) or "default")
def test_an_adapter_starts_as_the_base_and_detaches_without_a_trace(
    tiny_base: Path, tmp_path: Path, options: dict[str, Any], quantization: str | None
) -> None:
    model = load(tiny_base, quantization)
    before, modules = logits(model), [type(m) for m in model.modules()]
    strategy, run = put_on(model, tiny_base, randomise=False, **options)
    if options.get("dora"):
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(logits(model), before)
    with torch.no_grad():
        for group in run.groups:
            for parameter in group.parameters.values():
                parameter.add_(0.05)
    on = logits(model)
    assert not torch.equal(on, before)
    use_adapters(strategy, model, [])
    assert torch.equal(logits(model), before)
    use_adapters(strategy, model, ["default"])
    assert torch.equal(logits(model), on)
    strategy.detach_adapter(model=model, name="default")
    assert torch.equal(logits(model), before)
    assert [type(m) for m in model.modules()] == modules
    assert live_adapters(model) is None


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(o) or "default")
def test_its_file_gives_the_same_logits_in_stock_peft_and_when_reloaded(
    tiny_base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = load(tiny_base)
    strategy, run = put_on(model, tiny_base, **options)
    on = logits(model)
    strategy.export(run=run, model=model, directory=tmp_path)
    peer = PeftModel.from_pretrained(load(tiny_base), tmp_path).eval()
    torch.testing.assert_close(logits(peer), on, atol=1e-5, rtol=1e-5)

    fresh = load(tiny_base)
    before = logits(fresh)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    strategy.attach_adapter(model=fresh, config=config, tensors=tensors, name="a")
    assert torch.equal(logits(fresh), before), "an attached adapter is inactive"
    use_adapters(strategy, fresh, ["a"])
    assert torch.equal(logits(fresh), on)
    strategy.merge_adapter(model=fresh, name="a")
    torch.testing.assert_close(logits(fresh), on, atol=1e-4, rtol=1e-4)
    assert live_adapters(fresh) is None


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_forward_and_gradients_match_the_formula(tiny_base: Path, quantization: str | None) -> None:
    """y = x (W + s B A)ᵀ in float64, for each linear."""
    import bitsandbytes as bnb

    model = load(tiny_base, quantization)
    put_on(model, tiny_base, rank=4, alpha=6)
    checked = 0
    for path, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        base = layer.base_layer
        weight = base.weight
        if quantization:
            weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        weight = weight.double()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        x = torch.randn(2, 5, weight.shape[1], requires_grad=True)
        grad = torch.randn(2, 5, weight.shape[0])
        y = layer(x)
        y.backward(grad)
        exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
        expected = exact[0] @ (weight + 1.5 * exact[2] @ exact[1]).t()
        expected.backward(grad.double())
        torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-4, msg=path)
        for ours, theirs in zip((x, a, b), exact, strict=True):
            torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-4, rtol=1e-4, msg=path)
        a.grad = b.grad = None
        checked += 1
    assert checked == 14


def test_each_row_of_a_batch_uses_its_adapter(tiny_base: Path, tmp_path: Path) -> None:
    model = load(tiny_base)
    strategy, run = put_on(model, tiny_base)
    strategy.export(run=run, model=model, directory=tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    fresh = load(tiny_base)
    base = logits(fresh)
    strategy.attach_adapter(model=fresh, config=config, tensors=tensors, name="a")
    halved = {k: v / 2 for k, v in tensors.items()}
    strategy.attach_adapter(model=fresh, config=config, tensors=halved, name="ab")
    alone = {}
    for name in ("a", "ab"):
        use_adapters(strategy, fresh, [name])
        alone[name] = logits(fresh)
    use_adapters(strategy, fresh, ["ab", "a"], [0, -1, 1])
    together = logits(fresh, IDS.repeat(3, 1))
    torch.testing.assert_close(together[0], alone["ab"][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1], base[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[2], alone["a"][0], atol=1e-5, rtol=1e-5)
    strategy.detach_adapter(model=fresh, name="a")
    use_adapters(strategy, fresh, ["ab"])
    assert torch.equal(logits(fresh), alone["ab"])


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_detached_and_saved(tmp_path: Path, bias: str) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    base = tmp_path / "base"
    Qwen2ForCausalLM(config).save_pretrained(base)
    model = load(base)
    before = logits(model)
    strategy, run = put_on(model, base, bias=bias)
    assert any(group.name == "bias" and len(group.parameters) == 3 for group in run.groups)
    on = logits(model)
    strategy.export(run=run, model=model, directory=tmp_path)
    peer = PeftModel.from_pretrained(load(base), tmp_path).eval()
    torch.testing.assert_close(logits(peer), on, atol=1e-5, rtol=1e-5)
    use_adapters(strategy, model, [])
    assert torch.equal(logits(model), before)
    config_json = json.loads((tmp_path / "adapter_config.json").read_text())
    fresh = load(base)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    strategy.attach_adapter(model=fresh, config=config_json, tensors=tensors, name="a")
    assert torch.equal(logits(fresh), before)
    use_adapters(strategy, fresh, ["a"])
    assert torch.equal(logits(fresh), on)
    strategy.merge_adapter(model=fresh, name="a")
    torch.testing.assert_close(logits(fresh), on, atol=1e-4, rtol=1e-4)


def test_training_biases_of_a_model_without_biases_is_refused(tiny_base: Path) -> None:
    model = load(tiny_base)
    with pytest.raises(InputError, match="no such biases"):
        put_on(model, tiny_base, bias="all")


@pytest.mark.parametrize("damage", ["renamed", "missing", "surplus", "shape"])
def test_a_corrupt_adapter_is_refused_and_does_not_change_the_model(
    tiny_base: Path, tmp_path: Path, damage: str
) -> None:
    model = load(tiny_base)
    strategy, run = put_on(model, tiny_base)
    strategy.export(run=run, model=model, directory=tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(iter(tensors))
    if damage == "renamed":
        tensors["base_model.other"] = tensors.pop(key)
    elif damage == "missing":
        del tensors[key]
    elif damage == "surplus":
        tensors["more"] = torch.zeros(1)
    else:
        tensors[key] = tensors[key][:, :-1].contiguous()
    fresh = load(tiny_base)
    before = logits(fresh)
    with pytest.raises(CorruptError):
        strategy.attach_adapter(model=fresh, config=config, tensors=tensors, name="a")
    assert torch.equal(logits(fresh), before)
    assert live_adapters(fresh) is None


def test_unsupported_variants_are_refused_by_name(tiny_base: Path) -> None:
    strategy = LoRA(LoRAOptions(), "lora")
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "use_qalora": True}
    with pytest.raises(InputError, match="use_qalora"):
        strategy.attach_adapter(model=load(tiny_base), config=config, tensors={}, name="a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["q_porj"]}, "no linear module is called 'q_porj'. Did you mean 'q_proj'?"),
        (
            {"targets": ["embed_tokens"]},
            "'embed_tokens' is an embedding, which has no low-rank updates: use modules_to_save",
        ),
        ({"targets": ["input_layernorm"]}, "'input_layernorm' is not a linear module"),
        ({"targets": "nothing.*"}, "matches none of the linear modules"),
        ({"layers": [7]}, "there is no layer 7; the model has 0 to 1"),
        ({"modules_to_save": ["lm_haed"]}, "no module 'lm_haed'. Did you mean 'lm_head'?"),
    ],
)
def test_targets_without_a_match_suggest_the_closest_name(
    tiny_base: Path, options: dict[str, Any], message: str
) -> None:
    import re

    with pytest.raises(InputError, match=re.escape(message)):
        put_on(load(tiny_base), tiny_base, **options)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal", "loftq", "other"])
def test_initialisations_that_change_the_base_are_refused(init: str) -> None:
    with pytest.raises(ValidationError):
        LoRAOptions(init=init)


def test_lora_plus_scales_the_learning_rate_of_b(tiny_base: Path) -> None:
    _, run = put_on(load(tiny_base), tiny_base, learning_rate_ratio=16)
    assert {group.name: group.learning_rate_ratio for group in run.groups} == {"lora_A": 1.0, "lora_B": 16}

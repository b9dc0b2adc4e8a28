"""Stock PEFT adapters: each config field has the effect that it has in PEFT, or is refused with a remedy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.conftest import make_base
from transformers import AutoModelForCausalLM, PhiConfig

from budwood import AdapterPool, CorruptError, InputError
from budwood.adapters.peft_config import REFUSED, honoured
from budwood.serving.merge import merge
from budwood_adalora import options as adalora
from budwood_lora import options as lora

IDS = torch.tensor([[1, 40, 50, 60, 70, 99, 7]])


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@torch.no_grad()
def stock(base: Path, folder: Path, model: Any = None, seed: int = 0, **fields: Any) -> Path:
    """Save a stock PEFT adapter with every trained parameter moved away from its initial value."""
    torch.manual_seed(seed)
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | fields))
    model = get_peft_model(load(base) if model is None else model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name or "trainable_tokens_delta" in name:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def peft_logits(base: Path, folder: Path) -> torch.Tensor:
    return PeftModel.from_pretrained(load(base), folder).eval()(IDS).logits


@torch.no_grad()
def budwood_logits(base: Path, folder: Path) -> torch.Tensor:
    pool = AdapterPool(base, "none", precision="fp32", device="cpu")
    pool.load("a", folder)
    pool.use("a")
    return pool.model(IDS).logits


def rewrite(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("config", "fields", "unused"),
    [(LoraConfig, lora.SavedConfig, ()), (AdaLoraConfig, adalora.SavedConfig, adalora.UNUSED)],
)
def test_every_field_of_the_installed_peft_is_honoured_or_refused(config, fields, unused):
    known = {field.name for field in dataclasses.fields(config)}
    taken = honoured(fields, unused) | {"init_lora_weights"}  # some of its values are refused
    assert known - taken <= set(REFUSED)
    assert all(REFUSED.values())


HONOURED: list[dict[str, Any]] = [
    {"lora_bias": True, "target_modules": ["q_proj", "down_proj"]},
    {"target_modules": ["q_proj", "no_such_module"]},
    {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": r".*\.mlp\..*_proj", "exclude_modules": r".*down_proj"},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 9], "layers_pattern": ["h", "layers"]},
    {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "layers.1.mlp": 3}, "alpha_pattern": {"q_proj": 3}},
    {"target_modules": "all-linear", "rank_pattern": {r"^model.layers.0.*": 2}, "use_rslora": True},
    {"target_modules": ["q_proj"], "use_dora": True},
    {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},  # PEFT matches input_layernorm too
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "classifier"]},
    {"target_modules": "all-linear", "modules_to_save": ["layers.0.mlp"]},
    {"target_modules": ["q_proj", "lm_head"]},  # PEFT saves the base's own head too
    {"target_modules": ["q_proj"], "bias": "none", "lora_dropout": 0.5},
    {"target_modules": ["q_proj"], "trainable_token_indices": [99, 40]},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [99, 40], "lm_head": [99, 40]}},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [40], "lm_head": [99, 7, 0]}},
    *({"target_modules": ["q_proj"], "init_lora_weights": init} for init in (False, "gaussian", "orthogonal", "mica")),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fields", HONOURED, ids=lambda fields: " ".join(map(str, fields.items()))[:80])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_it_answers_as_in_peft_and_merges(tiny_base, tiny_bases, tmp_path, fields, tied):
    changed = {
        *fields.get("modules_to_save", []),
        *fields["target_modules"],
        *fields.get("trainable_token_indices", []),
    }
    if tied and not {"lm_head", 99} & changed:
        pytest.skip("nothing tied changes")
    base = tiny_bases("tied", tie_word_embeddings=True) if tied else tiny_base
    if "lora_bias" in fields:
        base = tiny_bases("biased", attention_bias=True, mlp_bias=True)
    folder = stock(base, tmp_path / "adapter", **fields)
    expected = peft_logits(base, folder)
    assert (expected - load(base)(IDS).logits).abs().max() > 1e-2
    torch.testing.assert_close(budwood_logits(base, folder), expected, atol=1e-4, rtol=1e-4)
    merge(folder, tmp_path / "merged", base=str(base), dtype="fp32")
    torch.testing.assert_close(load(tmp_path / "merged")(IDS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ends", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=str)
def test_what_was_tied_is_merged_into_two_tensors(tiny_bases, tmp_path, ends):
    base = tiny_bases("tied", tie_word_embeddings=True)
    folder = stock(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=ends)
    report = merge(folder, tmp_path / "merged", base=str(base), dtype="fp32")
    assert report.weights == len(ends) + 2  # q_proj of two layers
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    tensors, old = load_file(tmp_path / "merged" / "model.safetensors"), load_file(base / "model.safetensors")
    embedding = old["model.embed_tokens.weight"]
    assert torch.equal(tensors["model.embed_tokens.weight"], embedding) is ("embed_tokens" not in ends)
    assert torch.equal(tensors["lm_head.weight"], embedding) is ("lm_head" not in ends)
    torch.testing.assert_close(load(tmp_path / "merged")(IDS).logits, peft_logits(base, folder), atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_initialisation_that_changes_the_base_is_refused_until_it_is_converted(tiny_base, tmp_path, init):
    fields = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": init, "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    model = get_peft_model(load(tiny_base), LoraConfig(**fields))
    model.peft_config["default"].init_lora_weights = True  # as in PEFT's guide
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        expected = model.eval()(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="changes the base's weights.*path_initial_model_for_weight_conversion"):
        budwood_logits(tiny_base, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    torch.testing.assert_close(budwood_logits(tiny_base, tmp_path / "converted"), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"init_lora_weights": "corda"},
            "init_lora_weights: \"corda\"': this initialisation changes the base's weights",
        ),
        ({"init_lora_weights": "lora_ga"}, "convert it with PEFT"),
        ({"init_lora_weights": "loftq"}, "save the base that LoftQ made"),
        ({"init_lora_weights": "of_2027"}, "convert it with PEFT"),
        ({"alora_invocation_tokens": [5]}, "use it with PEFT"),
        ({"ensure_weight_tying": True}, "merge_and_unload"),
        ({"target_parameters": ["experts.down_proj"]}, "experts.down_proj': the model has no such experts"),
        ({"target_parameters": ["embed_tokens.weight"]}, "not the experts of a mixture.*merge_and_unload"),
        (
            {"a_new_field": None, "peft_version": "9.9"},
            r"'a_new_field: null' is not a field of PEFT .*PEFT 9\.9 wrote it",
        ),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"'model.embed_tokens' is not a linear module \(Embedding\)"),
        ({"target_modules": ["q_proj", "mlp"]}, r"is not a linear module \(LlamaMLP\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_refused_with_the_remedy(tiny_base, tmp_path, fields, message):
    folder = rewrite(stock(tiny_base, tmp_path / "adapter", target_modules=["q_proj"]), **fields)
    with pytest.raises(InputError, match=message):
        budwood_logits(tiny_base, folder)


RESIZED: list[dict[str, Any]] = [
    {"trainable_token_indices": [300, 301, 40]},
    {"trainable_token_indices": {"embed_tokens": [301], "lm_head": [300, 301]}},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"modules_to_save": ["lm_head"]},
    {},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fields", RESIZED, ids=lambda fields: " ".join(map(str, fields.items())) or "frozen")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_adapter_of_a_resized_base_brings_the_new_rows_along(tiny_base, tiny_bases, tmp_path, fields, tied):
    """PEFT saves the embedding tables of a resized base along with the trained tensors."""
    base = tiny_bases("tied", tie_word_embeddings=True) if tied else tiny_base
    torch.manual_seed(1)
    larger = load(base)
    larger.resize_token_embeddings(302)
    folder = stock(base, tmp_path / "adapter", model=larger, target_modules=["q_proj"], **fields)
    ids = torch.tensor([[1, 300, 40, 99, 301, 300]])
    model = load(base)
    model.resize_token_embeddings(302)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(model, folder).eval()(ids).logits
        pool = AdapterPool(base, "none", precision="fp32", device="cpu")
        alone = pool.model(IDS).logits
        pool.load("a", folder)
        assert torch.equal(pool.model(IDS).logits, alone)
        pool.use("a")
        torch.testing.assert_close(pool.model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        merge(folder, tmp_path / "merged", base=str(base), dtype="fp32")
        torch.testing.assert_close(load(tmp_path / "merged")(ids).logits, expected, atol=1e-4, rtol=1e-4)
        pool.merge("a")
        torch.testing.assert_close(pool.model(ids).logits, expected, atol=1e-4, rtol=1e-4)


TOKENS: list[tuple[Any, type[Exception], str]] = [
    ([-1, 5], CorruptError, "has a negative or repeated token id"),
    ([5, 5], CorruptError, "has a negative or repeated token id"),
    ([5], CorruptError, "trainable_token_indices: 1 rows of 'model.embed_tokens', but the file has 2"),
    ({"no_such_module": [5, 6]}, CorruptError, "trainable_token_indices: the model has no 'no_such_module'"),
    ({"lm_head": [5, 6]}, CorruptError, "2 rows of 'lm_head', but the file has 0"),
    ({"q_proj": [5, 6]}, InputError, "'.*q_proj' is neither the input embeddings nor the head: merge it"),
    ([5, 301], InputError, "has 300 rows, and the adapter has row 301 but not all before it"),
    ([5, 10**12], InputError, "has 300 rows, and the adapter has row 1,000,000,000,000 but not all before it"),
    ([5, "6"], CorruptError, "trainable_token_indices"),
    (5, CorruptError, "trainable_token_indices"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("value", "error", "message"), TOKENS, ids=lambda value: str(value)[:40])
def test_token_indices_that_do_not_fit_are_refused(tiny_base, tmp_path, value, error, message):
    folder = stock(tiny_base, tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=[5, 6])
    with pytest.raises(error, match=message):
        budwood_logits(tiny_base, rewrite(folder, trainable_token_indices=value))


@pytest.mark.filterwarnings("ignore")
def test_rows_of_a_head_with_a_bias_are_refused(tmp_path):
    torch.manual_seed(0)
    config = PhiConfig(vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    base = make_base(tmp_path / "base")
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    folder = stock(base, tmp_path / "a", target_modules=["q_proj"], trainable_token_indices={"lm_head": [5, 6]})
    with pytest.raises(InputError, match="'lm_head' is neither a plain embedding table nor a linear without bias"):
        budwood_logits(base, folder)


@pytest.mark.filterwarnings("ignore")
def test_two_adapters_may_have_rows_of_one_module(tiny_base, tmp_path):
    tokens: list[Any] = [[5, 40], {"embed_tokens": [40, 99], "lm_head": [7]}]
    folders = [
        stock(tiny_base, tmp_path / str(i), target_modules=["q_proj"], trainable_token_indices=ids, seed=i)
        for i, ids in enumerate(tokens)
    ]
    pool = AdapterPool(tiny_base, "none", precision="fp32", device="cpu")
    for folder in folders:
        pool.load(folder.name, folder)
    for folder in folders:
        pool.use(folder.name)
        with torch.no_grad():
            torch.testing.assert_close(pool.model(IDS).logits, peft_logits(tiny_base, folder), atol=1e-4, rtol=1e-4)


def test_embeddings_of_another_base_are_refused(tiny_base, tmp_path):
    folder = stock(tiny_base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="is another 'lm_head' than the base's.*merge_and_unload"):
        budwood_logits(tiny_base, folder)


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_adapt_replace_and_train_rows_of_one_module_share_a_base(tiny_base, tmp_path):
    folders = {
        "adapted": stock(tiny_base, tmp_path / "adapted", target_modules=["q_proj", "lm_head"]),
        "whole": stock(tiny_base, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["lm_head"], seed=1),
        "rows": stock(
            tiny_base, tmp_path / "rows", target_modules=["q_proj"], trainable_token_indices={"lm_head": [5, 6]}
        ),
    }
    pool = AdapterPool(tiny_base, "none", precision="fp32", device="cpu")
    expected = pool.model(IDS).logits
    for name, folder in folders.items():
        pool.load(name, folder)
    for name, folder in folders.items():
        pool.use(name)
        with torch.no_grad():
            torch.testing.assert_close(pool.model(IDS).logits, peft_logits(tiny_base, folder), atol=1e-4, rtol=1e-4)
    mixed = pool.generate([IDS[0].tolist()] * 4, [None, *folders], max_new_tokens=4)
    for name, answer in zip([None, *folders], mixed, strict=True):
        assert pool.generate([IDS[0].tolist()], [name], max_new_tokens=4)[0].tokens == answer.tokens
    for name in folders:
        pool.unload(name)
    assert torch.equal(pool.model(IDS).logits, expected)

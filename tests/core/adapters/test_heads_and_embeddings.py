"""Heads and embeddings adapted, trained whole or by rows: as in PEFT, or refused as not supported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.conftest import make_base, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from budwood import AdapterPool, InputError
from budwood.adapters.targets import match_targets
from budwood.adapters.whole import saved_modules
from budwood.contract.strategy import RUN_ADAPTER
from budwood.serving.merge import merge
from budwood.serving.verify import verify
from budwood.testing import tiny_encoder
from budwood.training.loop import tune

IDS = torch.tensor([[1, 40, 50, 60, 70, 99, 7]])
SMALL = {"vocab_size": 300, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "pad_token_id": 0}
BASES: dict[str, tuple[PreTrainedConfig, str, str, str]] = {  # with the names of the embeddings, head and a linear
    "gpt2": (GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, pad_token_id=0), "wte", "lm_head", "c_attn"),
    "gemma3": (
        Gemma3TextConfig(intermediate_size=32, num_key_value_heads=1, head_dim=16, **SMALL),
        "embed_tokens", "lm_head", "q_proj",
    ),
    "phi": (PhiConfig(intermediate_size=32, **SMALL), "embed_tokens", "lm_head", "q_proj"),
    "opt": (OPTConfig(ffn_dim=32, word_embed_proj_dim=16, **SMALL), "embed_tokens", "lm_head", "q_proj"),
    "neox": (GPTNeoXConfig(intermediate_size=32, **SMALL), "embed_in", "embed_out", "query_key_value"),
}  # fmt: skip
T5 = T5Config(
    vocab_size=300, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
)  # fmt: skip
WAYS = ["target head", "whole head", "whole embeddings", "whole both", "rows"]


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@torch.no_grad()
def stock(base: Path, folder: Path, **fields: Any) -> torch.Tensor:
    """Save a stock PEFT adapter that changes the model; return its logits in PEFT."""
    torch.manual_seed(0)
    model = get_peft_model(load(base), LoraConfig(r=4, task_type="CAUSAL_LM", **fields))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(load(base), folder).eval()(IDS).logits


@pytest.fixture
def random_base(tmp_path: Path) -> Any:
    """Function (name) -> a random base of `BASES`."""

    def make(name: str) -> Path:
        path = make_base(tmp_path / "base")
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(BASES[name][0]).save_pretrained(path)
        return path

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BASES)
def test_stock_adapters_answer_as_in_peft_and_merge(random_base, tmp_path, name, way):
    _, embeddings, head, linear = BASES[name]
    fields: dict[str, Any] = {
        "target head": {"target_modules": [linear, head]},
        "whole head": {"modules_to_save": [head]},  # GPT-NeoX has no 'embed_out': PEFT ignores it
        "whole embeddings": {"modules_to_save": [embeddings]},
        "whole both": {"modules_to_save": [embeddings, head]},
        "rows": {"trainable_token_indices": [99, 40]},
    }[way]
    base, folder = random_base(name), tmp_path / "adapter"
    expected = stock(base, folder, **{"target_modules": [linear], **fields})
    pool = AdapterPool(base, "none", precision="fp32", device="cpu")
    alone = pool.model(IDS).logits
    pool.load("a", folder)
    pool.use("a")
    torch.testing.assert_close(pool.model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    pool.unload("a")
    assert torch.equal(pool.model(IDS).logits, alone)
    merge(folder, tmp_path / "merged", base=str(base), dtype="fp32")
    torch.testing.assert_close(load(tmp_path / "merged")(IDS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_the_runs_own_adapters_answer_the_same_in_stock_peft(make_recipe, tiny_bases, options, tied):
    base = tiny_bases("tied" if tied else "untied", tie_word_embeddings=tied)
    adapter = (
        tune(make_recipe(base={"model": str(base)}, strategies=[{"lora": options}]), quiet=True).directory / "adapter"
    )
    pool = AdapterPool(base, "none", precision="fp32", device="cpu")
    pool.load("a", adapter)
    pool.use("a")
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load(base), adapter).eval()(IDS).logits
        assert not torch.allclose(expected, load(base)(IDS).logits, atol=1e-3)
        torch.testing.assert_close(pool.model(IDS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("quantization", "precision"), [("nf4", "bf16"), ("none", "fp16")])
def test_embeddings_that_train_whole_in_fp32_answer_in_the_runs_precision(make_recipe, quantization, precision):
    recipe = make_recipe(
        evaluate=True, base={"quantization": quantization}, train={"precision": precision, "eval_generate": 4},
        strategies=[{"lora": {"modules_to_save": ["embed_tokens"]}}],
    )  # fmt: skip
    run = tune(recipe, quiet=True)
    assert "eval_exact_match" in run.metrics and verify(run.directory / "adapter").exact


@pytest.mark.parametrize(
    ("name", "task", "module", "precision"),
    [
        ("encoder", "sequence-classification", "word_embeddings", "bf16"),
        ("t5", "sequence-to-sequence", "lm_head", "fp16"),
    ],
)
def test_what_trains_whole_in_fp32_fits_between_layers_of_16_bit(make_recipe, tmp_path, name, task, module, precision):
    folder = tmp_path / "base"
    if name == "encoder":
        tiny_encoder(folder, ["red", "green"])
    else:
        T5ForConditionalGeneration(T5).save_pretrained(folder)
        make_tokenizer(folder)
    rows = [("red green", "a"), ("green", "b"), ("red", "a"), ("green red green", "b")] * 4
    names = ("text", "label") if name == "encoder" else ("prompt", "completion")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    run = tune(
        make_recipe(
            base={"model": str(folder), "task": task}, data={"train": str(data), "eval": str(data)},
            strategies=[{"lora": {"modules_to_save": [module]}}], train={"precision": precision, "eval_generate": 2},
        ),
        quiet=True,
    )  # fmt: skip
    whole = dict(saved_modules(run.model, RUN_ADAPTER))
    assert whole and all(p.dtype == torch.float32 for part in whole.values() for p in part.parameters())
    assert verify(run.directory / "adapter").exact


@pytest.mark.parametrize(("module", "holds"), [("layers.0.mlp", "holds quantised linears"), ("o_proj", "is quantised")])
def test_what_is_quantised_cannot_train_whole_or_be_replaced(make_recipe, tiny_base, tmp_path, module, holds):
    message = f"modules_to_save: '.*{module}' {holds}.* cannot train whole: adapt .* or set `quantization: none`"
    lora = {"lora": {"targets": ["q_proj"], "modules_to_save": [module]}}
    with pytest.raises(InputError, match=message):
        tune(make_recipe(base={"quantization": "nf4"}, strategies=[lora]), quiet=True)
    stock(tiny_base, tmp_path / "stock", target_modules=["q_proj"], modules_to_save=[module])
    with pytest.raises(InputError, match=message):
        AdapterPool(tiny_base, "int8", precision="fp32", device="cpu").load("a", tmp_path / "stock")


@pytest.mark.filterwarnings("ignore")
def test_low_rank_updates_of_embeddings_are_not_supported(tiny_base, tmp_path):
    folder = tmp_path / "adapter"
    stock(tiny_base, folder, target_modules=["q_proj", "embed_tokens"])
    pool = AdapterPool(tiny_base, "none", precision="fp32", device="cpu")
    with pytest.raises(
        InputError, match=r"'model.embed_tokens' is not a linear module \(Embedding\), which is not supp"
    ):
        pool.load("a", folder)
    for targets in (["embed_tokens"], r".*(q_proj|embed_tokens)"):
        with pytest.raises(InputError, match="an embedding, which has no low-rank updates: .*modules_to_save"):
            match_targets(pool.model, targets, None)


@pytest.mark.filterwarnings("ignore")
def test_a_whole_module_that_the_model_lacks_is_refused_only_if_the_file_has_it(tiny_base, tmp_path):
    folder = tmp_path / "adapter"
    stock(tiny_base, folder, target_modules=["q_proj"], modules_to_save=["pooler"])
    pool = AdapterPool(tiny_base, "none", precision="fp32", device="cpu")
    pool.load("a", folder)  # PEFT ignores it
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.pooler.weight": torch.ones(2)}, path)
    with pytest.raises(InputError, match="modules_to_save: the model has no 'pooler'. Give the base"):
        pool.load("b", folder)

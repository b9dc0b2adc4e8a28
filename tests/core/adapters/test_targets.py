"""Targets and modules trained whole, given by full name or by the last components of a name."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from budwood import AdapterPool, InputError
from budwood.adapters.targets import match_modules, match_targets, whole_modules
from budwood.model.base import skeleton
from budwood.serving.merge import merge
from budwood.training.loop import tune


def test_modules_to_save_go_by_components(tiny_base):
    model = skeleton(tiny_base, "AutoModelForCausalLM")
    assert match_modules(model, ["norm"]) == ["model.norm"]
    assert match_modules(model, ["input_layernorm"]) == [f"model.layers.{i}.input_layernorm" for i in (0, 1)]
    assert match_modules(model, ["layers.1.mlp", "model.norm"]) == ["model.layers.1.mlp", "model.norm"]
    with pytest.raises(InputError, match="no module 'layernorm'"):
        match_modules(model, ["layernorm"])
    with pytest.raises(InputError, match=r"'model.layers.0.mlp.up_proj' is part of 'model.layers.0.mlp'"):
        match_modules(model, ["up_proj", "layers.0.mlp"])


def test_all_linear_is_the_body_without_pooler_and_head(tiny_base):
    model = skeleton(tiny_base, "AutoModelForCausalLM")
    assert len(match_targets(model, "all-linear", None)) == 14
    assert match_targets(model, ["lm_head"], None) == ["lm_head"]
    assert len(match_targets(model, "all-linear", None, ["model.layers.0.mlp"])) == 11
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    bert = BertForSequenceClassification(config)
    assert all(name.startswith("bert.encoder.") for name in match_targets(bert, "all-linear", None))
    assert "bert.pooler.dense" in match_targets(bert, ["dense"], None)
    assert "bert.pooler.dense" not in match_targets(bert, ["dense"], None, ["bert.pooler.dense"])
    with pytest.raises(InputError, match=r"apart from what trains whole \(classifier\)"):
        match_targets(bert, ["classifier"], None, ["classifier"])


def test_a_part_of_what_trains_whole_is_named_once(tiny_base):
    model = skeleton(tiny_base, "AutoModelForCausalLM")
    task: Any = SimpleNamespace(head_modules=lambda model: ["lm_head"])
    base: Any = SimpleNamespace(new=("lm_head.weight", "model.norm.weight"))
    assert whole_modules(model, ["lm_head"], task, base) == ["lm_head", "model.norm"]


def test_a_run_reports_what_was_matched_and_a_tied_head_may_be_adapted(tiny_bases, tmp_path, make_recipe, said):
    base = tiny_bases("tied", tie_word_embeddings=True)
    lora = {"rank": 4, "targets": ["q_proj", "lm_head"], "modules_to_save": ["norm"]}
    tune(make_recipe(base={"model": str(base)}, strategies=[{"lora": lora}]))
    assert "adapted: 3 linears (2 q_proj, 1 lm_head); whole: model.norm" in said
    adapter = tmp_path / "run" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.norm"]
    report = merge(adapter, tmp_path / "merged", dtype="fp32")
    assert report.unquantized.largest < 1e-4
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert not tensors["lm_head.weight"].equal(tensors["model.embed_tokens.weight"])
    pool = AdapterPool(base, "none", precision="fp32", device="cpu")
    pool.load("a", adapter)
    pool.use("a")
    merged = AdapterPool(tmp_path / "merged", "none", precision="fp32", device="cpu")
    assert (pool.logits([[1, 40, 50]]) - merged.logits([[1, 40, 50]])).abs().max() < 1e-4

"""Counts of fused experts: all, quantised and trainable."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from tests.conftest import make_tokenizer
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from budwood import load_base
from budwood.errors import InputError
from budwood.model.experts import Experts, count_experts
from budwood.training.loop import tune


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Function (intermediate size) -> folder of a Mixtral with 4 experts in each of 2 layers."""

    def make(intermediate):
        folder = tmp_path_factory.mktemp("mixture")
        config = MixtralConfig(
            vocab_size=300, hidden_size=64, intermediate_size=intermediate, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        MixtralForCausalLM(config).save_pretrained(folder)
        make_tokenizer(folder)
        return folder

    return make


def test_a_run_reports_how_many_experts_are_adapted(mixture, make_recipe, said):
    tune(make_recipe(base={"model": str(mixture(32))}, train={"steps": 1}))
    assert any("not quantised; experts: 8, not quantised" in line for line in said)
    assert any(line.startswith("adapted: 8 linears") and line.endswith("; experts: 0 of 8 adapted") for line in said)


def test_a_base_reports_how_many_experts_are_not_quantised(mixture):
    base = load_base(mixture(1), "nf4", "AutoModelForCausalLM", torch.float32)
    assert base.notes[1] == "experts: 0 of 8 in nf4"
    with pytest.raises(InputError, match="fused tensors such as .* nf4 cannot quantise them"):
        load_base(mixture(32), "nf4", "AutoModelForCausalLM", torch.float32)


def test_trainable_experts_are_counted(mixture):
    model = load_base(mixture(32), "none", "AutoModelForCausalLM", torch.float32).model
    assert count_experts(model) == Experts(8, 0, 0)
    experts = "model.layers.1.mlp.experts"
    config = LoraConfig(r=2, target_modules=[], target_parameters=[f"{experts}.down_proj"])
    inject_adapter_in_model(config, model, "mine")
    assert count_experts(model) == Experts(8, 0, 4)


def test_a_dense_model_has_none(tiny_base):
    base = load_base(tiny_base, "none", "AutoModelForCausalLM", torch.float32)
    assert count_experts(base.model) == Experts()
    assert not any("experts" in note for note in base.notes)
    assert count_experts(nn.Sequential(nn.Conv1d(4, 4, 3))) == Experts()  # a three-dimensional parameter


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("GptOss", {"num_local_experts": 4, "head_dim": 16, "intermediate_size": 32}),
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 32}),
        ("DeepseekV3", {"n_routed_experts": 4, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}),
        ("LongcatFlash", {"n_routed_experts": 4, "num_hidden_layers": 4, "expert_ffn_hidden_size": 32}),
        (
            "Dbrx",
            {
                "d_model": 64,
                "n_layers": 2,
                "n_heads": 4,
                "ffn_config": {"moe_num_experts": 4},
                "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2},
            },
        ),
    ],
)
def test_experts_of_other_families_are_counted(name, sizes):
    cls = getattr(transformers, f"{name}ForCausalLM")
    common = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = cls.config_class(**({} if name == "Dbrx" else common) | sizes, vocab_size=300)
    with torch.device("meta"):
        assert count_experts(cls(config).requires_grad_(False)) == Experts(8, 0, 0)

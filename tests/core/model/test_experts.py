"""Experts of a mixture: quantised as they are read, computed as in transformers, and counted."""

from __future__ import annotations

import weakref

import pytest
import torch
import transformers
from tests.conftest import make_tokenizer
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from budwood import load_base
from budwood.model.experts import Experts, count_experts
from budwood.model.quantizers import NF4, is_quantized, quantizer_of
from budwood.model.quantizers.experts import ExpertLinear, FourBitExperts, quantized_experts
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


def test_a_base_and_a_run_report_how_many_experts_are_quantised_and_adapted(mixture, make_recipe, said):
    tune(make_recipe(base={"model": str(mixture(32)), "quantization": "nf4"}, train={"steps": 1}))
    assert any("; experts: 8 of 8 in nf4" in line for line in said)
    parts = (
        "adapted: 8 linears (2 q_proj, 2 k_proj, 2 v_proj, 2 o_proj); experts' gate_up_proj in 2 layers, down_proj in 2"
    )
    assert f"{parts} layers; experts: 8 of 8 in nf4, 8 adapted" in said


def test_memory_never_holds_the_experts_in_16_bit(mixture, monkeypatch):
    alive, most = [], []

    def pack(self, weight, double):
        alive.append(weakref.ref(weight.untyped_storage()))
        most.append(sum(storage() is not None for storage in alive))
        return FourBitExperts.pack(weight, self.kind, double)

    monkeypatch.setattr(NF4, "pack_experts", pack)
    base = load_base(mixture(32), "nf4", "AutoModelForCausalLM", torch.float32)
    assert len(most) == 4 and max(most) == 1
    assert count_experts(base.model) == Experts(8, 8, 0)
    bits = 8 * sum(t.nbytes for module in quantized_experts(base.model) for t in module.stored)
    assert bits < 5 * sum(module.numel for module in quantized_experts(base.model))  # tables weigh in a tiny model


def test_trainable_experts_are_counted(mixture):
    model = load_base(mixture(32), "none", "AutoModelForCausalLM", torch.float32).model
    assert count_experts(model) == Experts(8, 0, 0)
    model.get_submodule("model.layers.1.mlp.experts.down_proj").requires_grad_()
    assert count_experts(model) == Experts(8, 0, 4)


FAMILIES = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32},
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "DeepseekV3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32, "kv_lora_rank": 16, "q_lora_rank": 16, 
        "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16, "num_key_value_heads": 4,
    },
}  # fmt: skip


def make_family(name, folder):
    """Save a tiny model of a family, with experts that matter, and return it."""
    cls = getattr(transformers, f"{name}ForCausalLM")
    common = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = cls(cls.config_class(**common | FAMILIES[name])).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "experts." in path:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return model


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_transformers_whatever_the_storage(name, tmp_path):
    stock, ids = make_family(name, tmp_path), torch.arange(60).view(3, 20)
    for quantization in ("none", "nf4"):
        ours = load_base(tmp_path, quantization, "AutoModelForCausalLM", torch.float32).model
        modules = dict(ours.named_modules())
        for path, parameter in stock.named_parameters():
            experts, linear = modules.get(path), modules.get(path.removesuffix(".weight"))
            if isinstance(experts, ExpertLinear):
                dense = experts.dequantize(0, experts.experts, torch.float32)
                parameter.copy_(dense.transpose(1, 2) if name == "GptOss" else dense)
            elif linear is not None and is_quantized(linear):
                parameter.copy_(quantizer_of(linear).dequantize(linear, torch.float32))
        assert (ours(ids).logits - stock(ids).logits).abs().max() < 1e-5
        if quantization == "none":
            assert ours.state_dict().keys() == stock.state_dict().keys()
            ours.load_state_dict(stock.state_dict())
        else:
            alone = torch.cat([ours(row[None]).logits for row in ids])  # no token changes another example's
            assert (ours(ids).logits - alone).abs().max() < 1e-5


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

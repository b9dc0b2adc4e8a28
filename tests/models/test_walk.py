"""A handful of the architectures of `make models`, one of each kind that needed something of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.architectures import config_of
from tests.models.walk import walk
from transformers import AutoModelForCausalLM

from budwood import InputError, match_targets
from budwood.adapters.targets import reads_weight
from budwood.lowrank import moved_targets
from budwood_lora.adapter import check_moved
from budwood_lora.options import LoRAOptions

KINDS = {
    "deepseek_v3": "causal-lm",  # PEFT takes its dense and shared linears for experts
    "llama4_text": "causal-lm",  # its class names a body that it does not have
    "phimoe": "causal-lm",  # its router is a subclass of nn.Linear
    "falcon_mamba": "causal-lm",  # it reads the weights of linears; a norm has an unused weight of another size
    "roberta": "sequence-classification",
    "t5": "sequence-to-sequence",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_lora_trains_as_in_stock_peft_opens_there_and_merges(tmp_path: Path, name: str) -> None:
    outcome = walk(name, KINDS[name], tmp_path)
    assert (outcome.unbuilt, outcome.refused, outcome.faults) == ("", "", [])
    assert outcome.linears
    assert outcome.packed == (name in ("deepseek_v3", "roberta"))
    known = outcome.experts if name != "llama4_text" else 0  # whose experts have another form
    assert outcome.opened == known


def skeleton_of(name: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(name))


def test_a_linear_whose_weight_the_model_reads_itself_is_left_out_and_refused_by_name() -> None:
    model = skeleton_of("mamba")
    assert {name.rpartition(".")[2] for name in match_targets(model, "all-linear", None)} == {"in_proj"}
    with pytest.raises(InputError, match=r"mixer\.dt_proj': the model reads this weight without calling the module"):
        match_targets(model, ["in_proj", "dt_proj"], None)
    assert not reads_weight(skeleton_of("bloom"), "transformer.h.0.mlp.dense_4h_to_h"), "it reads parts, on request"


def test_targets_that_peft_would_move_to_the_experts_are_found_and_take_no_dora() -> None:
    model = skeleton_of("deepseek_v3")
    targets = match_targets(model, "all-linear", None)
    moved = moved_targets(model, targets)
    assert {name.rpartition(".")[2] for name in moved} == {"gate_proj", "up_proj", "down_proj"}
    assert moved_targets(skeleton_of("qwen2_moe"), ["model.layers.0.mlp.shared_expert.down_proj"]) == []
    with pytest.raises(InputError, match="dora: PEFT would take .* for experts, and can only name its weight"):
        check_moved(model, targets, LoRAOptions(dora=True))


def test_a_subclass_of_linear_counts_if_it_computes_one() -> None:
    falcon, router = skeleton_of("falcon"), skeleton_of("phimoe")
    assert any(name.endswith("dense_h_to_4h") for name in match_targets(falcon, "all-linear", None))
    assert not any("router" in name for name in match_targets(router, "all-linear", None))

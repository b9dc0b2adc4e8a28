"""Mixtures that another library has quantised: what would become 16 bit, or is damaged, is refused by its headers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.core.model.test_experts import make_family
from tests.plugins.quantized.test_stored import torchao

from budwood import InputError, load_base
from budwood.model.base import check_base

LM = "AutoModelForCausalLM"
EXPERT = "model.layers.0.mlp.experts.3.gate_proj"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE with 6 experts in each of 2 layers."""
    folder = tmp_path_factory.mktemp("mixture")
    make_family("Qwen3Moe", folder)
    return folder


def change(folder: Path, to: Path, edit: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> Path:
    """Copy a base with other tensors and other entries of its config.json."""
    shutil.copytree(folder, to)
    tensors, stated = load_file(to / "model.safetensors"), json.loads((to / "config.json").read_text())
    edit(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps(stated | config))
    return to


def packed_experts(**parts: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    """Return a change that stores each linear of an expert as these tensors; `__` stands for a point."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
            linear = name.removesuffix(".weight")
            tensors.update({f"{linear}.{part.replace('__', '.')}": t.clone() for part, t in parts.items()})

    return edit


CODES, SCALES = torch.zeros(8, dtype=torch.uint8), torch.zeros(2)
PACKED: dict[str, tuple[dict[str, Any], Callable[[dict[str, torch.Tensor]], None]]] = {
    "compressed-tensors": (
        {"config_groups": {"all": {"targets": ["Linear"], "weights": {"num_bits": 4}}}},
        packed_experts(weight_packed=CODES, weight_scale=SCALES),
    ),
    "gptq": ({"bits": 4, "group_size": 32}, packed_experts(qweight=CODES, scales=SCALES)),
    "hqq": ({"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 32}}}, packed_experts(W_q=CODES)),
    "bitsandbytes": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        packed_experts(weight=CODES, weight__absmax=SCALES),
    ),
    "torchao": (
        {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
        packed_experts(_weight_qdata=CODES, _weight_scale=SCALES),
    ),
}


@pytest.mark.parametrize("method", PACKED)
def test_packed_experts_never_become_16_bit_silently(mixture: Path, tmp_path: Path, method: str) -> None:
    config, edit = PACKED[method]
    folder = change(mixture, tmp_path / "base", edit, quantization_config={"quant_method": method, **config})
    with pytest.raises(InputError, match="give the unquantised base with quantization nf4"):
        load_base(folder, None, LM, torch.float32, needs_tokenizer=False)


def test_compressed_tensors_with_experts_in_16_bit_are_refused(mixture: Path, tmp_path: Path) -> None:
    """transformers unpacks the experts of such a mixture, and fails if there is nothing to unpack."""
    pack = PACKED["compressed-tensors"]

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.k_proj.weight_packed"] = CODES

    stored = {"quant_method": "compressed-tensors", **pack[0]}
    folder = change(mixture, tmp_path / "base", edit, quantization_config=stored)
    with pytest.raises(InputError, match="4 fused tensors such as .*experts.* in 16 bit, and .* cannot read them qua"):
        check_base(folder)


@pytest.mark.filterwarnings("ignore")
def test_experts_that_the_file_holds_in_16_bit_are_named(mixture: Path, tmp_path: Path) -> None:
    base = load_base(torchao(mixture, tmp_path / "base", "int8"), None, LM, torch.float32)
    assert "of the weights stay in fp32: experts, embeddings, lm_head, norms" in base.notes[0]
    assert "experts: 0 of 12 in torchao" in base.notes

"""Mixtures that another library has quantised: what would become 16 bit, or is damaged, is refused by its headers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.core.model.test_experts import make_family
from tests.plugins.quantized.test_stored import recipe_of, torchao

from budwood import CorruptError, InputError, load_base
from budwood.model.base import check_base
from budwood.model.fake import fake_base, fake_tensors
from budwood.planning.check import check
from budwood.planning.composition import plan

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


def without(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def shorter(name: str, axis: int = 0) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensors[name].narrow(axis, 1, tensors[name].shape[axis] - 1).clone()})


def fp8(tensors: dict[str, torch.Tensor]) -> None:
    """Store the experts in fp8, in blocks of 32 by 32."""
    for name in [name for name in tensors if ".experts." in name]:
        tensors[f"{name}_scale_inv"] = torch.ones(*(size // 32 for size in tensors[name].shape))
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def mxfp4(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_proj") and tensors[name].ndim == 3]:
        experts, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.zeros(experts, outputs, inputs // 32, 16, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full((experts, outputs, inputs // 32), 120, dtype=torch.uint8)


def no_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{FUSED}_scales"][1, 0, 0] = 255
    tensors[f"{FUSED}_blocks"][1] = 0x77


FUSED = "model.layers.1.mlp.experts.down_proj"
FORMATS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], dict[str, Any]]] = {
    "plain": ("Qwen3Moe", lambda tensors: None, {}),
    "fp8": (
        "Qwen3Moe", fp8,
        {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}},
    ),
    "mxfp4": ("GptOss", mxfp4, {"quantization_config": {"quant_method": "mxfp4"}}),
}  # fmt: skip
DAMAGE: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any], dict[str, Any], str]] = [
    ("plain", without(f"{EXPERT}.weight"), {}, f"model.safetensors: the tensor '{EXPERT}.weight' is missing, which"),
    ("plain", shorter(f"{EXPERT}.weight"), {}, rf"'{EXPERT}.weight' has the shape \(31, 64\), and other .* \(32, 64\)"),
    ("plain", lambda tensors: None, {"moe_intermediate_size": 64}, "4 weights in another shape than config.json gives"),
    ("fp8", without(f"{EXPERT}.weight_scale_inv"), {}, f"the tensor '{EXPERT}.weight_scale_inv' is missing, which"),
    (
        "fp8", lambda tensors: [tensors.pop(name) for name in list(tensors) if "0.mlp" in name and "scale" in name],
        {}, "experts.0.down_proj.weight_scale_inv' is missing, without which",
    ),
    ("mxfp4", without(f"{FUSED}_scales"), {}, f"the tensor '{FUSED}_scales' is missing, without which its experts"),
    ("mxfp4", shorter(f"{FUSED}_blocks", 2), {}, rf"'{FUSED}_blocks' has the shape \(4, 64, 0, 16\), and config.json"),
    ("mxfp4", lambda tensors: None, {"num_local_experts": 8}, r"gate_up_proj_blocks' has the shape \(4, .* \(8, "),
    ("mxfp4", no_number, {}, f"the base's '{FUSED}': expert 1 has weights that MXFP4 does not have .a scale of 255 st"),
]  # fmt: skip
"""Format; what is wrong with the tensors, and in config.json; the message."""


@pytest.fixture(scope="module")
def mixtures(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small mixture in each of the formats."""
    folder = tmp_path_factory.mktemp("formats")
    make_family("GptOss", folder / "GptOss")
    plain = {"Qwen3Moe": mixture, "GptOss": folder / "GptOss"}
    return {
        name: change(plain[family], folder / name, edit, **config) for name, (family, edit, config) in FORMATS.items()
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "damage", "config", "message"), DAMAGE)
def test_damaged_experts_are_named_before_weights_load(
    mixtures: dict[str, Path], tmp_path: Path, kind: str, damage: Callable[..., Any], config: dict[str, Any],
    message: str,
) -> None:  # fmt: skip
    """Some was found as weights loaded, in a message without a name; some was called a bug."""
    folder = change(mixtures[kind], tmp_path / "base", damage, **config)
    recipe = recipe_of(folder, "nf4" if kind == "plain" else kind, tmp_path)
    if damage is not no_number:  # a value, which no header shows
        found = plan(recipe)
        assert found.exit_code == 4
        assert re.search(message, found.problems[0])
        checked = check(recipe)
        assert checked.problems.exit_code == 4 and not checked.as_dict()["go"]
    if "moe_intermediate_size" not in config:
        with pytest.raises(CorruptError, match=message):
            load_base(folder, recipe.base.quantization, LM, torch.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_sound_mixtures_load(mixtures: dict[str, Path], tmp_path: Path, kind: str) -> None:
    quantization = "nf4" if kind == "plain" else kind
    assert not plan(recipe_of(mixtures[kind], quantization, tmp_path)).problems
    load_base(mixtures[kind], quantization, LM, torch.float32)
    with fake_tensors():
        planned = fake_base(str(mixtures[kind]), LM, torch.float32, quantization=quantization)
    assert not any("cannot be planned" in note for note in planned.notes)

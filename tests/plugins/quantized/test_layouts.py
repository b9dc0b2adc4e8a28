"""GPTQ's layout and HQQ's: their weights are read exactly, and planned; bad ones are refused before they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.plugins.quantized.layouts import gptq, hqq

from budwood import CorruptError, InputError, linear_weight, load_base
from budwood.model.fake import fake_base, fake_tensors

LM = "AutoModelForCausalLM"
WRITERS: dict[str, Callable[[Path, Path], Any]] = {
    "gptq, 4 bits, with zero biases": lambda base, folder: gptq(base, folder, bias=True),
    "gptq, 3 bits, reordered": lambda base, folder: gptq(base, folder, bits=3, order=True),
    "gptq_v2, 8 bits, one group": lambda base, folder: gptq(base, folder, bits=8, group=1 << 20, layout="gptq_v2"),
    "gptq, 2 bits": lambda base, folder: gptq(base, folder, bits=2),
    "hqq, 4 bits": hqq,
    "hqq, 3 bits, axis 0": lambda base, folder: hqq(base, folder, bits=3, group=64, axis=0),
    "hqq, 8 bits": lambda base, folder: hqq(base, folder, bits=8),
    "hqq, 2 bits, axis 0": lambda base, folder: hqq(base, folder, bits=2, axis=0),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_weights_are_those_that_the_format_defines(tiny_base: Path, tmp_path: Path, name: str) -> None:
    values = WRITERS[name](tiny_base, tmp_path / "stored")
    base = load_base(tmp_path / "stored", None, LM, torch.float32)
    assert len(values) == 14
    for key, value in values.items():
        linear = base.model.get_submodule(key.removesuffix(".weight"))
        # codes and scales are exact in fp32, and their product is rounded once
        assert torch.allclose(linear_weight(linear, torch.float32).double(), value, rtol=2**-23, atol=0)
        assert torch.allclose(linear_weight(linear, torch.bfloat16).double(), value, rtol=2**-8, atol=0)
    with fake_tensors():
        planned = fake_base(str(tmp_path / "stored"), LM, torch.float32, quantization=None)
    assert planned.notes == ["fake"]
    assert planned.parameters == base.parameters
    assert abs(planned.bytes - base.bytes) < 14 * 100  # what HQQ repeats of its configuration is not kept


def change(folder: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> None:
    """Change entries of quantization_config, or tensors of a linear; None removes one."""
    path, key = folder / "config.json", "model.layers.0.mlp.up_proj."
    content = json.loads(path.read_text())
    content["quantization_config"] |= config or {}
    path.write_text(json.dumps(content))
    found = load_file(folder / "model.safetensors") | {key + name: tensor for name, tensor in tensors.items()}
    found = {name: tensor for name, tensor in found.items() if tensor is not None}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def head(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    found["lm_head.qweight"] = torch.zeros(8, 300, dtype=torch.int32)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


BAD: dict[str, tuple[Callable[..., Any], Callable[[Path], None], type[Exception], str]] = {
    "bits": (
        gptq, lambda folder: change(folder, {"bits": 8}), InputError,
        r"down_proj.qweight' has the shape \[16, 64\], but config.json \(8 bits .*\) needs \[32, 64\]: take the config",
    ),
    "group size": (
        gptq, lambda folder: change(folder, {"group_size": 16}), InputError, r"qzeros' has the shape \[4, 8\], but",
    ),
    "a tensor": (
        gptq, lambda folder: change(folder, scales=None), CorruptError, "mlp.up_proj' has no tensor 'scales'",
    ),
    "groups": (
        gptq, lambda folder: change(folder, g_idx=torch.full((64,), 9, dtype=torch.int32)), CorruptError,
        r"up_proj.g_idx' names groups that its scales do not have",
    ),
    "head": (gptq, head, InputError, "the base's head 'lm_head' is quantised too"),
    "a linear of another model": (
        gptq, lambda folder: change(folder, **{"other.qweight": torch.zeros(1)}), InputError,
        "packed tensors of '.*up_proj.other' belong to no linear of LlamaForCausalLM",
    ),
    "hqq's bits": (
        hqq, lambda folder: change(folder, nbits=torch.tensor(3)), InputError, "up_proj.nbits' contradicts quant_",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_tensors_that_contradict_the_configuration_are_refused(tiny_base: Path, tmp_path: Path, name: str) -> None:
    write, damage, error, message = BAD[name]
    write(tiny_base, tmp_path / "stored")
    damage(tmp_path / "stored")
    with pytest.raises(error, match=message):
        load_base(tmp_path / "stored", None, LM, torch.float32)
    if name not in ("groups", "hqq's bits"):  # shapes are checked in plans too, from headers
        with fake_tensors(), pytest.raises(error, match=message):
            fake_base(str(tmp_path / "stored"), LM, torch.float32, quantization=None)

"""Writes checkpoints in GPTQ's layout and in HQQ's, as their tools do; says what their weights are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def gptq(
    base: Path,
    folder: Path,
    bits: int = 4,
    group: int = 32,
    order: bool = False,
    layout: str = "gptq",
    bias: bool = False,
) -> dict[str, torch.Tensor]:
    """Save a base with the linears of its layers in GPTQ's layout; returns their weights in fp64.

    Args:
        order: the inputs of a group are not neighbours, as with `desc_act`.
        bias: write a bias of zeros for every linear, as AutoGPTQ does.
    """
    tensors, values = _start(base, folder), {}
    draw = np.random.default_rng(0)
    for name in _linears(tensors):
        weight = tensors.pop(f"{name}.weight").double().numpy().T  # [in, out]
        index = np.arange(len(weight)) // group
        if order:
            index = draw.permutation(index)
        scales = np.stack([np.ptp(weight[index == g], 0) / (2**bits - 1) for g in range(index.max() + 1)])
        scales = scales.astype(np.float16)
        least = np.stack([weight[index == g].min(0) for g in range(index.max() + 1)])
        zeros = np.clip(np.round(-least / scales), 1, 2**bits - 1).astype(int)
        codes = np.clip(np.round(weight / scales[index]) + zeros[index], 0, 2**bits - 1).astype(int)
        values[f"{name}.weight"] = torch.tensor((codes - zeros[index]) * scales[index].astype(float)).T
        tensors |= {
            f"{name}.qweight": _words(codes, bits),
            f"{name}.qzeros": _words((zeros - (layout == "gptq")).T, bits).T.contiguous(),
            f"{name}.scales": torch.tensor(scales),
            f"{name}.g_idx": torch.tensor(index, dtype=torch.int32),
        }
        if bias:
            tensors[f"{name}.bias"] = torch.zeros(weight.shape[1], dtype=torch.float16)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order, "sym": False}
    _finish(folder, tensors, config | {"checkpoint_format": layout})
    return values


def hqq(base: Path, folder: Path, bits: int = 4, group: int = 32, axis: int = 1) -> dict[str, torch.Tensor]:
    """Save a base with the linears of its layers in HQQ's layout; returns their weights in fp64."""
    tensors, values = _start(base, folder), {}
    for name in _linears(tensors):
        weight = tensors.pop(f"{name}.weight").double()
        groups = weight.reshape(-1, group) if axis == 1 else weight.reshape(group, -1)
        low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).half()
        zero = (-low / scale.double()).half()
        codes = (groups / scale.double() + zero.double()).round().clamp(0, 2**bits - 1)
        values[f"{name}.weight"] = ((codes - zero.double()) * scale.double()).view(weight.shape)
        meta = {
            "nbits": bits, "group_size": group, "axis": axis, "shape": list(weight.shape), "view_as_float": 0,
            "packing": list(map(ord, f"{bits}bit_u8" if bits != 3 else "3bit_32")),
        }  # fmt: skip
        tensors |= {f"{name}.{key}": torch.tensor(value, dtype=torch.int32) for key, value in meta.items()}
        tensors |= {f"{name}.W_q": _bytes(codes, bits), f"{name}.scale": scale, f"{name}.zero": zero}
    options = {"nbits": bits, "group_size": group, "axis": axis, "channel_wise": True, "view_as_float": False}
    options = {"weight_quant_params": options, "scale_quant_params": None, "zero_quant_params": None}
    _finish(folder, tensors, {"quant_method": "hqq", "quant_config": options, "skip_modules": ["lm_head"]})
    return values


def _start(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    shutil.copytree(base, folder)
    return load_file(base / "model.safetensors")


def _linears(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in list(tensors) if "_proj.weight" in name]


def _finish(folder: Path, tensors: dict[str, torch.Tensor], stored: dict[str, Any]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))


def _words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Pack integers [n, m] down each column into [n · bits / 32, m] int32, as a stream of bits, lowest first."""
    stream = (codes[:, None, :] >> np.arange(bits)[None, :, None]) & 1
    packed = np.packbits(stream.reshape(-1, codes.shape[1]).astype(np.uint8), axis=0, bitorder="little")
    words = packed.T.copy().view("<i4").T
    return torch.tensor(words.copy())


def _bytes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integers [n, m] into bytes, or in 3 bit into int32: part i of the rows lies i places below the highest."""
    count = {8: 1, 4: 2, 2: 4, 3: 10}[bits]
    rows = -(-len(codes) // count)
    wide = torch.zeros(rows * count, codes.shape[1], dtype=torch.int64)
    wide[: len(codes)] = codes.long()
    parts = wide.view(count, rows, -1)
    packed = sum(part << bits * (count - 1 - place) for place, part in enumerate(parts))
    return torch.as_tensor(packed).to(torch.int32 if bits == 3 else torch.uint8)

"""A saved LoRA adapter as entries of the live table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from budwood import InputError, LiveAdapter, LiveUpdate, linear_shape
from budwood.lowrank import (
    expert_norms,
    experts_of,
    fan_in_fan_out,
    file_paths,
    known_to_peft,
    live_low_rank,
    parse_saved_config,
    saved_pattern,
    saved_targets,
    stacked,
)
from budwood_lora.layers import TYPE
from budwood_lora.options import SavedConfig

PREFIX = "base_model.model."


def live(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> LiveAdapter:
    """Return the adapter: A, B and scale of every target; with DoRA also the gain, whose norms are computed here.

    Raises:
        CorruptError: config, tensors and model do not match.
        InputError: the adapter uses an unsupported variant.
    """
    saved = parse_saved_config(TYPE, SavedConfig, config)
    targets = saved_targets(model, saved)
    ranks, alphas = saved_pattern(saved.rank_pattern, targets), saved_pattern(saved.alpha_pattern, targets)
    paths = file_paths(model, targets)
    modules = {path: _linear(model.get_submodule(path)) for path in targets}
    own: dict[str, tuple[int, ...]] = {}
    scales: dict[str, float] = {}
    for path in targets:
        outputs, inputs = linear_shape(modules[path])
        rank, alpha = ranks.get(re.escape(path), saved.r), alphas.get(re.escape(path), saved.lora_alpha)
        scales[path] = alpha / (math.sqrt(rank) if saved.use_rslora else rank)
        key, experts = f"{PREFIX}{paths[path]}.lora_", experts_of(modules[path])
        width = rank * (experts or 1)
        own |= {f"{key}A.weight": (width, inputs), f"{key}B.weight": (outputs, width)}
        if saved.lora_bias:
            own[f"{key}B.bias"] = (outputs,)
        if saved.use_dora:
            own[f"{key}magnitude_vector"] = (experts, outputs) if experts else (outputs,)
            if not experts and not known_to_peft(modules[path]):
                what = type(modules[path]).__name__
                raise InputError(f"dora is not supported on '{path}', a {what}: use plain LoRA.")

    def update(path: str, tensors: Mapping[str, Tensor]) -> LiveUpdate:
        key, scale, experts = f"{PREFIX}{paths[path]}.lora_", scales[path], experts_of(modules[path])
        gain = None
        if experts:
            a, b = stacked(tensors[f"{key}A.weight"], tensors[f"{key}B.weight"], experts)
            if saved.use_dora:
                gain = _expert_gain(modules[path], a, b, scale, tensors[f"{key}magnitude_vector"])
            return LiveUpdate(a, b, scale, gain)
        a, b, bias = tensors[f"{key}A.weight"], tensors[f"{key}B.weight"], tensors.get(f"{key}B.bias")
        offset = None if bias is None else bias.float() * scale
        if saved.use_dora:
            gain = _gain(modules[path], fan_in_fan_out(model, [path]), a, b, scale, tensors[f"{key}magnitude_vector"])
            offset = None if offset is None else offset.to(gain.device) * gain
        return LiveUpdate(a, b, scale, gain, offset)

    return live_low_rank(model, saved, tensors, targets, own, update)


def _linear(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


@torch.no_grad()
def _gain(base: Any, transposed: bool, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """Return magnitude / ‖W + s B A‖ for each output, with the operations of PEFT's layer in the same precision."""
    weight = dequantize_module_weight(base).float()
    a, b = a.to(weight.device, torch.float32), b.to(weight.device, torch.float32)
    update = F.linear(F.linear(torch.eye(a.shape[1], device=a.device), a), b).T.float()
    if transposed:  # transformers' Conv1D stores [in, out]
        weight = weight.T
    return magnitude.to(weight.device, torch.float32) / torch.linalg.norm(weight + scale * update, dim=1)


def _expert_gain(base: Any, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """Return magnitude / ‖W_e + s B_e A_e‖ [E, out]."""
    device = base.stored[0].device
    return magnitude.to(device, torch.float32) / expert_norms(base, a.to(device), b.to(device), scale)

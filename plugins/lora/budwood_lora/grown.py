"""Raises the rank of a LoRA adapter that a run continues, without a change of what it computes."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from budwood import RUN_ADAPTER, Run
from budwood.lowrank import adapter_layers, experts_of, stacked
from budwood_lora.options import LoRAOptions


def grow(run: Run, model: nn.Module, config: LoraConfig, options: LoRAOptions) -> None:
    """Give every update of the run's adapter the rank and the scale of the options; changes `config` to fit.

    The new rows of A are initialised like those of a new adapter, from the run's seed, and the new columns of B are 0.
    B and its bias are multiplied by the old scale over the new one, so that the update stays the same; what DoRA scales
    it by stays as it is.
    """
    scale = options.alpha / (math.sqrt(options.rank) if options.rslora else options.rank)
    config.r, config.lora_alpha = options.rank, options.alpha  # type: ignore[assignment]
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.init_lora_weights = True if options.init == "default" else "gaussian"
    ranks, alphas, ratios = set(), set(), set()
    with torch.random.fork_rng(devices=[]):  # the initialisation depends on the seed alone
        torch.manual_seed(run.seed)
        for _, layer in adapter_layers(model, RUN_ADAPTER):
            ranks.add(layer.r[RUN_ADAPTER])
            alphas.add(layer.lora_alpha[RUN_ADAPTER])
            ratios.add(layer.scaling[RUN_ADAPTER] / scale)
            _grow_layer(layer, config, scale)
    run.grown_from = min(ranks), max(ranks)
    changed = alphas - {options.alpha}
    alpha = f"{_range(alphas)} changed to {options.alpha:g}" if changed else f"{options.alpha:g}"
    run.say(
        f"lora: rank {_range(ranks)} grown to {options.rank}, with the same effect: new columns of B are 0, the others "
        f"times {_range(ratios)}, as the scale is now {scale:.4g} (alpha {alpha})"
    )


@torch.no_grad()
def _grow_layer(layer: Any, config: LoraConfig, scale: float) -> None:
    name, rank = RUN_ADAPTER, config.r
    down, up, before = layer.lora_A[name], layer.lora_B[name], layer.r[name]
    a, b, experts = down.weight.detach(), up.weight.detach(), experts_of(layer) or 1
    ratio = layer.scaling[name] / scale
    # On the CPU, like a new adapter's, so that they are the same on every device.
    down.weight = nn.Parameter(torch.empty(rank * experts, a.shape[1], device="cpu"))
    up.weight = nn.Parameter(torch.empty(len(b), rank * experts, device="cpu"))
    bias = None if up.bias is None else up.bias * ratio
    layer.r[name], layer.lora_alpha[name], layer.scaling[name] = rank, config.lora_alpha, scale
    down.out_features = up.in_features = rank * experts
    layer.reset_lora_parameters(name, config.init_lora_weights)
    down.to(a.device)
    up.to(b.device)
    new_a, new_b = stacked(down.weight, up.weight, experts)
    new_a[:, :before], new_b[:, :, :before] = stacked(a, b * ratio, experts)
    if bias is not None:
        up.bias.copy_(bias)


def _range(values: set[Any]) -> str:
    low, high = (f"{value:.4g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"

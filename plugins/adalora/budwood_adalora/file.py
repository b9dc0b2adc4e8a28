"""AdaLoRA's file in PEFT's layout: read strictly, attach to a model, convert to plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from budwood import CorruptError, InputError, LiveAdapter, LiveUpdate, copy_adapter_tensors, linear_shape
from budwood.lowrank import (
    adapter_layers,
    add_to_weight,
    experts_of,
    file_paths,
    fit_whole,
    live_low_rank,
    merge_whole_parts,
    parse_saved_config,
    remove_adapter,
    saved_targets,
    saved_tokens,
    saved_whole_modules,
    select_adapters,
    whole_tensors,
    without_base_tensors,
)
from budwood_adalora.layers import add_adapter, padded, scale, spread
from budwood_adalora.options import TYPE, UNUSED, SavedConfig

PREFIX = "base_model.model."


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the live tensors of an adapter, by key in PEFT's file; updates of rank 0 have none.

    PEFT has no AdaLoRA on experts; their tensors have the keys that LoRA's would have.
    """
    layers = {path: layer for path, layer in adapter_layers(model, name) if layer.r[name]}
    paths = file_paths(model, layers)
    tensors = {
        f"{PREFIX}{paths[path]}.{part}": getattr(layer, part)[name].data
        for path, layer in layers.items()
        for part in ("lora_A", "lora_B", "lora_E")
    }
    return tensors | whole_tensors(model, name)


def attach(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str
) -> tuple[list[str], dict[str, list[int]]]:
    """Attach a saved adapter to the model, inactive.

    Returns:
        Full names of the modules that it replaces whole, and token ids of the rows that it replaces, by module.

    Raises:
        CorruptError: config, tensors and model do not match.
        InputError: the adapter uses an unsupported variant.
    """
    saved = parse(config)
    targets, whole = saved_targets(model, saved), saved_whole_modules(model, saved, tensors)
    ranks = _kept(saved, targets, tensors, file_paths(model, targets))
    _check_experts(model, ranks)
    tensors = {key: tensor for key, tensor in tensors.items() if tensor.numel()}
    scaling = {path: _scale(saved, max(each)) for path, each in ranks.items()}
    tokens, tensors = saved_tokens(model, saved, tensors, whole)
    try:
        add_adapter(model, name, ranks, scaling, saved.lora_dropout, whole, saved.bias, tokens)
        fit_whole(model, name, tensors)
        slots = adapter_tensors(model, name)
        copy_adapter_tensors(slots, without_base_tensors(model, tensors, slots))
    except BaseException:
        remove_adapter(model, name)
        raise
    return whole, tokens


def live(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> LiveAdapter:
    """Return a saved adapter as entries of the live table: diag(E) A and B of every update that has a rank.

    Raises:
        CorruptError, InputError: see `attach`.
    """
    saved = parse(config)
    targets = saved_targets(model, saved)
    paths = file_paths(model, targets)
    ranks = _kept(saved, targets, tensors, paths)
    _check_experts(model, ranks)
    tensors = {key: tensor for key, tensor in tensors.items() if tensor.numel()}
    own: dict[str, tuple[int, ...]] = {}
    for path, each in ranks.items():
        outputs, inputs = linear_shape(model.get_submodule(path))
        key, rank = f"{PREFIX}{paths[path]}.lora_", sum(each)
        own |= {f"{key}A": (rank, inputs), f"{key}B": (outputs, rank), f"{key}E": (rank, 1)}
    width = max(map(max, ranks.values()), default=0)

    def update(path: str, tensors: Mapping[str, Tensor]) -> LiveUpdate:
        a, b, values = (tensors[f"{PREFIX}{paths[path]}.lora_{part}"].float() for part in "ABE")
        each, scaling = ranks[path], _scale(saved, max(ranks[path]))
        if experts_of(model.get_submodule(path)):
            return LiveUpdate(*spread(a * values, b, each), scaling)
        return LiveUpdate(*padded(a * values, b, width), scaling)

    return live_low_rank(model, saved, tensors, list(ranks), own, update)


@torch.no_grad()
def merge(model: nn.Module, name: str) -> None:
    """Merge an adapter into the weights, and detach it."""
    select_adapters(model, TYPE, [])
    merge_whole_parts(model, name)
    for _, layer in adapter_layers(model, name):
        if layer.experts:
            a, b = spread(layer.lora_A[name] * layer.lora_E[name], layer.lora_B[name], layer.ranks(name))
            layer.get_base_layer().add(layer.scaling[name] * torch.bmm(b, a))
            continue
        delta = layer.scaling[name] * (layer.lora_B[name] @ (layer.lora_A[name] * layer.lora_E[name]))
        add_to_weight(layer.get_base_layer(), delta)
    remove_adapter(model, name)


def as_lora(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert to a plain LoRA adapter with the same function: diag(E) is multiplied into A; rank and alpha per module.

    Returns:
        adapter_config.json and tensors of the LoRA adapter.

    Raises:
        CorruptError, InputError: see `attach`; or all its ranks are 0.
    """
    saved = parse(config)
    if saved.target_parameters:
        raise InputError("it adapts experts (target_parameters), which are not converted to LoRA: merge it instead.")
    adapted = [k.removeprefix(PREFIX) for k in tensors if k.endswith(".lora_E")]
    paths = list(dict.fromkeys(k.partition(".lora_E")[0] for k in (*adapted, *(saved.rank_pattern or {}))))
    ranks = {p: sum(each) for p, each in _kept(saved, paths, tensors, dict(zip(paths, paths, strict=True))).items()}
    if not ranks:
        raise InputError("every rank of the adapter is 0: it adapts no linear module.")
    parts = tuple(f"{path}.lora_{part}" for path in paths for part in "ABE")
    converted = {k: v for k, v in tensors.items() if k.removeprefix(PREFIX) not in set(parts)}
    for path in ranks:
        a, b, e = (tensors[f"{PREFIX}{path}.lora_{part}"] for part in "ABE")
        converted[f"{PREFIX}{path}.lora_A.weight"] = a * e
        converted[f"{PREFIX}{path}.lora_B.weight"] = b
    alphas = {path: _scale(saved, rank) * rank for path, rank in ranks.items()}
    first = next(iter(ranks))
    fields = {**LoraConfig(r=ranks[first]).to_dict(), **{key: config[key] for key in _SHARED if key in config}}
    fields |= {
        "fan_in_fan_out": saved.fan_in_fan_out,
        "lora_alpha": alphas[first],
        "target_modules": sorted(ranks),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "inference_mode": True,
    }
    return {k: getattr(v, "value", v) for k, v in fields.items()}, converted


_SHARED = (
    "base_model_name_or_path", "bias", "lora_dropout", "modules_to_save", "revision", "task_type",
    "trainable_token_indices",
)  # fmt: skip


def parse(config: dict[str, Any]) -> SavedConfig:
    """Validate adapter_config.json; see `parse_saved_config`."""
    return parse_saved_config(TYPE, SavedConfig, config, UNUSED)


def _scale(saved: SavedConfig, rank: int) -> float:
    """Return PEFT's scaling of an update of this rank; without a positive alpha, PEFT uses the rank instead."""
    return scale(saved.lora_alpha if saved.lora_alpha > 0 else rank, saved.init_r)


def _kept(
    saved: SavedConfig, targets: list[str], tensors: dict[str, Tensor], paths: Mapping[str, str]
) -> dict[str, list[int]]:
    """Return the rank of each target that has one, or of its experts, checked against config and tensors.

    Args:
        paths: path of each target in the file.

    Raises:
        CorruptError: the two disagree, or the pattern names other modules.
    """
    found = {path: [saved.init_r] for path in targets}
    for key, mask in (saved.rank_pattern or {}).items():
        path = key.partition(".lora_E")[0]
        if path not in found or not mask or len(mask) % saved.init_r:
            raise CorruptError(f"adapter_config.json: rank_pattern: '{key}' contradicts target_modules or init_r.")
        starts = range(0, len(mask), saved.init_r)
        found[path] = [sum(mask[start : start + saved.init_r]) for start in starts]
    for path, each in found.items():
        values = tensors.get(f"{PREFIX}{paths[path]}.lora_E", torch.empty(0, 1))
        if values.shape[:1] != (sum(each),):
            raise CorruptError(
                f"the rank of '{path}' is {sum(each)} in adapter_config.json and {len(values)} in its tensors."
            )
    return {path: each for path, each in found.items() if sum(each)}


def _check_experts(model: nn.Module, ranks: Mapping[str, list[int]]) -> None:
    """Check that the config gives a rank for every expert of the model.

    Raises:
        CorruptError: the model has another number of experts.
    """
    for path, each in ranks.items():
        if len(each) != (experts := experts_of(model.get_submodule(path)) or 1):
            raise CorruptError(
                f"adapter_config.json: rank_pattern: '{path}' has {len(each)} ranks for {experts} experts."
            )

"""A LoRA adapter on a model: create, list parameters, write in PEFT's layout, attach, merge."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from budwood import (
    RUN_ADAPTER,
    InputError,
    ParameterGroup,
    Run,
    copy_adapter_tensors,
    match_targets,
    whole_modules,
)
from budwood.lowrank import (
    adapter_layers,
    difference,
    fan_in_fan_out,
    file_paths,
    fit_whole,
    merge_whole_parts,
    moved_targets,
    name_moved,
    new_tokens,
    parse_saved_config,
    remove_adapter,
    saved_pattern,
    saved_targets,
    saved_tokens,
    saved_whole_modules,
    select_adapters,
    split_targets,
    update_of,
    whole_groups,
    whole_tensors,
    without_base_tensors,
)
from budwood_lora.grown import grow
from budwood_lora.layers import TYPE, add_adapter
from budwood_lora.options import LoRAOptions, SavedConfig
from budwood_lora.ranks import grows


def create(run: Run, model: nn.Module, options: LoRAOptions) -> LoraConfig:
    """Add the run's adapter to its model, new or continued, and activate it; return its PEFT config."""
    if run.start_adapter is not None:
        config = {**run.start_adapter.config, "lora_dropout": options.dropout}
        raises_rank = grows(model, parse_saved_config(TYPE, SavedConfig, config), options.rank)
        continued = attach(model, config, run.start_adapter.load_tensors(), RUN_ADAPTER)
        if raises_rank:
            grow(run, model, continued, options)
        select_adapters(model, TYPE, [RUN_ADAPTER])
        continued.task_type = run.task.peft_task_type
        continued.base_model_name_or_path = run.recipe.base.model
        return continued
    whole = whole_modules(model, options.modules_to_save, run.task, run.base)
    targets, experts = split_targets(model, match_targets(model, options.targets, options.layers, whole, experts=True))
    check_moved(model, targets, options)
    if options.dropout and moved_targets(model, targets):
        run.say("note: the adapter's file has lora_dropout: 0, since PEFT has none for some targets of this model")
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        lora_dropout=options.dropout,
        target_modules=targets,
        target_parameters=experts or None,
        fan_in_fan_out=fan_in_fan_out(model, targets),
        use_rslora=options.rslora,
        use_dora=options.dora,
        init_lora_weights=True if options.init == "default" else "gaussian",
        modules_to_save=whole or None,
        trainable_token_indices=new_tokens(model, run.base, whole) or None,
        bias=options.bias,
        task_type=run.task.peft_task_type,
        base_model_name_or_path=run.recipe.base.model,
    )
    with torch.random.fork_rng(devices=[]):  # the initialisation depends on the seed alone
        torch.manual_seed(run.seed)
        add_adapter(model, config, RUN_ADAPTER)
    select_adapters(model, TYPE, [RUN_ADAPTER])
    return config


def check_moved(model: nn.Module, targets: list[str], options: LoRAOptions) -> None:
    """Refuse options with which PEFT's file cannot name some targets; see `name_moved`.

    Raises:
        InputError: DoRA, or biases of these layers.
    """
    option = "dora" if options.dora else "bias" if options.bias == "lora_only" else ""
    if option and (moved := moved_targets(model, targets)):
        raise InputError(
            f"{option}: PEFT would take '{moved[0]}' of this model for experts, and can only name its weight, without "
            f"{option}: leave {option} out, or name other targets."
        )


def parameter_groups(model: nn.Module, options: LoRAOptions) -> list[ParameterGroup]:
    """Return A and B of the run's adapter, with separate learning rates, and what trains beside them."""
    down: dict[str, nn.Parameter] = {}
    up: dict[str, nn.Parameter] = {}
    for path, layer in adapter_layers(model, RUN_ADAPTER):
        down[f"{path}.lora_A"] = layer.lora_A[RUN_ADAPTER].weight
        up[f"{path}.lora_B"] = layer.lora_B[RUN_ADAPTER].weight
        if RUN_ADAPTER in layer.lora_magnitude_vector:
            down[f"{path}.lora_magnitude_vector"] = layer.lora_magnitude_vector[RUN_ADAPTER].weight
    return [
        ParameterGroup("lora_A", down),
        ParameterGroup("lora_B", up, learning_rate_ratio=options.learning_rate_ratio),
        *whole_groups(model, RUN_ADAPTER),
    ]


def write(model: nn.Module, config: LoraConfig, directory: Path) -> None:
    """Write the run's adapter in PEFT's format, whose layers for experts know no dropout."""
    saved = dataclasses.replace(config, inference_mode=True)
    name_moved(model, saved)
    if saved.target_parameters:
        saved.lora_dropout = 0.0
    saved.target_modules = sorted(saved.target_modules or ())  # PEFT makes it an unordered set
    slots = tensor_slots(model, RUN_ADAPTER) | _started(model, config, saved)
    saved.save_pretrained(str(directory))
    tensors = {key: slot.detach().cpu().contiguous() for key, slot in slots.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def _started(model: nn.Module, config: LoraConfig, saved: LoraConfig) -> dict[str, Tensor]:
    """Return the factors of an adapter that another strategy has given a start, and change `saved` to fit them.

    One that counts from its start is written as the difference to it, a plain adapter of twice the rank.
    """
    layers = dict(adapter_layers(model, RUN_ADAPTER))
    ranks = {path: layer.r[RUN_ADAPTER] for path, layer in layers.items()}
    starts = {path: update_of(model, layer, RUN_ADAPTER).start for path, layer in layers.items()}
    same = {*layers} == {*(config.target_modules or ())} and (config.rank_pattern or {*ranks.values()} == {config.r})
    if config.target_parameters or (same and not any(starts.values())):
        return {}
    slots: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for path, layer in layers.items():
        a, b = difference(layer.lora_A[RUN_ADAPTER].weight, layer.lora_B[RUN_ADAPTER].weight, starts[path])
        slots |= {f"base_model.model.{path}.lora_{part}.weight": t for part, t in (("A", a), ("B", b))}
        ranks[path] = rank = len(a)
        alphas[path] = layer.scaling[RUN_ADAPTER] * (math.sqrt(rank) if config.use_rslora else rank)
    saved.target_modules = sorted(ranks)
    saved.r = Counter(ranks.values()).most_common(1)[0][0]
    saved.lora_alpha = next(alphas[path] for path, rank in ranks.items() if rank == saved.r)  # type: ignore[assignment]
    others = [path for path, rank in ranks.items() if rank != saved.r]
    saved.rank_pattern = {path: ranks[path] for path in others}
    saved.alpha_pattern = {path: alphas[path] for path in others}
    return slots


def attach(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> LoraConfig:
    """Attach a saved adapter to a model, inactive; return its config with full names of modules."""
    saved = parse_saved_config(TYPE, SavedConfig, config)
    found = saved_targets(model, saved)
    targets, experts = split_targets(model, found)
    if experts and saved.lora_bias:
        raise InputError("adapter_config.json: lora_bias is not supported on experts (target_parameters).")
    resolved = {
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
    }
    resolved |= {"trainable_token_indices"}
    fields = saved.model_dump(exclude=resolved, exclude_none=True)
    fields |= {key: saved_pattern(getattr(saved, key), found) for key in ("rank_pattern", "alpha_pattern")}
    fields["fan_in_fan_out"] = fan_in_fan_out(model, targets)
    whole = saved_whole_modules(model, saved, tensors)
    tokens, tensors = saved_tokens(model, saved, tensors, whole)
    lora_config = LoraConfig(
        **fields, target_modules=targets, target_parameters=experts or None, modules_to_save=whole or None,
        trainable_token_indices=tokens or None,
    )  # fmt: skip
    try:
        add_adapter(model, lora_config, name)
        fit_whole(model, name, tensors)
        slots = tensor_slots(model, name)
        copy_adapter_tensors(slots, without_base_tensors(model, tensors, slots))
    except BaseException:
        remove_adapter(model, name)
        raise
    return lora_config


def merge(model: nn.Module, name: str) -> None:
    """Merge an adapter into the weights, and detach it.

    Raises:
        InputError: it adds a bias to a linear that has none.
    """
    select_adapters(model, TYPE, [name])
    for path, layer in adapter_layers(model, name):
        if layer.lora_bias[name] and getattr(layer.get_base_layer(), "bias", None) is None:
            raise InputError(f"lora_bias: '{path}' has no bias to merge it into: load the adapter instead.")
    merge_whole_parts(model, name)
    for _, layer in adapter_layers(model, name):
        layer.merge(safe_merge=True, adapter_names=[name])
    remove_adapter(model, name)


def tensor_slots(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the live tensors of an adapter, by key in PEFT's file."""
    slots: dict[str, Tensor] = {}
    layers = dict(adapter_layers(model, name))
    paths = file_paths(model, layers)
    for path, layer in layers.items():
        prefix = f"base_model.model.{paths[path]}"
        slots[f"{prefix}.lora_A.weight"] = layer.lora_A[name].weight.data
        slots[f"{prefix}.lora_B.weight"] = layer.lora_B[name].weight.data
        if layer.lora_B[name].bias is not None:
            slots[f"{prefix}.lora_B.bias"] = layer.lora_B[name].bias.data
        if name in layer.lora_magnitude_vector:
            slots[f"{prefix}.lora_magnitude_vector"] = layer.lora_magnitude_vector[name].weight.data
    return slots | whole_tensors(model, name)

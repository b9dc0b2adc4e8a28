"""LoRA as a strategy: the adapter's parameters, its file in PEFT's layout, and its life on a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from budwood import (
    RUN_ADAPTER,
    TASK_TYPES,
    InputError,
    ParameterGroup,
    Plan,
    Run,
    Strategy,
    adapter_layers,
    check_adapter_tensors,
    hookimpl,
    match_modules,
    match_targets,
    merge_whole_parts,
    parse_saved_config,
    remove_adapter,
    saved_targets,
    select_adapters,
    whole_groups,
    whole_tensors,
)
from budwood_lora.layers import KIND, add_adapter
from budwood_lora.options import LoRAOptions, SavedConfig


class LoRA(Strategy):
    """Low-rank adapters W + (alpha / rank) · B A on frozen linears (Hu et al., 2021)."""

    Options = LoRAOptions
    slots = ("adapter",)

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        if plan.model is None:
            return
        try:
            match_targets(plan.model, self.options.targets, self.options.layers)
            match_modules(plan.model, self.options.modules_to_save)
        except InputError as error:
            plan.problem(self, str(error))

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        options = self.options
        heads = [name for name in run.task.head_modules(model) if name not in options.modules_to_save]
        match_modules(model, options.modules_to_save)
        config = LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,  # type: ignore[arg-type]
            lora_dropout=options.dropout,
            target_modules=match_targets(model, options.targets, options.layers),
            use_rslora=options.rslora,
            use_dora=options.dora,
            init_lora_weights=True if options.init == "default" else "gaussian",
            modules_to_save=[*options.modules_to_save, *heads] or None,
            bias=options.bias,
            task_type=TASK_TYPES.get(run.recipe.base.task),
            base_model_name_or_path=run.recipe.base.model,
        )
        with torch.random.fork_rng(devices=[]):  # the adapter's start depends on the seed alone
            torch.manual_seed(run.seed)
            add_adapter(model, config, RUN_ADAPTER)
        select_adapters(model, KIND, [RUN_ADAPTER])
        self._config = config
        return model

    @hookimpl
    def trainable_parameters(self, run: Run, model: nn.Module) -> list[ParameterGroup]:
        down: dict[str, nn.Parameter] = {}
        up: dict[str, nn.Parameter] = {}
        for path, layer in adapter_layers(model, RUN_ADAPTER):
            down[f"{path}.lora_A"] = layer.lora_A[RUN_ADAPTER].weight
            up[f"{path}.lora_B"] = layer.lora_B[RUN_ADAPTER].weight
            if RUN_ADAPTER in layer.lora_magnitude_vector:
                down[f"{path}.lora_magnitude_vector"] = layer.lora_magnitude_vector[RUN_ADAPTER].weight
        return [
            ParameterGroup("lora_A", down),
            ParameterGroup("lora_B", up, learning_rate_ratio=self.options.learning_rate_ratio),
            *whole_groups(model, RUN_ADAPTER),
        ]

    @hookimpl
    def export(self, run: Run, model: nn.Module, directory: Path) -> None:
        dataclasses.replace(self._config, inference_mode=True).save_pretrained(str(directory))
        tensors = {key: slot.detach().cpu().contiguous() for key, slot in _tensor_slots(model, RUN_ADAPTER).items()}
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})

    @hookimpl
    def attach_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
        saved = parse_saved_config(KIND, SavedConfig, LoraConfig(), config)
        fields = saved.model_dump(exclude={"target_modules", "layers_to_transform"}, exclude_none=True)
        lora_config = LoraConfig(**fields, target_modules=saved_targets(model, saved))
        try:
            add_adapter(model, lora_config, name)
            slots = _tensor_slots(model, name)
            check_adapter_tensors({key: tuple(slot.shape) for key, slot in slots.items()}, tensors)
            for key, slot in slots.items():
                slot.copy_(tensors[key])
        except BaseException:
            remove_adapter(model, name)
            raise

    @hookimpl
    def use_adapters(self, model: nn.Module, names: Sequence[str | None]) -> None:
        select_adapters(model, KIND, names)

    @hookimpl
    def detach_adapter(self, model: nn.Module, name: str) -> None:
        remove_adapter(model, name)

    @hookimpl
    def merge_adapter(self, model: nn.Module, name: str) -> None:
        select_adapters(model, KIND, [name])
        for _, layer in adapter_layers(model, name):
            layer.merge(safe_merge=True, adapter_names=[name])
        merge_whole_parts(model, name)
        remove_adapter(model, name)


def _tensor_slots(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The live tensors of an adapter, by key in PEFT's file."""
    slots: dict[str, Tensor] = {}
    for path, layer in adapter_layers(model, name):
        prefix = f"base_model.model.{path}"
        slots[f"{prefix}.lora_A.weight"] = layer.lora_A[name].weight.data
        slots[f"{prefix}.lora_B.weight"] = layer.lora_B[name].weight.data
        if layer.lora_B[name].bias is not None:
            slots[f"{prefix}.lora_B.bias"] = layer.lora_B[name].bias.data
        if name in layer.lora_magnitude_vector:
            slots[f"{prefix}.lora_magnitude_vector"] = layer.lora_magnitude_vector[name].weight.data
    return slots | whole_tensors(model, name)

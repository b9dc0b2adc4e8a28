"""LoRA as a strategy: the adapter's parameters, its file in PEFT's layout, and its life on a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from budwood import (
    RUN_ADAPTER,
    CorruptError,
    InputError,
    ParameterGroup,
    Plan,
    Run,
    Strategy,
    check_adapter_tensors,
    hookimpl,
)
from budwood_lora.layers import add_adapter, bias_parameters, live, remove_adapter, restore_modules, select
from budwood_lora.options import LoRAOptions
from budwood_lora.targets import match_modules, match_targets
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

TASK_TYPES = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}


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
        select(model, [RUN_ADAPTER])
        return model

    @hookimpl
    def trainable_parameters(self, run: Run, model: nn.Module) -> list[ParameterGroup]:
        down: dict[str, nn.Parameter] = {}
        up: dict[str, nn.Parameter] = {}
        whole: dict[str, nn.Parameter] = {}
        for path, module in model.named_modules():
            if isinstance(module, LoraLayer):
                down[f"{path}.lora_A"] = module.lora_A[RUN_ADAPTER].weight
                up[f"{path}.lora_B"] = module.lora_B[RUN_ADAPTER].weight
                if RUN_ADAPTER in module.lora_magnitude_vector:
                    down[f"{path}.lora_magnitude_vector"] = module.lora_magnitude_vector[RUN_ADAPTER].weight
            elif isinstance(module, AuxiliaryTrainingWrapper):
                for name, parameter in module.modules_to_save[RUN_ADAPTER].named_parameters():
                    whole[f"{path}.{name}"] = parameter
        groups = [
            ParameterGroup("lora_A", down),
            ParameterGroup("lora_B", up, learning_rate_ratio=self.options.learning_rate_ratio),
        ]
        if whole:
            groups.append(ParameterGroup("modules_to_save", whole))
        biases = bias_parameters(model, RUN_ADAPTER)
        if biases:
            groups.append(ParameterGroup("bias", biases, weight_decay=0.0))
        return groups

    @hookimpl
    def export(self, run: Run, model: nn.Module, directory: Path) -> None:
        state = live(model)
        assert state is not None  # prepare_model has put it there
        config = dataclasses.replace(state.peft.peft_config[RUN_ADAPTER], inference_mode=True)
        config.save_pretrained(str(directory))
        save_file(adapter_tensors(model, RUN_ADAPTER), directory / "adapter_model.safetensors", metadata={"format": "pt"})

    @hookimpl
    def attach_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
        lora_config = _parse_config(config)
        wanted = lora_config.target_modules
        if isinstance(wanted, set):
            lora_config.target_modules = match_targets(model, sorted(wanted), None)
        first = live(model) is None
        try:
            add_adapter(model, lora_config, name)
            slots = _tensor_slots(model, name)
            check_adapter_tensors({key: tuple(slot.shape) for key, slot in slots.items()}, tensors)
            for key, slot in slots.items():
                slot.copy_(tensors[key])
        except BaseException:
            if first:
                restore_modules(model)
            else:
                remove_adapter(model, name)
            raise

    @hookimpl
    def use_adapters(self, model: nn.Module, names: Sequence[str | None]) -> None:
        select(model, names)

    @hookimpl
    def detach_adapter(self, model: nn.Module, name: str) -> None:
        remove_adapter(model, name)

    @hookimpl
    def merge_adapter(self, model: nn.Module, name: str) -> None:
        select(model, [name])
        for path, module in list(model.named_modules()):
            if isinstance(module, LoraLayer) and name in module.lora_A:
                module.merge(safe_merge=True, adapter_names=[name])
            elif isinstance(module, AuxiliaryTrainingWrapper) and name in module.modules_to_save:
                module.original_module.load_state_dict(module.modules_to_save[name].state_dict())
        state = live(model)
        assert state is not None
        for key, value in state.biases.get(name, {}).items():
            state.base_biases[key] = value.to(state.base_biases[key].dtype)
        restore_modules(model)


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Tensors of an adapter under the keys of PEFT's file, contiguous on the CPU."""
    return {key: slot.detach().cpu().contiguous() for key, slot in _tensor_slots(model, name).items()}


def _tensor_slots(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The live tensors of an adapter, by key in PEFT's file."""
    slots: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        prefix = f"base_model.model.{path}"
        if isinstance(module, LoraLayer) and name in module.lora_A:
            slots[f"{prefix}.lora_A.weight"] = module.lora_A[name].weight.data
            slots[f"{prefix}.lora_B.weight"] = module.lora_B[name].weight.data
            if module.lora_B[name].bias is not None:
                slots[f"{prefix}.lora_B.bias"] = module.lora_B[name].bias.data
            if name in module.lora_magnitude_vector:
                slots[f"{prefix}.lora_magnitude_vector"] = module.lora_magnitude_vector[name].weight.data
        elif isinstance(module, AuxiliaryTrainingWrapper) and name in module.modules_to_save:
            for key, value in module.modules_to_save[name].state_dict().items():
                slots[f"{prefix}.{key}"] = value
    state = live(model)
    for key, value in (state.biases.get(name, {}) if state else {}).items():
        slots[f"base_model.model.{key}"] = value
    return slots


def _parse_config(config: dict[str, Any]) -> LoraConfig:
    """Build PEFT's config from adapter_config.json; what this plugin does not carry out is refused by name.

    Raises:
        CorruptError: a field has an impossible value.
        InputError: the adapter uses a variant of LoRA that is not supported.
    """
    defaults = LoraConfig()
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    passed_on = {
        "r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "use_rslora", "use_dora", "bias",
        "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "lora_bias",
        "lora_dropout", "task_type",
    }  # fmt: skip
    harmless = {"base_model_name_or_path", "inference_mode", "init_lora_weights", "auto_mapping", "revision",
                "peft_type", "peft_version", "runtime_config", "loftq_config", "eva_config", "corda_config",
                "lora_ga_config", "megatron_core", "megatron_config", "qalora_group_size"}  # fmt: skip
    for key, value in config.items():
        ignored = key in passed_on or key in harmless or value in (None, False, [], {})
        if not ignored and not (key in known and value == getattr(defaults, key)):
            raise InputError(f"adapter_config.json: '{key}: {json.dumps(value)}' is not supported by strategy 'lora'.")
    try:
        return LoraConfig(**{key: config[key] for key in passed_on if key in config}, init_lora_weights=True)
    except (TypeError, ValueError) as error:
        raise CorruptError(f"adapter_config.json: {error}") from error

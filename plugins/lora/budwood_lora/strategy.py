"""LoRA as a strategy: the adapter's parameters, its file in PEFT's layout, and its life on a model."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

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
from budwood_lora.options import WITHOUT_EFFECT, LoRAOptions, SavedConfig
from budwood_lora.targets import match_modules, match_targets

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
            if isinstance(module, LoraLayer) and RUN_ADAPTER in module.lora_A:
                down[f"{path}.lora_A"] = module.lora_A[RUN_ADAPTER].weight
                up[f"{path}.lora_B"] = module.lora_B[RUN_ADAPTER].weight
                if RUN_ADAPTER in module.lora_magnitude_vector:
                    down[f"{path}.lora_magnitude_vector"] = module.lora_magnitude_vector[RUN_ADAPTER].weight
            elif isinstance(module, AuxiliaryTrainingWrapper) and RUN_ADAPTER in module.modules_to_save:
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
        save_file(
            adapter_tensors(model, RUN_ADAPTER), directory / "adapter_model.safetensors", metadata={"format": "pt"}
        )

    @hookimpl
    def attach_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
        lora_config = _parse_config(model, config)
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
        for module in list(model.modules()):
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


def _parse_config(model: nn.Module, config: dict[str, Any]) -> LoraConfig:
    """Build PEFT's config from adapter_config.json, with its targets as full names of the model's modules.

    Raises:
        CorruptError: a field has an impossible value, or names modules that the model has not.
        InputError: the adapter uses a variant of LoRA that is not supported; it is named.
    """
    defaults, known = LoraConfig(), {f.name for f in dataclasses.fields(LoraConfig)}
    for key, value in config.items():
        unused = key in SavedConfig.model_fields or key in WITHOUT_EFFECT or value in (None, False, [], {})
        if not unused and not (key in known and value == getattr(defaults, key)):
            raise InputError(f"adapter_config.json: '{key}: {json.dumps(value)}' is not supported by strategy 'lora'.")
    try:
        saved = SavedConfig.model_validate(config)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise CorruptError(f"adapter_config.json: {field}: {problem['msg']}.") from error
    layers = [saved.layers_to_transform] if isinstance(saved.layers_to_transform, int) else saved.layers_to_transform
    targets = "all-linear" if saved.target_modules == "all-linear" else saved.target_modules
    try:
        names = match_targets(model, targets, layers)
        if saved.modules_to_save and not any(_has_module(model, name) for name in saved.modules_to_save):
            raise InputError(f"modules_to_save: the model has none of {', '.join(saved.modules_to_save)}.")
    except (InputError, re.error) as error:
        raise CorruptError(f"adapter_config.json: {error}") from error
    fields = saved.model_dump(exclude={"target_modules", "layers_to_transform"}, exclude_none=True)
    return LoraConfig(**fields, target_modules=names)


def _has_module(model: nn.Module, name: str) -> bool:
    return any(path == name or path.endswith("." + name) for path, _ in model.named_modules())

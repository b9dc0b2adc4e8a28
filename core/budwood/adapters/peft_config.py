"""Strict reading of adapter_config.json of PEFT's low-rank methods, and resolution of its targets to modules."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from budwood.adapters.targets import match_targets, matches
from budwood.errors import CorruptError, InputError

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

TASK_TYPES = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}
"""PEFT's names for the tasks."""
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "init_lora_weights",
    "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
"""Fields that do not affect what a trained adapter computes, such as its initialisation."""


class SavedLowRankConfig(BaseModel):
    """The fields common to all low-rank adapters. Types are strict; a method adds its own fields."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    lora_alpha: float = 8
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = Field(min_length=1)
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False  # ignored: like PEFT, the layout follows from each module's class
    bias: Literal["none", "lora_only", "all"] = "none"
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None


Saved = TypeVar("Saved", bound=SavedLowRankConfig)
Value = TypeVar("Value", int, float)


def parse_saved_config(
    adapter_type: str, fields: type[Saved], defaults: LoraConfig, config: dict[str, Any], unused: Collection[str] = ()
) -> Saved:
    """Validate adapter_config.json.

    Args:
        adapter_type: name of the strategy that reads it, for messages.
        fields: model of the fields that the method uses.
        defaults: PEFT's config; a field at its default needs no support.
        config: content of the file.
        unused: fields without effect on what the adapter computes, in addition to `WITHOUT_EFFECT`.

    Raises:
        CorruptError: a field has an invalid value.
        InputError: the adapter uses an unsupported variant; the message names it.
    """
    known = {f.name for f in dataclasses.fields(defaults)}
    for key, value in config.items():
        supported = (
            key in fields.model_fields or key in WITHOUT_EFFECT or key in unused or value in (None, False, [], {})
        )
        if not supported and not (key in known and value == getattr(defaults, key)):
            raise InputError(
                f"adapter_config.json: '{key}: {json.dumps(value)}' is not supported by strategy '{adapter_type}'."
            )
    try:
        return fields.model_validate(config)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise CorruptError(f"adapter_config.json: {field}: {problem['msg']}.") from error


def saved_pattern(patterns: Mapping[str, Value], names: Sequence[str]) -> dict[str, Value]:
    """Resolve a saved `rank_pattern` or `alpha_pattern`, whose keys match the ends of names, to complete names.

    The resulting keys are escaped plain names, since PEFT would match untrusted expressions without a time limit.

    Raises:
        CorruptError: a key is not a regular expression, or takes too long to match.
    """
    resolved = {}
    for name in names:
        try:
            key = next((key for key in patterns if matches(rf"(?:.*\.)?(?:{key})", name)), None)
        except InputError as error:
            raise CorruptError(f"adapter_config.json: {error}") from error
        if key is not None:
            resolved[re.escape(name)] = patterns[key]
    return resolved


def saved_targets(model: nn.Module, saved: SavedLowRankConfig) -> list[str]:
    """Return the full names of the modules that a saved adapter adapts.

    Raises:
        CorruptError: the config names modules that the model does not have.
    """
    layers = [saved.layers_to_transform] if isinstance(saved.layers_to_transform, int) else saved.layers_to_transform
    paths = [path for path, _ in model.named_modules()]
    try:
        names = match_targets(model, saved.target_modules, layers)
        excluded = saved.exclude_modules or []
        if isinstance(excluded, str):
            names = [name for name in names if not matches(excluded, name)]
        else:
            names = [name for name in names if not any(name == end or name.endswith("." + end) for end in excluded)]
        to_save = saved.modules_to_save or []
        if to_save and not any(path == name or path.endswith("." + name) for name in to_save for path in paths):
            raise InputError(f"modules_to_save: the model has none of {', '.join(to_save)}.")
    except InputError as error:
        raise CorruptError(f"adapter_config.json: {error}") from error
    return names

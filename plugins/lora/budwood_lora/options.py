"""The options of LoRA, and what each of PEFT's other initialisations is refused for."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from budwood import Options

REFUSED_INITS = ("pissa", "olora", "orthogonal", "loftq", "eva", "corda", "lora_ga", "mica")


class LoRAOptions(Options):
    """Options of `lora`; the names in brackets are those of PEFT's LoraConfig."""

    rank: int = Field(8, ge=1, le=4096, description="rank of every low-rank update (r)")
    alpha: float = Field(16, gt=0, description="scale of the update: alpha / rank, or alpha / sqrt(rank) with rslora")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: str | list[str] = Field(
        "all-linear", description="all-linear, a list of module names, or one regular expression for whole names"
    )
    layers: list[int] | None = Field(None, min_length=1, description="indices of the layers to adapt; all if absent")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (Kalajdzievski, 2023)")
    dora: bool = Field(False, description="decompose into magnitude and direction (Liu et al., 2024)")
    init: str = Field("default", description="default (Kaiming uniform A, zero B) or gaussian (normal A, zero B)")
    learning_rate_ratio: float = Field(
        1.0, gt=0, description="learning rate of B over that of A: LoRA+ (Hayou et al., 2024) advises 16"
    )
    modules_to_save: list[str] = Field([], description="modules that train whole and are saved with the adapter")
    bias: Literal["none", "lora_only", "all"] = Field(
        "none", description="train the biases of the adapted layers (lora_only) or of the whole model (all)"
    )

    @field_validator("init")
    @classmethod
    def _known_init(cls, value: str) -> str:
        if value.startswith(REFUSED_INITS):
            raise ValueError(
                f"'{value}' rewrites the base's weights or does not start from the base's function, so the adapter "
                "would not fit the base that it is swapped on; use default or gaussian"
            )
        if value not in ("default", "gaussian"):
            raise ValueError("must be default or gaussian")
        return value

    @field_validator("targets")
    @classmethod
    def _targets_given(cls, value: str | list[str]) -> str | list[str]:
        if not value or (isinstance(value, list) and not all(value)):
            raise ValueError("must name at least one module")
        if isinstance(value, str) and value != "all-linear":
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"is not a valid regular expression: {error}") from error
        return value

    @field_validator("layers")
    @classmethod
    def _layers_positive(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and min(value) < 0:
            raise ValueError("layer indices start at 0")
        return value

    @model_validator(mode="after")
    def _ratio_needs_both(self) -> LoRAOptions:
        if len(set(self.modules_to_save)) != len(self.modules_to_save):
            raise ValueError("modules_to_save names a module twice")
        return self


WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "init_lora_weights",
    "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
"""Fields of PEFT's adapter_config.json that say how an adapter began, or nothing about what it computes."""


class SavedConfig(BaseModel):
    """The fields of adapter_config.json by which a LoRA adapter computes; types are strict, other fields are left."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    r: int = Field(8, ge=1)
    lora_alpha: float = 8
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = Field(min_length=1)
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: Literal[False] = False
    bias: Literal["none", "lora_only", "all"] = "none"
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

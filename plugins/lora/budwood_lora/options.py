"""The options of LoRA, and what each of PEFT's other initialisations is refused for."""

from __future__ import annotations

import re
from typing import Literal

from budwood import Options
from pydantic import Field, field_validator, model_validator

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

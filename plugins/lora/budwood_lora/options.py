"""The options of LoRA, and the initialisations of PEFT that are refused."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from budwood import Layers, ModulesToSave, Options, Targets
from budwood.lowrank import SavedExpertsConfig

STRATEGIES = ("pissa", "olora", "loftq", "eva", "corda", "lora_ga")
"""Initialisations of PEFT that are strategies beside `lora`."""
REFUSED_INITS = ("orthogonal", "mica")


class LoRAOptions(Options):
    """Options of `lora`; names in brackets are those in PEFT's LoraConfig."""

    rank: int = Field(8, ge=1, le=4096, description="rank of every low-rank update (r)")
    alpha: float = Field(16, gt=0, description="scale of the update: alpha / rank, or alpha / sqrt(rank) with rslora")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: Targets = "all-linear"
    layers: Layers = None
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (Kalajdzievski, 2023)")
    dora: bool = Field(False, description="decompose into magnitude and direction (Liu et al., 2024)")
    init: str = Field("default", description="default (Kaiming uniform A, zero B) or gaussian (normal A, zero B)")
    learning_rate_ratio: float = Field(
        1.0, gt=0, description="learning rate of B over that of A: LoRA+ (Hayou et al., 2024) advises 16"
    )
    modules_to_save: ModulesToSave = []
    bias: Literal["none", "lora_only", "all"] = Field(
        "none", description="train the biases of the adapted layers (lora_only) or of the whole model (all)"
    )

    @field_validator("init")
    @classmethod
    def _known_init(cls, value: str) -> str:
        if found := next((name for name in STRATEGIES if value.startswith(name)), None):
            raise ValueError(f"'{value}' is a strategy: leave init out, and add {found.replace('_', '-')} beside lora")
        if value.startswith(REFUSED_INITS):
            raise ValueError(
                f"'{value}' rewrites the base's weights or does not start from the base's function, so the adapter "
                "would not fit the base that it is swapped on; use default or gaussian"
            )
        if value not in ("default", "gaussian"):
            raise ValueError("must be default or gaussian")
        return value


class SavedConfig(SavedExpertsConfig):
    """The fields of adapter_config.json that determine the function of a LoRA adapter."""

    r: int = Field(8, ge=1)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}

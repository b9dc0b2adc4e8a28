"""The options of AdaLoRA, and the fields of its file."""

from __future__ import annotations

from pydantic import Field, model_validator

from budwood import Layers, ModulesToSave, Options, Targets
from budwood.lowrank import SavedExpertsConfig

TYPE = "adalora"


class AdaLoRAOptions(Options):
    """Options of `adalora`; in PEFT's AdaLoraConfig init_r, target_r, tinit, tfinal, deltaT, orth_reg_weight."""

    initial_rank: int = Field(12, ge=1, le=4096, description="rank of every update at the start")
    target_rank: int = Field(
        8,
        ge=1,
        le=4096,
        description="mean rank at the end: the budget is this times the targets, with each expert a target",
    )
    alpha: float = Field(24, gt=0, description="scale of every update: alpha / initial_rank, at all ranks")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: Targets = "all-linear"
    layers: Layers = None
    modules_to_save: ModulesToSave = []
    initial_phase: float = Field(0.1, ge=0, description="before pruning: below 1 a share of the run, otherwise steps")
    final_phase: float = Field(0.6, gt=0, description="at the final ranks: below 1 a share, otherwise steps")
    interval: int = Field(5, ge=1, description="steps between allocations")
    beta1: float = Field(0.85, gt=0, lt=1, description="decay of the moving average of the sensitivity")
    beta2: float = Field(0.85, gt=0, lt=1, description="decay of the moving average of its uncertainty")
    orthogonality: float = Field(0.1, ge=0, description="weight of the penalty that keeps singular vectors orthogonal")

    @model_validator(mode="after")
    def _consistent(self) -> AdaLoRAOptions:
        if self.target_rank > self.initial_rank:
            raise ValueError(
                f"target_rank {self.target_rank} is above initial_rank {self.initial_rank}: ranks only decrease"
            )
        for name in ("initial_phase", "final_phase"):
            value = getattr(self, name)
            if value >= 1 and value != int(value):
                raise ValueError(f"{name}: values of 1 and above are steps and must be integers (got {value})")
        if sum(share for share in (self.initial_phase, self.final_phase) if share < 1) >= 1:
            raise ValueError("initial_phase and final_phase leave no share of the run to allocate ranks in")
        return self


class SavedConfig(SavedExpertsConfig):
    """The fields of adapter_config.json that determine the function of an AdaLoRA adapter."""

    init_r: int = Field(12, ge=1)
    rank_pattern: dict[str, list[bool]] | None = None


UNUSED = (
    "alpha_pattern", "beta1", "beta2", "deltaT", "init_lora_weights", "orth_reg_weight", "r", "target_r", "tfinal",
    "tinit", "total_step", "use_rslora",
)  # fmt: skip
"""Fields that only describe how an adapter was trained, or that PEFT's AdaLoRA does not read."""

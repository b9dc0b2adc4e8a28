"""The options of the preference objectives."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from budwood import Options

Reference = Literal["live", "cached"]
_SFT = "weight of the task's own loss, which is on the chosen answers alone; 0: it is only logged"
_REFERENCE = (
    "live: a forward pass of the reference in every micro-step; cached: one over the training data before the first "
    "step, which pays off with more than one epoch"
)


class DPOOptions(Options):
    """Options of `dpo`."""

    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = Field(
        "sigmoid", description="function of the difference of the log-ratios; see the README"
    )
    beta: float = Field(0.1, gt=0, description="β: a larger value keeps the policy closer to the reference")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of pairs assumed to be the wrong way round; sigmoid and robust only"
    )
    length_normalized: bool = Field(
        False, description="divide each answer's log-ratio by its number of tokens; ipo always does"
    )
    sft: float = Field(0.0, ge=0, description=_SFT)
    reference: Reference = Field("live", description=_REFERENCE)

    @model_validator(mode="after")
    def _no_unused_option(self) -> DPOOptions:
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing: not used by {self.loss}; remove it, or use sigmoid or robust")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("label_smoothing: robust needs the share of wrong pairs, such as 0.1; or use sigmoid")
        if self.loss == "ipo" and self.length_normalized:
            raise ValueError("length_normalized: ipo always divides by the number of tokens; remove it")
        return self


class ORPOOptions(Options):
    """Options of `orpo`."""

    weight: float = Field(0.1, gt=0, description="λ: weight of the odds-ratio term; the loss on chosen answers has 1")


class SimPOOptions(Options):
    """Options of `simpo`."""

    beta: float = Field(2.0, gt=0, description="β: factor of the mean log-probabilities")
    gamma: float = Field(1.0, ge=0, description="γ: the margin by which the chosen answer should win")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs assumed to be the wrong way round")
    sft: float = Field(0.0, ge=0, description=_SFT)


class CPOOptions(Options):
    """Options of `cpo`."""

    beta: float = Field(0.1, gt=0, description="β: factor of the log-probabilities")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs assumed to be the wrong way round")
    sft: float = Field(1.0, ge=0, description=_SFT)


class KTOOptions(Options):
    """Options of `kto`."""

    beta: float = Field(0.1, gt=0, description="β: a larger value keeps the policy closer to the reference")
    desirable_weight: float = Field(1.0, gt=0, description="λ_D: weight of desirable answers")
    undesirable_weight: float = Field(1.0, gt=0, description="λ_U: weight of undesirable answers")
    sft: float = Field(0.0, ge=0, description="weight of the task's own loss, on the desirable answers; 0: only logged")
    reference: Reference = Field("live", description=_REFERENCE)

"""The options of distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from budwood import Options

DEFAULT_TOP_K = 64
BASE = "base"
ON_BASE = "base+"


class DistillationOptions(Options):
    """Options of `distillation`; the loss is (1 - weight) · task + weight · T² · divergence."""

    teacher: str = Field(
        min_length=1,
        description="a folder or hub name; base: this base without the adapter; base+DIR: with the adapter in DIR",
    )
    quantization: str | None = Field(
        None, description="of a teacher that is a folder or hub name: none, int8, nf4, fp4; default: its checkpoint's"
    )
    divergence: Literal["forward-kl", "reverse-kl", "jensen-shannon"] = Field(
        "forward-kl", description="KL(teacher ‖ student), KL(student ‖ teacher), or GKD's generalised Jensen-Shannon"
    )
    beta: float | None = Field(
        None, gt=0, lt=1, description="the teacher's share of the Jensen-Shannon mixture; default 0.5"
    )
    temperature: float = Field(
        1.0, ge=0.01, le=100, description="T, divides the logits of both; the divergence is multiplied by T²"
    )
    weight: float = Field(0.5, gt=0, le=1, description="share of distillation in the loss; the task's is 1 - weight")
    hidden_weight: float = Field(
        0.0, ge=0, description="weight of the term between the last hidden states at the labels; 0: no such term"
    )
    hidden_distance: Literal["mse", "cosine"] | None = Field(
        None, description="distance in that term: mean squared difference (mse, default) or 1 - cosine"
    )
    cache: str | None = Field(
        None, min_length=1, description="folder for the teacher's top-k outputs; later epochs and runs read it"
    )
    top_k: int | None = Field(
        None, ge=1, description=f"most probable tokens per label in the cache; default {DEFAULT_TOP_K}"
    )

    @property
    def adapter(self) -> str | None:
        """The folder of a `base+DIR` teacher."""
        folder = self.teacher.removeprefix(ON_BASE) if self.teacher.startswith(ON_BASE) else None
        return None if folder is None else str(Path(folder).expanduser())

    @property
    def own_model(self) -> bool:
        """Whether the teacher is a separate model."""
        return self.teacher != BASE and self.adapter is None

    @field_validator("teacher")
    @classmethod
    def _adapter_named(cls, value: str) -> str:
        if value == ON_BASE:
            raise ValueError("must name the adapter's folder, as in base+runs/first/adapter")
        return value

    @model_validator(mode="after")
    def _no_unused_option(self) -> DistillationOptions:
        if self.quantization is not None and not self.own_model:
            raise ValueError(f"quantization: the teacher '{self.teacher}' is the run's own base; remove it")
        if self.beta is not None and self.divergence != "jensen-shannon":
            raise ValueError(f"beta: not used by {self.divergence}; remove it, or use jensen-shannon")
        if self.hidden_distance is not None and self.hidden_weight == 0:
            raise ValueError("hidden_distance: needs a hidden_weight above 0")
        if self.top_k is not None and self.cache is None:
            raise ValueError("top_k: applies only to a cache; set its folder with cache")
        if self.cache is not None and self.hidden_weight > 0:
            raise ValueError("hidden_weight: the cache stores no hidden states; remove hidden_weight or cache")
        return self

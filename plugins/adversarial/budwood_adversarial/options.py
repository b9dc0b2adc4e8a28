"""The options of `adversarial`, and their defaults for each method."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from budwood import Options

Method = Literal["fgm", "pgd", "freelb", "smart", "vat", "neftune"]
Norm = Literal["l2", "linf"]

DEFAULTS: dict[str, dict[str, Any]] = {
    "fgm": {"epsilon": 1.0, "norm": "l2", "weight": 1.0, "clean_weight": 1.0},
    "pgd": {"epsilon": 1.0, "norm": "l2", "weight": 1.0, "clean_weight": 1.0, "steps": 3, "step_size": None},
    "freelb": {"epsilon": 1.0, "norm": "l2", "steps": 3, "step_size": None},
    "smart": {"epsilon": 1e-3, "norm": "linf", "weight": 1.0, "steps": 1, "step_size": None, "sigma": None},
    "vat": {"epsilon": 1.0, "weight": 1.0, "steps": 1, "xi": 0.1},
    "neftune": {"alpha": 5.0},
}
"""Options of each method besides `method`, `skip_special` and `skip_masked`; None: derived from epsilon."""


class AdversarialOptions(Options):
    """Options of `adversarial`. Sizes are on the scale of the embedding vectors, norms are per example."""

    method: Method = Field(
        "fgm", description="how noise on the embeddings is computed and used; determines which options apply"
    )
    epsilon: float | None = Field(
        None, gt=0, description="size of the noise; default 1 (fgm, pgd, freelb, vat), 0.001 per element (smart)"
    )
    norm: Norm | None = Field(
        None, description="norm of an example's noise: l2, or linf, its largest element (fgm, pgd, freelb, smart)"
    )
    steps: int | None = Field(
        None, ge=1, description="ascent steps of the noise, K; default 3 (pgd, freelb), 1 (smart, vat)"
    )
    step_size: float | None = Field(
        None,
        gt=0,
        description="size of an ascent step; default 2.5 · epsilon / steps (pgd, freelb), 100 · epsilon (smart)",
    )
    weight: float | None = Field(
        None, gt=0, description="weight of the perturbed loss (fgm, pgd) or of the divergence (smart, vat); default 1"
    )
    clean_weight: float | None = Field(
        None, ge=0, description="weight of the clean loss (fgm, pgd); 0: only the perturbed loss; default 1"
    )
    sigma: float | None = Field(
        None, gt=0, description="standard deviation of the initial noise (smart); default epsilon"
    )
    xi: float | None = Field(
        None, gt=0, description="norm of the noise at which the direction is estimated (vat); default 0.1"
    )
    alpha: float | None = Field(
        None, gt=0, description="uniform noise of ± alpha / sqrt(tokens · width) per element (neftune); default 5"
    )
    skip_special: bool = Field(False, description="put no noise on special tokens")
    skip_masked: bool = Field(False, description="put noise only on tokens that are labels: none on prompts")

    @model_validator(mode="after")
    def _match_method(self) -> AdversarialOptions:
        known = DEFAULTS[self.method]
        for name in ("epsilon", "norm", "steps", "step_size", "weight", "clean_weight", "sigma", "xi", "alpha"):
            if getattr(self, name) is not None and name not in known:
                raise ValueError(f"{name} is not an option of {self.method} (options: {', '.join(known)}); remove it")
        if self.method == "freelb" and self.steps == 1:
            raise ValueError("freelb with steps: 1 would train on random noise alone; use 2 or more")
        return self

    def value(self, name: str) -> Any:
        """Return the option, or the method's default."""
        value = getattr(self, name)
        if value is not None:
            return value
        if name == "step_size":
            ratio = 100.0 if self.method == "smart" else 2.5 / self.value("steps")
            return ratio * self.value("epsilon")
        return self.value("epsilon") if name == "sigma" else DEFAULTS[self.method][name]

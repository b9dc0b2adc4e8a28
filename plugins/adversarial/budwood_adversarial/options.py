"""The options of `adversarial`, and their defaults for each method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from budwood import Options

Method = Literal["fgm", "pgd", "freelb", "smart", "vat", "neftune"]
Norm = Literal["l2", "linf"]

RELATIVE_EPSILON = {"l2": 0.1, "linf": 0.02}
"""Default size of the noise of each norm, relative to the embeddings.

Miyato et al. (2017) use 5 on reviews of hundreds of words, with embeddings of 256 elements normalised to variance 1:
5 / sqrt(256) = 0.31. Shorter examples need less: see the README.
"""
RELATIVE_XI = 0.1
"""Default of `xi` as a multiple of the norm of an embedding."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "fgm": {"epsilon": None, "norm": "l2", "weight": 1.0, "clean_weight": 1.0},
    "pgd": {"epsilon": None, "norm": "l2", "weight": 1.0, "clean_weight": 1.0, "steps": 3, "step_size": None},
    "freelb": {"epsilon": None, "norm": "l2", "steps": 3, "step_size": None},
    "smart": {"epsilon": None, "norm": "linf", "weight": 1.0, "steps": 1, "step_size": None, "sigma": None},
    "vat": {"epsilon": None, "weight": 1.0, "steps": 1, "xi": None},
    "neftune": {"alpha": 5.0},
}
"""Options of each method besides `method`, `relative_epsilon`, `skip_special` and `skip_masked`; None: derived from
the embeddings or from epsilon."""


@dataclass(frozen=True)
class Scale:
    """The scale of a model's embeddings.

    Attributes:
        norm: median Euclidean norm over the vocabulary.
        width: elements of an embedding.
    """

    norm: float
    width: int

    def unit(self, norm: str) -> float:
        """Return the size that relative sizes refer to: the norm (l2), or the root mean square of its elements."""
        return self.norm if norm == "l2" else self.norm / self.width**0.5


class AdversarialOptions(Options):
    """Options of `adversarial`. Norms are per example; sizes are absolute, except for relative_epsilon."""

    method: Method = Field(
        "fgm", description="how noise on the embeddings is computed and used; determines which options apply"
    )
    epsilon: float | None = Field(None, gt=0, description="size of the noise; default: relative_epsilon determines it")
    relative_epsilon: float | None = Field(
        None,
        gt=0,
        description="epsilon relative to the median norm of the base's embeddings; default 0.1; with norm linf, to the "
        "root mean square of their elements; default 0.02",
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
        None,
        gt=0,
        description="norm of the noise at which the direction is estimated (vat); default 0.1 times an embedding's",
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
        if self.relative_epsilon is not None and "epsilon" not in known:
            raise ValueError(
                f"relative_epsilon is not an option of {self.method} (options: {', '.join(known)}); remove it"
            )
        check_sizes(self)
        if self.method == "freelb" and self.steps == 1:
            raise ValueError("freelb with steps: 1 would train on random noise alone; use 2 or more")
        return self

    def value(self, name: str, scale: Scale) -> Any:
        """Return the option, or the method's default for embeddings of this scale."""
        value = getattr(self, name)
        if value is not None:
            return value
        if name == "epsilon":
            norm = self.norm or DEFAULTS[self.method].get("norm", "l2")
            return relative(self.relative_epsilon, norm, scale)
        if name == "step_size":
            ratio = 100.0 if self.method == "smart" else 2.5 / self.value("steps", scale)
            return ratio * self.value("epsilon", scale)
        if name == "xi":
            return RELATIVE_XI * scale.norm
        return self.value("epsilon", scale) if name == "sigma" else DEFAULTS[self.method][name]


def check_sizes(options: Any) -> None:
    """Refuse options with both an absolute and a relative epsilon.

    Raises:
        ValueError: both are set.
    """
    if options.epsilon is not None and options.relative_epsilon is not None:
        raise ValueError("epsilon and relative_epsilon are the same size in two units; remove one")


def relative(size: float | None, norm: str, scale: Scale) -> float:
    """Return the absolute size of noise that has a size relative to the embeddings, by default that of its norm."""
    return (RELATIVE_EPSILON[norm] if size is None else size) * scale.unit(norm)

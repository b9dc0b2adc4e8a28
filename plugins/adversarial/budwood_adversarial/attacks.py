"""Projected gradient descent as an attack on a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from budwood import Attack, InputError, Options
from budwood_adversarial.options import Norm
from budwood_adversarial.strategy import has_embeddings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood import Step


class PGDOptions(Options):
    """Options of the attack `pgd`; sizes are on the scale of the embedding vectors, norms are per example."""

    epsilon: float = Field(1.0, gt=0, description="size of the noise")
    steps: int = Field(10, ge=1, description="ascent steps")
    step_size: float | None = Field(None, gt=0, description="size of an ascent step; default 2.5 · epsilon / steps")
    norm: Norm = Field("l2", description="norm of an example's noise: l2 (Euclidean) or linf (largest element)")
    skip_special: bool = Field(False, description="put no noise on special tokens")
    skip_masked: bool = Field(False, description="put noise only on tokens that are labels: none on prompts")


class PGD(Attack):
    """Noise on the embeddings that raises each example's loss, by projected gradient ascent (Madry et al., 2018)."""

    Options = PGDOptions

    def check(self, form: str, task: str, model: nn.Module | None) -> None:
        """Refuse a model without input embeddings."""
        if model is not None and not has_embeddings(model):
            raise InputError(f"--attack {self.name}: {type(model).__name__} has no input embeddings to put noise on.")
        if self.options.skip_masked and task == "sequence-classification":
            raise InputError(f"--attack {self.name}: skip_masked: in a classification no token is a label.")

    def noise(self, step: Step) -> Tensor:
        """Return the noise of a gradient ascent that starts from zero."""
        from budwood_adversarial.noise import PerturbationMask, ascend

        options = self.options
        mask = PerturbationMask(step.run, step.batch, options.skip_special, options.skip_masked)
        size = options.step_size or 2.5 * options.epsilon / options.steps
        start = step.zero_noise()
        return ascend(mask, start, step.noise_gradient, options.steps, size, options.epsilon, options.norm)

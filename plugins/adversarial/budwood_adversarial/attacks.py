"""Projected gradient descent as an attack on a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from budwood import Attack, InputError, Options
from budwood_adversarial.options import Norm, Scale, check_sizes, relative
from budwood_adversarial.strategy import describe_scale, has_embeddings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood import Run, Step


class PGDOptions(Options):
    """Options of the attack `pgd`. Norms are per example; sizes are absolute, except for relative_epsilon."""

    epsilon: float | None = Field(None, gt=0, description="size of the noise; default: relative_epsilon determines it")
    relative_epsilon: float | None = Field(
        None,
        gt=0,
        description="epsilon relative to the median norm of the embeddings; default 0.1; with norm linf, to the root "
        "mean square of their elements; default 0.02",
    )
    steps: int = Field(10, ge=1, description="ascent steps")
    step_size: float | None = Field(None, gt=0, description="size of an ascent step; default 2.5 · epsilon / steps")
    norm: Norm = Field("l2", description="norm of an example's noise: l2 (Euclidean) or linf (largest element)")
    skip_special: bool = Field(False, description="put no noise on special tokens")
    skip_masked: bool = Field(False, description="put noise only on tokens that are labels: none on prompts")

    @model_validator(mode="after")
    def _one_size(self) -> PGDOptions:
        check_sizes(self)
        return self


class PGD(Attack):
    """Noise on the embeddings that raises each example's loss, by projected gradient ascent (Madry et al., 2018)."""

    Options = PGDOptions
    _scale: Scale | None = None  # of the first model, so that noise is the same with and without an adapter

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
        epsilon = options.epsilon or self._relative(step.run)
        size = options.step_size or 2.5 * epsilon / options.steps
        return ascend(mask, step.zero_noise(), step.noise_gradient, options.steps, size, epsilon, options.norm)

    def _relative(self, run: Run) -> float:
        from budwood_adversarial.noise import measure

        options = self.options
        if self._scale is None:
            self._scale = measure(run)
            epsilon = relative(options.relative_epsilon, options.norm, self._scale)
            run.say(f"{self.name}: epsilon {epsilon:.2g}; {describe_scale(self._scale)}")
        return relative(options.relative_epsilon, options.norm, self._scale)

"""Noise on a batch's embeddings: mask, norms per example, initial values, gradient ascent.

Noise is [R, T, d] fp32. `Batch.example_of_token` maps positions to examples, so results are the same in a packed row,
in a padded row, and alone. Nothing here loops over tokens or reads the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from budwood import Batch, Run
from budwood_adversarial.options import Scale


def measure(run: Run) -> Scale:
    """Return the scale of a run's input embeddings; the median ignores the rows of unused tokens and of padding."""
    return Scale(float(run.task.embedding_norms(run).median()), run.task.embedding_width(run.model))


class PerturbationMask:
    """The positions of a batch that may carry noise.

    Attributes:
        open: [R·T, 1] fp32, 1 at positions that may carry noise, 0 at excluded tokens and padding.
        owner: [R·T] int64, the example of each position; padding is an additional last example.
        counts: [examples + 1] fp32, positions of each example that may carry noise.
    """

    def __init__(self, run: Run, batch: Batch, skip_special: bool = False, skip_masked: bool = False) -> None:
        self.batch = batch
        examples = len(batch.keys)
        owner = run.task.noise_owner(batch)
        allowed = owner >= 0
        special = run.task.special_positions(run, batch) if skip_special else None
        if special is not None:
            allowed = allowed & ~special
        labelled = run.task.labelled_positions(batch) if skip_masked else None
        if labelled is not None:
            allowed = allowed & labelled
        self.owner = torch.where(owner >= 0, owner, examples)
        self.open = allowed.float()[:, None]
        self.counts = torch.zeros(examples + 1, device=owner.device).index_add_(0, self.owner, allowed.float())

    def unit(self, gradient: Tensor, norm: str) -> Tensor:
        """Return the masked gradient, normalised per example ("l2" or "linf"); all-zero gradients stay zero."""
        flat = gradient.flatten(0, 1) * self.open
        scaled = flat / self._peak(flat).clamp(min=torch.finfo(flat.dtype).tiny)  # so that squares do not underflow
        if norm == "l2":
            scaled = scaled / self._length(scaled).clamp(min=1.0)
        return scaled.view_as(gradient)

    def steepest(self, gradient: Tensor, norm: str) -> Tensor:
        """Return the direction of steepest ascent with norm 1: the unit gradient for l2, its signs for linf."""
        if norm == "l2":
            return self.unit(gradient, norm)
        return (gradient.flatten(0, 1).sign() * self.open).view_as(gradient)

    def project(self, noise: Tensor, epsilon: float, norm: str) -> Tensor:
        """Project noise onto the ball of radius epsilon, per example."""
        if norm == "linf":
            return noise.clamp(-epsilon, epsilon)
        flat = noise.flatten(0, 1)
        factor = epsilon / self._length(flat).clamp(min=epsilon)
        return (flat * factor).view_as(noise)

    def per_root(self, noise: Tensor) -> Tensor:
        """Divide the noise of each example by sqrt(N), N the number of its elements that may carry noise."""
        elements = (self.counts * noise.shape[-1]).clamp(min=1.0).sqrt()
        return (noise.flatten(0, 1) / elements[self.owner][:, None]).view_as(noise)

    def draw(self, like: Tensor, example: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Return noise [R, T, d] like `like`, assembled on the CPU from `example(index, [tokens, d])`, moved once."""
        width = like.shape[-1]
        parts = [example(i, torch.empty(n, width)) for i, n in enumerate(self.batch.lengths)]
        if self.batch.segments:
            drawn = torch.cat(parts)
            whole = torch.nn.functional.pad(drawn, (0, 0, 0, self.batch.width - len(drawn)))[None]
        else:
            whole = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        return (whole.to(like.device).flatten(0, 1) * self.open).view_as(like)

    def _peak(self, flat: Tensor) -> Tensor:
        """Return [R·T, 1]: the largest absolute element of each position's example."""
        peaks = torch.zeros(len(self.counts), device=flat.device)
        peaks.scatter_reduce_(0, self.owner, flat.abs().amax(-1), "amax")
        return peaks[self.owner][:, None]

    def _length(self, flat: Tensor) -> Tensor:
        """Return [R·T, 1]: the Euclidean norm of each position's example."""
        squares = torch.zeros(len(self.counts), device=flat.device)
        squares.index_add_(0, self.owner, flat.square().sum(-1))
        return squares.sqrt()[self.owner][:, None]


def ascend(
    mask: PerturbationMask, start: Tensor, gradient: Callable[[Tensor], Tensor], steps: int, step_size: float,
    epsilon: float, norm: str, first: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Run projected gradient ascent (Madry et al., 2018): δ ← Π(δ + step_size · steepest(∇)), `steps` times.

    Args:
        mask: positions that may carry noise.
        start: initial noise [R, T, d].
        gradient: returns the gradient of the loss with respect to the noise.
        first: the gradient at `start`, if already computed.
    """
    noise = start
    for number in range(steps):
        current = first if number == 0 and first is not None else gradient(noise)
        noise = mask.project(noise + step_size * mask.steepest(current, norm), epsilon, norm)
    return noise

"""Noise on a batch's embeddings: where it may go, its norms by example, its random starts.

Noise is [R, T, d] fp32. What belongs to an example is found by `Batch.example_of_token`, so that it is the same inside
a packed row, in a padded row, and alone; nothing here loops over tokens or reads the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from budwood import Batch, Run


class PerturbationMask:
    """Where noise may go in a batch.

    Attributes:
        open: [R·T, 1] fp32, 1 where noise may go and 0 on padding and on what is left alone.
        owner: [R·T] int64, the example of each position; padding has one of its own behind them.
        counts: [examples + 1] fp32, positions of each example where noise may go.
    """

    def __init__(self, run: Run, batch: Batch, skip_special: bool = False, skip_masked: bool = False) -> None:
        self.batch = batch
        examples = len(batch.keys)
        owner = run.task.noise_owner(batch)
        where = owner >= 0
        special = run.task.special_positions(run, batch) if skip_special else None
        if special is not None:
            where = where & ~special
        labelled = run.task.labelled_positions(batch) if skip_masked else None
        if labelled is not None:
            where = where & labelled
        self.owner = torch.where(owner >= 0, owner, examples)
        self.open = where.float()[:, None]
        self.counts = torch.zeros(examples + 1, device=owner.device).index_add_(0, self.owner, where.float())

    def unit(self, gradient: Tensor, norm: str) -> Tensor:
        """The gradient where noise may go, each example's divided by its own norm ("l2" or "linf"); zeros stay."""
        flat = gradient.flatten(0, 1) * self.open
        scaled = flat / self._peak(flat).clamp(min=torch.finfo(flat.dtype).tiny)  # whose squares do not underflow
        if norm == "l2":
            scaled = scaled / self._length(scaled).clamp(min=1.0)
        return scaled.view_as(gradient)

    def steepest(self, gradient: Tensor, norm: str) -> Tensor:
        """The noise of norm 1 along which the loss rises most: the unit gradient for l2, its signs for linf."""
        if norm == "l2":
            return self.unit(gradient, norm)
        return (gradient.flatten(0, 1).sign() * self.open).view_as(gradient)

    def project(self, noise: Tensor, epsilon: float, norm: str) -> Tensor:
        """The nearest noise whose norm is at most epsilon in every example."""
        if norm == "linf":
            return noise.clamp(-epsilon, epsilon)
        flat = noise.flatten(0, 1)
        factor = epsilon / self._length(flat).clamp(min=epsilon)
        return (flat * factor).view_as(noise)

    def per_root(self, noise: Tensor) -> Tensor:
        """Noise divided by sqrt(N) of its example, N the elements that may carry noise."""
        elements = (self.counts * noise.shape[-1]).clamp(min=1.0).sqrt()
        return (noise.flatten(0, 1) / elements[self.owner][:, None]).view_as(noise)

    def draw(self, like: Tensor, example: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Noise [R, T, d] like `like`, put together on the CPU from `example(index, [tokens, d])`, and moved once."""
        width = like.shape[-1]
        parts = [example(i, torch.empty(n, width)) for i, n in enumerate(self.batch.lengths)]
        if self.batch.segments:
            whole = torch.cat(parts)[None]
        else:
            whole = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        return (whole.to(like.device).flatten(0, 1) * self.open).view_as(like)

    def _peak(self, flat: Tensor) -> Tensor:
        """[R·T, 1]: the largest absolute element of each position's example."""
        peaks = torch.zeros(len(self.counts), device=flat.device)
        peaks.scatter_reduce_(0, self.owner, flat.abs().amax(-1), "amax")
        return peaks[self.owner][:, None]

    def _length(self, flat: Tensor) -> Tensor:
        """[R·T, 1]: the Euclidean norm of each position's example."""
        squares = torch.zeros(len(self.counts), device=flat.device)
        squares.index_add_(0, self.owner, flat.square().sum(-1))
        return squares.sqrt()[self.owner][:, None]


def ascend(
    places: PerturbationMask, start: Tensor, gradient: Callable[[Tensor], Tensor], steps: int, step_size: float,
    epsilon: float, norm: str, first: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Projected gradient ascent (Madry et al., 2018): δ ← Π(δ + step_size · steepest(∇)), `steps` times.

    Args:
        places: where noise may go.
        start: [R, T, d], zeros for a start at the clean embeddings.
        gradient: of the loss with respect to the noise.
        first: the gradient at the start, where it is known.
    """
    noise = start
    for number in range(steps):
        found = first if number == 0 and first is not None else gradient(noise)
        noise = places.project(noise + step_size * places.steepest(found, norm), epsilon, norm)
    return noise

"""The update of a frozen linear, or of the experts of a mixture, by one adapter; methods subclass it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from budwood.model.ops.experts import Routing, expert_linear
from budwood.model.ops.linear import frozen_linear, low_rank_linear
from budwood.model.quantizers.experts import ExpertLinear


class LowRankUpdate:
    """The update of one frozen linear by one adapter. A method subclasses it and implements `weights`.

    Attributes:
        layer: PEFT's layer, which holds the adapter's parameters for this linear.
        name: name of the adapter.
        start: A₀ [r, in] and B₀ [out, r], if the update counts from there; `weights` then return `starts.difference`.
    """

    start: tuple[Tensor, Tensor] | None = None
    mixes = True
    """Whether `weights` describe the update completely, so that rows of several adapters share one product. If not,
    `forward` runs on separate slices of the batch."""

    def __init__(self, layer: Any, name: str) -> None:
        self.layer, self.name = layer, name

    def weights(self) -> tuple[Tensor, Tensor, float] | None:
        """Return A [r, in], B [out, r] and the scale s of the update s B A; None if there is no update."""
        raise NotImplementedError

    def sources(self) -> tuple[Tensor, ...]:
        """Return the tensors from which `weights` are computed; a change invalidates the cache. (): no caching."""
        return ()

    def forward(self, x: Tensor, base: nn.Linear) -> Tensor:
        """Return the output [..., out] of `base` with this update, for x [..., in]."""
        weights = self.weights()
        if weights is None:
            return frozen_linear(x, base)
        return low_rank_linear(x, base, *weights, self.probability)

    def expert_forward(self, x: Tensor, base: ExpertLinear, routing: Routing) -> Tensor:
        """Return the output [S, out] of experts with this update, for rows x [S, in] sorted by expert.

        `weights` are then A [E, r, in] and B [E, out, r].
        """
        weights = self.weights()
        if weights is None:
            return expert_linear(x, base, routing)
        y = expert_linear(x, base, routing, *weights, self.probability)
        gains = self.gains(base, *weights)
        return y if gains is None else (y * gains.index_select(0, routing.ids)).to(y.dtype)

    def gains(self, base: ExpertLinear, a: Tensor, b: Tensor, scaling: float) -> Tensor | None:
        """Return factors [E, out] of the outputs of experts with the update, or None."""
        return None

    @property
    def probability(self) -> float:
        """Probability of dropping an element of the update's input; 0 outside of training."""
        dropout = self.layer.lora_dropout[self.name]
        return dropout.p if isinstance(dropout, nn.Dropout) and self.layer.training else 0.0

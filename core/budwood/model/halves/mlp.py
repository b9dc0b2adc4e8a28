"""The half of a layer with a gated MLP: x + [norm] down(activation(gate) · up), gate and up of norm(x)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from budwood.model.halves import norms
from budwood.model.halves.half import Call, Half
from budwood.model.halves.kept import Kept
from budwood.model.ops.gated import gated_backward, gated_forward
from budwood.model.ops.group import Factors
from budwood.model.ops.kernels import implementation


@dataclass(frozen=True)
class MlpHalf(Half):
    """One pass of the half; its inputs are gate and up, which may be one linear, and its output is down.

    Attributes:
        kind: of the activation, see `budwood.model.ops.gated`.
    """

    kind: str

    def forward(
        self, x: Tensor, tensors: Sequence[Tensor | None], both: Sequence[Factors], call: Call, kept: Kept | None,
        weights: list[list[Tensor]] | None = None, ends: bool = False,
        links: norms.Links = (None, None),
    ) -> Tensor:  # fmt: skip
        """Return the half's output [n, d] for x [n, d]; the arguments are those of `AttentionHalf.forward`."""
        first, second = weights or (None, None)
        given, more = tensors[: self.inputs.tensors], tensors[self.inputs.tensors :]
        factors, outer = both
        normed = norms.forward(self.norm, "norm", x, kept, call.autocast, links[0]).to(self.inputs.dtype)
        projected, made = self.inputs.forward(normed, given, factors, first)
        if kept is not None:
            kept.put("normed", normed)
            kept.put_made("inputs", made)
            kept.put_list("projected", projected)
        gate, up = _pair(projected)
        if ends and self.after is None and not any(self.output.drops) and implementation("gated", gate) is not None:
            return x  # the backward's kernel writes the product too
        product = gated_forward(gate, up, self.kind)
        if ends and self.after is None:
            made, y = self.output.thin(product, outer), x
        else:
            (y,), made = self.output.forward(product, more, outer, second)
        if kept is not None:
            kept.put_made("output", made)
            if implementation("gated", gate) is None or made.masks:
                kept.put("product", product)
        if self.after is not None:
            if kept is not None:
                kept.put("before", y)
            y = norms.forward(self.after, "after", y, kept, call.autocast)
        return x if ends else norms.added(x, y, self.after is None, links[1])

    def begin(self, gradient: Tensor, both: Sequence[Factors]) -> list[Any]:
        """Return s g B and the gradient of the product activation(gate) · up, before anything is computed again.

        So the weights of both groups are never there at once. []: a norm or a mask comes first.
        """
        if self.after is not None or any(self.output.drops):
            return []
        inside, outer = gradient.to(self.output.dtype), both[1]
        thin = self.output.thin_gradient([inside], outer)
        return [thin, self.output.input_gradient([inside], thin, outer, [])]

    def backward(
        self, gradient: Tensor, x: Tensor, tensors: Sequence[Tensor | None], both: Sequence[Factors], kept: Kept,
        wants: Sequence[bool], wants_x: bool, last: bool, weights: list[list[Tensor]] | None = None,
        begun: list[Any] | None = None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
        """Return the gradients of x and of the tensors; the arguments are those of `AttentionHalf.backward`.

        Args:
            begun: from `begin`; it is emptied.
        """
        first, second = weights or (None, None)
        count = self.inputs.tensors
        names = len(self.inputs.bases)
        factors, outer = both
        inside = gradient
        if self.after is not None:
            inside = norms.backward(self.after, "after", gradient, kept.tensors["before"], kept, last)
        inside = inside.to(self.output.dtype)
        made, product = kept.get_made("output"), kept.get("product")
        if not begun:
            thin = self.output.thin_gradient([inside], outer)
            through = self.output.input_gradient([inside], thin, outer, made.masks, second)
        else:
            thin, through = begun
            begun.clear()
        projected = [t for t in kept.get_list("projected", names) if t is not None]
        again = product is None and any(wants[count:])
        back, repeated = gated_backward(through.contiguous(), projected, self.kind, again, last)
        del projected
        product = repeated if product is None else product
        del through
        if product is not None and made.narrow is None and any(wants[count:]):
            made = self.output.thin(product, outer)
        found = self.output.factor_gradients([inside], thin, product, made, tensors[count:], wants[count:])
        del product, repeated, inside
        made, normed = kept.get_made("inputs"), kept.tensors["normed"]
        thin = self.inputs.thin_gradient(back, factors)
        earlier = self.inputs.factor_gradients(back, thin, normed, made, tensors[:count], wants[:count])
        if not wants_x:
            return None, [*earlier, *found]
        grad_x = self.inputs.input_gradient(back, thin, factors, made.masks, first).to(x.dtype)
        return norms.backward(self.norm, "norm", grad_x, x, kept, last, gradient), [*earlier, *found]


def _pair(projected: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return gate and up, which may be the halves of one tensor."""
    if len(projected) == 2:
        return projected[0], projected[1]
    gate, up = projected[0].chunk(2, -1)
    return gate, up

"""The half of a layer with attention: x + [norm] o(attention(q, k, v of norm(x)))."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from budwood.model.halves import norms
from budwood.model.halves.half import Call, Half
from budwood.model.halves.kept import Kept
from budwood.model.ops import tiles
from budwood.model.ops.group import Factors


class UnexpectedError(Exception):
    """A module does not compute what its half does."""


@dataclass(frozen=True)
class AttentionHalf(Half):
    """One pass of the half; what happens between the projections is the model's own code.

    Attributes:
        attention: the model's module.
        names: of its projections of the input, in the order of `inputs`.
    """

    attention: nn.Module
    names: tuple[str, ...]

    def forward(
        self, x: Tensor, tensors: Sequence[Tensor | None], both: Sequence[Factors], call: Call, kept: Kept | None,
        weights: list[list[Tensor]] | None = None, ends: bool = False,
        links: norms.Links = (None, None),
    ) -> Tensor:  # fmt: skip
        """Return the half's output [n, d] for x [n, d], or [L, d] at `call.rows`.

        Args:
            both: the factors of both groups.
            kept: keeps what the backward pass needs; None: there is no backward.
            ends: the output is not needed; x is returned instead.
            links: the norm of x, if it was computed before, and the norm that follows this half.
        """
        first, second = weights or (None, None)
        given, more = tensors[: self.inputs.tensors], tensors[self.inputs.tensors :]
        factors, outer = both
        normed = norms.forward(self.norm, "norm", x, kept, call.autocast, links[0]).to(self.inputs.dtype)
        projected, made = self.inputs.forward(normed, given, factors, first)
        result = self._between(projected, x, call, kept)
        flat = _picked(result.detach().reshape(len(x), -1), call.rows).to(self.output.dtype)
        if kept is not None:
            kept.put("normed", normed)
            kept.put_made("inputs", made)
            kept.put("between", result)
            kept.put("rows", call.rows)
        del projected, normed
        x = _picked(x, call.rows)
        if ends and self.after is None:
            made, y = self.output.thin(flat, outer), x
        else:
            (y,), made = self.output.forward(flat, more, outer, second)
            if self.after is not None:
                if kept is not None:
                    kept.put("before", y)
                y = norms.forward(self.after, "after", y, kept, call.autocast)
            y = norms.added(x, y, self.after is None, links[1])
        if kept is not None:
            kept.put_made("output", made)
        return y

    def _between(self, projected: list[Tensor], x: Tensor, call: Call, kept: Kept | None) -> Tensor:
        """Return what the model computes between its projections; with `kept`, it has a graph."""
        if kept is not None:
            projected = kept.enter("between", projected)
        with torch.set_grad_enabled(kept is not None), call.autocast():
            if len(projected) < len(self.names):
                copies = len(x) > tiles.ROWS and not hasattr(self.attention, "q_norm")
                projected = list(_Split.apply(projected[0], self.inputs.sizes, copies))
            parts = [part.view(*call.shape[:-1], -1) for part in projected]
            stand = _Stand(self.attention, x.view(call.shape), dict(zip(self.names, parts, strict=True)))
            return stand.run(call.options)

    def backward(
        self, gradient: Tensor, x: Tensor, tensors: Sequence[Tensor | None], both: Sequence[Factors], kept: Kept,
        wants: Sequence[bool], wants_x: bool, last: bool, weights: list[list[Tensor]] | None = None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
        """Return the gradients of x [n, d], if it is wanted, and of the tensors, of those that want one.

        Args:
            gradient: of the output [n, d], or [L, d].
            last: what was kept is not needed again.
        """
        first, second = weights or (None, None)
        count = self.inputs.tensors
        factors, outer = both
        inside = gradient
        if self.after is not None:
            before = kept.tensors["before"]
            inside = norms.backward(self.after, "after", gradient, before, kept, last)
        inside = inside.to(self.output.dtype)
        result, rows = kept.tensors["between"], kept.get("rows")
        flat = _picked(result.detach().reshape(len(x), -1), rows).to(self.output.dtype)
        made = kept.get_made("output")
        thin = self.output.thin_gradient([inside], outer)
        found = self.output.factor_gradients([inside], thin, flat, made, tensors[count:], wants[count:])
        if not wants_x and not any(wants[:count]):
            return None, [*(None for _ in range(count)), *found]
        through = self.output.input_gradient([inside], thin, outer, made.masks, second)
        del flat, thin, inside
        through, gradient = _spread(through, rows, len(x)), _spread(gradient, rows, len(x))
        back = kept.through("between", through.view(result.shape).to(result.dtype), last)
        del through, result
        kept.tensors.pop("between")
        back = [part.reshape(len(x), -1).to(self.inputs.dtype) for part in back]
        made, normed = kept.get_made("inputs"), kept.tensors.pop("normed")
        thin = self.inputs.thin_gradient(back, factors)
        earlier = self.inputs.factor_gradients(back, thin, normed, made, tensors[:count], wants[:count])
        if not wants_x:
            return None, [*earlier, *found]
        del normed
        grad_x = self.inputs.input_gradient(back, thin, factors, made.masks, first).to(x.dtype)
        del back, thin
        return norms.backward(self.norm, "norm", grad_x, x, kept, last, gradient), [*earlier, *found]


def _picked(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _spread(gradient: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """Return the gradient of `count` rows, from that of the ones picked."""
    return gradient if rows is None else gradient.new_zeros(count, gradient.shape[1]).index_add_(0, rows, gradient)


class _Split(torch.autograd.Function):
    """Splits [n, sum of sizes] by columns; the gradient is one tensor again.

    With `copies`, the last part, the values, is a copy if it is the smaller one: rotated queries and keys are new
    tensors, so nothing else keeps the whole. A norm of the queries would; and few rows are not worth an operation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], copies: bool) -> tuple[Tensor, ...]:
        *parts, last = (part.detach() for part in x.split(sizes, -1))
        return *parts, last.clone() if copies and 2 * sizes[-1] <= sum(sizes) else last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return torch.cat([gradient.reshape(len(gradient), -1) for gradient in gradients], -1), None, None


class _Stand:
    """Stands in for an attention module whose projections of the input are known.

    Its class's forward finds the module's other attributes, and its last projection gives back what it is called with.
    """

    def __init__(self, module: nn.Module, hidden: Tensor, projected: dict[str, Tensor]) -> None:
        self._module, self._hidden, self._projected = module, hidden, projected
        self._open, self._result = set(projected), None

    def __getattr__(self, name: str) -> Any:
        if name in self._projected:
            return lambda x: self._take(name, x)
        return self._end if name == "o_proj" else getattr(self._module, name)

    def _take(self, name: str, x: Tensor) -> Tensor:
        if x is not self._hidden or name not in self._open:
            raise UnexpectedError(f"{type(self._module).__name__} projects something else than its input")
        self._open.remove(name)
        return self._projected[name]

    def _end(self, x: Tensor) -> Tensor:
        self._result = x  # type: ignore[assignment]
        return x

    def run(self, options: dict[str, Any]) -> Tensor:
        """Return what the module gives its last projection."""
        found = type(self._module).forward(self, self._hidden, **options)
        first = found[0] if isinstance(found, tuple) else found
        if self._open or self._result is None or first is not self._result:
            raise UnexpectedError(f"{type(self._module).__name__} does not end with its projection")
        return first

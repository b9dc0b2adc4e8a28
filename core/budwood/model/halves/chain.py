"""The autograd function of one half, or of both halves of a layer, which keep their activations or recompute them.

Recomputed, nothing but the layer's input is kept. The backward pass dequantises each 4-bit weight once, for the
recomputation and the gradient, and computes everything again but the last product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from budwood.model.halves.attention import AttentionHalf
from budwood.model.halves.half import Call
from budwood.model.halves.kept import Kept
from budwood.model.halves.mlp import MlpHalf
from budwood.model.halves.norms import Ahead, Links
from budwood.model.ops import tiles
from budwood.model.ops.group import Factors, Layout, pack
from budwood.model.random_state import Draws

Half = AttentionHalf | MlpHalf


@dataclass
class Chain:
    """Halves one after the other, in one pass.

    Attributes:
        factors: of both groups of each half.
        recomputes: keep the input alone, or, without gradients, nothing.
        before, onward: the norm of the input, if it was computed before, and that with which the next layer begins.
    """

    halves: Sequence[Half]
    factors: list[Factors]
    call: Call
    recomputes: bool
    before: Ahead | None = None
    onward: Ahead | None = None

    def __call__(self, x: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return the output for x [rows, tokens, d]; [1, L, d] at `call.rows`.

        Args:
            tensors: those of all halves' groups, which may need gradients.
        """
        if torch.is_grad_enabled():
            result: Tensor = _Chain.apply(x, self, *tensors)
        else:
            with torch.autocast(x.device.type, enabled=False):
                flat, parts = x.reshape(-1, x.shape[-1]), self.split(tensors)
                result = _shaped(_compute(self, flat, parts, self.pairs(self.factors)), self.call)
        self.factors = []  # the function has saved them
        return result

    def pairs(self, factors: Sequence[Factors]) -> list[Sequence[Factors]]:
        """Return the factors of each half."""
        return [factors[i : i + 2] for i in range(0, len(factors), 2)]

    def groups(self, tensors: Sequence[Tensor | None]) -> list[tuple[Layout, Sequence[Tensor | None]]]:
        """Return the layout and the tensors of both groups of each half."""
        found: list[tuple[Layout, Sequence[Tensor | None]]] = []
        for half, part in zip(self.halves, self.split(tensors), strict=True):
            count = half.inputs.tensors
            found += [(half.inputs.layout, part[:count]), (half.output.layout, part[count:])]
        return found

    def split(self, values: Sequence[Any]) -> list[list[Any]]:
        """Return what belongs to each half."""
        parts, start = [], 0
        for half in self.halves:
            parts.append(list(values[start : start + half.tensors]))
            start += half.tensors
        return parts

    def pieces(self, half: Half, x: Tensor) -> list[Tensor]:
        """Return the rows that a half computes at once: all, but an MLP that is recomputed takes long rows in tiles."""
        long = self.recomputes and isinstance(half, MlpHalf) and len(x) > tiles.FROM
        return list(x.split(tiles.ROWS)) if long else [x]

    def links(self, x: Tensor, again: bool = False) -> list[Links]:
        """Return the norms that each half is given, and that it computes with its sum.

        An MLP in tiles has none: it does not compute all rows at once.

        Args:
            x: the input [n, d] of the first half.
            again: in a recomputation, which ends with this layer.
        """
        rows = len(x if self.call.rows is None else self.call.rows)
        first, last = (None, None) if again else (self.before, self.onward)
        if first is not None and first.found is not None:
            first.found = (x, *first.found[1:])
        if len(self.halves) < 2:
            return [(first, None)]
        if self.recomputes and rows > tiles.FROM:
            return [(first, None), (None, None)]
        between = Ahead(self.halves[1].norm)
        return [(first, between), (between, last)]


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: Chain, *tensors: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        kept: list[Kept] = []
        ctx.chain, both = chain, chain.pairs(chain.factors)
        ctx.lengths = [len(each) for each in chain.factors]
        factors = [tensor for each in chain.factors for tensor in each]
        with torch.autocast(x.device.type, enabled=False):
            if chain.recomputes:
                ctx.draws = Draws(x.device)
                with ctx.draws.first:
                    y = _compute(chain, flat, chain.split(tensors), both)
                ctx.save_for_backward(x, *tensors)
                return _shaped(y, chain.call)
            y, given = flat, zip(chain.halves, chain.split(tensors), both, chain.links(flat), strict=True)
            for half, part, pair, links in given:
                kept.append(Kept())
                kept[-1].put("x", y)
                y = half.forward(y, part, pair, chain.call, kept[-1], links=links)
        dense = _dense(chain) if ctx.needs_input_grad[0] else []
        ctx.places = [list(one.tensors) for one in kept]
        ctx.edges = [one.edges for one in kept]
        saved = [tensor for one in kept for tensor in one.tensors.values()]
        ctx.save_for_backward(*factors, *tensors, *saved, *dense)
        return _shaped(y, chain.call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        chain, wants_x, wants = ctx.chain, ctx.needs_input_grad[0], chain_wants(ctx)
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        with torch.autocast(gradient.device.type, enabled=False):
            if chain.recomputes:
                x, *tensors = ctx.saved_tensors
                both = chain.pairs(pack(chain.groups(tensors)))
                with ctx.draws.again:
                    grad_x, found = _recompute(chain, x, tensors, both, gradient, wants, wants_x)
            else:
                saved = iter(ctx.saved_tensors)
                both = chain.pairs([[next(saved) for _ in range(length)] for length in ctx.lengths])
                grad_x, found = _continue(ctx, chain, list(saved), both, gradient, wants, wants_x)
        return (None if grad_x is None else grad_x.view(chain.call.shape), None, *found)


def _shaped(y: Tensor, call: Call) -> Tensor:
    return y.view(call.shape) if call.rows is None else y[None]


def chain_wants(ctx: Any) -> list[list[bool]]:
    """Return which tensors of each half want a gradient."""
    parts: list[list[bool]] = ctx.chain.split(ctx.needs_input_grad[2:])
    return parts


def _compute(
    chain: Chain, x: Tensor, tensors: Sequence[Sequence[Tensor | None]], both: Sequence[Sequence[Factors]]
) -> Tensor:
    """Return the output [n, d] without keeping anything."""
    for half, part, pair, links in zip(chain.halves, tensors, both, chain.links(x), strict=True):
        pieces = chain.pieces(half, x)
        if len(pieces) == 1:
            x = half.forward(x, part, pair, chain.call, None, links=links)
            continue
        weights, y, start = half.weights(), torch.empty_like(x), 0
        for piece in pieces:
            y[start : start + len(piece)] = half.forward(piece, part, pair, chain.call, None, weights)
            start += len(piece)
        x = y
    return x


def _recompute(
    chain: Chain, x: Tensor, tensors: Sequence[Tensor | None], both: Sequence[Sequence[Factors]], gradient: Tensor,
    wants: Sequence[Sequence[bool]], wants_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Return the gradients of x and of the tensors, from the input alone."""
    parts = chain.split(tensors)
    x = x.detach().reshape(-1, x.shape[-1])
    kept, inputs, weights = [], [x], []
    *earlier, final = chain.links(x, True)
    for half, part, pair, links in zip(chain.halves[:-1], parts, both, earlier, strict=False):
        kept.append(Kept())
        weights.append(half.weights())
        inputs.append(half.forward(inputs[-1], part, pair, chain.call, kept[-1], weights[-1], links=links))
    last, part, needed = chain.halves[-1], parts[-1], wants_x or any(any(each) for each in wants[:-1])
    found: list[Tensor | None] = [None] * last.tensors
    pieces, start, grads = chain.pieces(last, inputs[-1]), 0, []
    begun = last.begin(gradient, both[-1]) if isinstance(last, MlpHalf) and len(pieces) == 1 else []
    dense = [last.inputs.weights(), []] if begun else last.weights()
    extra: dict[str, Any] = {"begun": begun} if begun else {}
    for piece in pieces:
        above = gradient[start : start + len(piece)]
        start += len(piece)
        store = Kept()
        last.forward(piece, part, both[-1], chain.call, store, dense, True, final)
        grad, each = last.backward(above, piece, part, both[-1], store, wants[-1], needed, True, dense, **extra)
        found = [_sum(total, new) for total, new in zip(found, each, strict=True)]
        if grad is not None:
            grads.append(grad)
        del store, grad, each
    del dense, pieces, piece, above, inputs[len(kept) :]
    below: Tensor | None = (grads[0] if len(grads) == 1 else torch.cat(grads)) if grads else None
    del grads
    for i in reversed(range(len(kept))):
        if below is None:
            return None, [*(None for part in parts[: i + 1] for _ in part), *found]
        half, own = chain.halves[i], kept.pop()
        needed = wants_x or any(any(each) for each in wants[:i])
        below, each = half.backward(
            below, inputs.pop(), parts[i], both[i], own, wants[i], needed, True, weights.pop()
        )  # fmt: skip
        found = [*each, *found]
    return below, found


def _continue(
    ctx: Any, chain: Chain, tensors: Sequence[Tensor | None], both: Sequence[Sequence[Factors]], gradient: Tensor,
    wants: Sequence[Sequence[bool]], wants_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Return the gradients of x and of the tensors, from what the forward pass kept."""
    count = sum(half.tensors for half in chain.halves)
    tensors, saved = tensors[:count], (tensor for tensor in tensors[count:] if tensor is not None)
    kept = [
        Kept({name: next(saved) for name in names}, edges) for names, edges in zip(ctx.places, ctx.edges, strict=True)
    ]
    found: list[Tensor | None] = []
    below: Tensor | None = gradient
    parts = chain.split(tensors)
    for i in reversed(range(len(kept))):
        if below is None:
            found = [*(None for _ in parts[i]), *found]
            continue
        needed = wants_x or any(any(each) for each in wants[:i])
        x = kept[i].tensors["x"]
        below, each = chain.halves[i].backward(below, x, parts[i], both[i], kept[i], wants[i], needed, False)
        found = [*each, *found]
    return below, found


def _dense(chain: Chain) -> list[Tensor]:
    """Return weights that are not packed: saved, torch detects changes of them before the backward pass."""
    weights = []
    for half in chain.halves:
        for group in (half.inputs, half.output):
            for quantizer, base in zip(group.quantizers, group.bases, strict=True):
                weight = quantizer.weight(base)
                weights += [weight] if weight.is_floating_point() else []
    return weights


def _sum(total: Tensor | None, new: Tensor | None) -> Tensor | None:
    if total is None or new is None:
        return new if total is None else total
    return total.add_(new)

"""Products of routed tokens with their experts' weights, plus low-rank updates per expert, as one autograd function.

Rows are sorted by expert, and there is no capacity: every token reaches the experts that its router chose, so a token's
output depends on no other token. Quantised weights are dequantised a few experts at a time, in the forward and again in
the backward, so that no complete weight in 16 bit exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from budwood.model.device import capability, device_type
from budwood.model.ops.dropout import drop, drop_again, drop_factor
from budwood.model.quantizers.experts import ExpertLinear

GROUP_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Dequantised weights that exist at once: as much as a processor's cache, or enough work for a GPU."""


@dataclass(frozen=True, eq=False)
class Routing:
    """The chosen experts of the tokens of a batch; rows stand for pairs of token and expert, sorted by expert.

    Attributes:
        counts: number of rows of each expert.
        ids: [S] int64, expert of each row.
        tokens: [S] int64, token of each row.
        order: [S] int64, position of each row in the flattened choices [n · k].
        inverse: [S] int64, row of each position.
        shape: n tokens and k choices of each.
        offsets: [E] int32, end of each expert's rows.
    """

    counts: list[int]
    ids: Tensor
    tokens: Tensor
    order: Tensor
    inverse: Tensor
    shape: tuple[int, int]
    offsets: Tensor

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> Routing:
        """Return the routing of tokens whose routers chose the experts `chosen` [n, k].

        In a plan on fake tensors, every expert gets the same number of rows.
        """
        flat = chosen.reshape(-1)
        ids, order = torch.sort(flat, stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        n, k = chosen.shape
        if isinstance(chosen, FakeTensor):
            share, rest = divmod(n * k, experts)
            counts = [share + (expert < rest) for expert in range(experts)]
            offsets = torch.empty(experts, dtype=torch.int32, device=ids.device)
        else:
            found = torch.bincount(ids, minlength=experts)
            counts, offsets = found.tolist(), found.cumsum(0, dtype=torch.int32)
        return cls(counts, ids, order // k, order, inverse, (n, k), offsets)

    def part(self, rows: Tensor) -> Routing:
        """Return the routing of some of the rows [m] int64, in ascending order."""
        ids = self.ids.index_select(0, rows)
        found = torch.bincount(ids, minlength=len(self.counts))
        tokens, order = self.tokens.index_select(0, rows), self.order.index_select(0, rows)
        return Routing(found.tolist(), ids, tokens, order, order, self.shape, found.cumsum(0, dtype=torch.int32))


class Dispatch(torch.autograd.Function):
    """Copies each token [n, d] to its rows [S, d]; the backward adds them up in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return x.index_select(0, routing.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        routing = ctx.routing
        return gradients[0].index_select(0, routing.inverse).view(*routing.shape, -1).sum(1), None


def dispatch(x: Tensor, routing: Routing) -> Tensor:
    """Return the rows [S, d] of tokens x [n, d], sorted by expert."""
    rows: Tensor = Dispatch.apply(x, routing)
    return rows


def combine(rows: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """Return the sum [n, d] of each token's rows [S, d], weighted by its router's weights [n, k]."""
    return (rows.index_select(0, routing.inverse).view(*routing.shape, -1) * weights[:, :, None]).sum(1)


def expert_linear(
    x: Tensor,
    base: ExpertLinear,
    routing: Routing,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """Return x W_eᵀ + scaling · drop(x) A_eᵀ B_eᵀ for the expert e of each row, in the compute dtype.

    Args:
        x: [S, in], rows sorted by expert.
        a: [E, r, in], any floating dtype, which its gradient has too; None: no update.
        b: [E, out, r], likewise.
        scaling, dropout: as in `low_rank_linear`.

    Returns:
        [S, out] in the dtype of autocast if enabled, or of `x`.
    """
    if any(parameter.requires_grad for parameter in base.parameters(recurse=False)):
        return _trained(x, base, routing, a, b, scaling, dropout)
    y: Tensor = GroupedLinear.apply(x, base, routing, a, b, scaling, dropout)
    return y


def low_rank_of_experts(x: Tensor, a: Tensor, b: Tensor, routing: Routing) -> Tensor:
    """Return x A_eᵀ B_eᵀ [S, out] without a graph, for a [E, r, in] and b [E, out, r]."""
    with torch.no_grad():
        narrow = grouped(x, a.to(x.dtype).transpose(1, 2), routing)
        return grouped(narrow, b.to(x.dtype).contiguous().transpose(1, 2), routing)


def _trained(
    x: Tensor, base: ExpertLinear, routing: Routing, a: Tensor | None, b: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """Compute the same with operations of torch, since the experts' weights train too."""
    if a is not None:
        raise ValueError("expert_linear: experts whose weights train have no low-rank updates")
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    parts = torch.split(x.to(dtype), routing.counts)
    weights = base.dequantize(0, base.experts, dtype)
    return torch.cat([part @ weight.t() for part, weight in zip(parts, weights, strict=True)])


class GroupedLinear(torch.autograd.Function):
    """The function behind `expert_linear`; apply(x, base, routing, a, b, scaling, dropout)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: ExpertLinear,
        routing: Routing,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        if base.stored[0].device != x.device:
            raise ValueError(f"expert_linear: the input is on {x.device}, the experts on {base.stored[0].device}")
        dtypes = [None if tensor is None else tensor.dtype for tensor in (x, a, b)]
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            rows = x.to(dtype)
            y = _base_product(rows, base, routing, backward=False)
            narrow, mask = None, None
            if a is not None and b is not None:
                inner = rows
                if dropout > 0.0:
                    inner, mask = drop(rows, dropout)
                    scaling *= drop_factor(rows, dropout)
                a, b = a.to(dtype).contiguous(), b.to(dtype).contiguous()
                narrow = grouped(inner, a.transpose(1, 2), routing)
                y.add_(grouped(narrow, b.transpose(1, 2), routing), alpha=scaling)
        keeps_rows = a is not None and ctx.needs_input_grad[3]
        ctx.save_for_backward(rows if keeps_rows else None, narrow, a, b, mask)
        ctx.base, ctx.routing, ctx.dtype, ctx.dtypes = base, routing, dtype, dtypes
        ctx.scaling, ctx.dropout = scaling, dropout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, narrow, a, b, mask = ctx.saved_tensors
        wants_x, _, _, wants_a, wants_b, *_ = ctx.needs_input_grad
        routing, grad_x, grad_a, grad_b = ctx.routing, None, None, None
        x_dtype, a_dtype, b_dtype = ctx.dtypes
        with torch.autocast(gradients[0].device.type, enabled=False):
            gradient = gradients[0].to(ctx.dtype).contiguous()
            grad_narrow = None
            if b is not None and (wants_x or wants_a):
                grad_narrow = grouped(gradient, b, routing).mul_(ctx.scaling)
            if wants_b:
                grad_b = grouped_outer(gradient, narrow, routing).mul_(ctx.scaling).to(b_dtype)
            if wants_a and grad_narrow is not None:
                inner = rows if mask is None else drop_again(rows, mask, ctx.dropout)
                grad_a = grouped_outer(grad_narrow, inner, routing).to(a_dtype)
            if wants_x:
                grad_x = _base_product(gradient, ctx.base, routing, backward=True)
                if grad_narrow is not None:
                    through = grouped(grad_narrow, a, routing)
                    through = through if mask is None else drop_again(through, mask, ctx.dropout)
                    grad_x.add_(through)
                grad_x = grad_x.to(x_dtype)
        return grad_x, None, None, grad_a, grad_b, None, None


def _base_product(rows: Tensor, base: ExpertLinear, routing: Routing, backward: bool) -> Tensor:
    """Return rows W_eᵀ, or rows W_e in the backward, from a few dequantised experts at a time."""
    parts = list(_parts(base, routing, rows))
    if len(parts) == 1 and base.experts > 1:
        weight = base.dequantize(0, base.experts, rows.dtype)
        return _grouped_mm(rows, weight if backward else weight.transpose(1, 2), routing.offsets)
    width = base.in_features if backward else base.out_features
    y = rows.new_empty(len(rows), width)
    first = 0
    for start, stop in parts:
        last = first + sum(routing.counts[start:stop])
        if last > first:
            weight = base.dequantize(start, stop, rows.dtype)
            part = rows[first:last]
            if stop - start == 1:
                torch.mm(part, weight[0] if backward else weight[0].t(), out=y[first:last])
            else:
                offsets = routing.offsets[start:stop] - first
                y[first:last] = _grouped_mm(part, weight if backward else weight.transpose(1, 2), offsets)
        first = last
    return y


def _parts(base: ExpertLinear, routing: Routing, rows: Tensor) -> Iterator[tuple[int, int]]:
    """Yield ranges of experts to compute at once: one by one if most have no rows."""
    experts, used = base.experts, sum(count > 0 for count in routing.counts)
    each = base.out_features * base.in_features * rows.element_size()
    step = max(1, GROUP_BYTES.get(device_type(rows), GROUP_BYTES["cuda"]) // each)
    if not base.quantized and base.stored[0].dtype == rows.dtype:
        step = experts  # nothing is copied
    if 2 * used <= experts or not _aligned(rows, base.out_features, base.in_features):
        step = 1
    if step > 1 and not base.quantized and not isinstance(rows, FakeTensor) and base.stored[0].data_ptr() % 16:
        step = 1  # a view of a mapped file
    for start in range(0, experts, step):
        yield start, min(start + step, experts)


def grouped(rows: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """Return rows [S, k] times the matrix [k, m] of their expert in weights [E, k, m]."""
    if _aligned(rows, *weights.shape[1:]):
        return _grouped_mm(rows, weights, routing.offsets)
    y = rows.new_empty(len(rows), weights.shape[2])
    first = 0
    for expert, count in enumerate(routing.counts):
        if count:
            torch.mm(rows[first : first + count], weights[expert], out=y[first : first + count])
        first += count
    return y


def grouped_outer(left: Tensor, right: Tensor, routing: Routing) -> Tensor:
    """Return leftᵀ right [E, k, m] over the rows of each expert, for left [S, k] and right [S, m]."""
    if _aligned(left, right.shape[1]):
        return _grouped_mm(left.t(), right, routing.offsets)
    products = left.new_zeros(len(routing.counts), left.shape[1], right.shape[1])
    first = 0
    for expert, count in enumerate(routing.counts):
        if count:
            torch.mm(left[first : first + count].t(), right[first : first + count], out=products[expert])
        first += count
    return products


def _grouped_mm(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    if isinstance(left, FakeTensor):
        return _even_product(left, right, len(offsets))
    y: Tensor = torch._grouped_mm(left, right, offs=offsets)
    return y


def _even_product(left: Tensor, right: Tensor, experts: int) -> Tensor:
    """Return a fake product of the right shape and cost, with as many rows for each expert."""
    if right.ndim == 3:  # [S, k] @ [E, k, m]
        share, width = len(left) // experts, right.shape[2]
        y = left.new_empty(len(left), width)
        even = experts * share
        torch.bmm(left[:even].view(experts, share, -1), right, out=y[:even].view(experts, share, width))
        return y
    share = len(right) // experts  # [k, S] @ [S, m]
    parts = [part[: experts * share].view(experts, share, -1) for part in (left.t(), right)]
    return torch.bmm(parts[0].transpose(1, 2), parts[1])


def _aligned(rows: Tensor, *sizes: int) -> bool:
    """Return whether torch's grouped product takes matrices of these sizes: rows of 16 bytes, and on a GPU bf16."""
    if device_type(rows) == "cuda":
        fits = rows.dtype == torch.bfloat16 and capability(rows) >= (8, 0)
    else:
        fits = rows.dtype in (torch.bfloat16, torch.float32)
    return fits and all(size * rows.element_size() % 16 == 0 for size in (*sizes, rows.shape[1]))

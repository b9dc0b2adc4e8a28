"""Frozen linears of one input with their low-rank updates: y_i = x W_iᵀ + bias_i + s_i · drop_i(x) A_iᵀ B_iᵀ.

`low_rank_linear` computes one linear, and reads x for each; here the factors A of a group, such as those of query, key
and value, are one matrix, and x is read once. Where kernels dequantise, the weights of a group are one matrix too, and
one batched product takes the B of neighbours of one shape. The functions have no graph: their callers are autograd
functions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from budwood.model.device import device_type
from budwood.model.ops.dropout import drop, drop_again, drop_factor
from budwood.model.ops.kernels import implementation
from budwood.model.ops.linear import thin_product
from budwood.model.quantizers import quantizer_of

ALIGNED = 64
"""Elements to a multiple of which factors begin in memory."""
MOST = 3
"""Weights that one kernel dequantises."""


@dataclass(frozen=True)
class Part:
    """A linear of a group, and its update in one pass.

    Attributes:
        base: a linear that has a quantiser.
        a: [r, in], any floating dtype; None: no update.
        b: [out, r], likewise.
        scaling: factor of the update.
        dropout: probability of dropping an element of the update's input.
        bias: [out] that stands for the linear's own; None: its own, or none.
    """

    base: Any
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    bias: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """A, B and the bias, of which each may have a gradient."""
        return self.a, self.b, getattr(self.base, "bias", None) if self.bias is None else self.bias


Factors = list[Tensor | None]
"""A of all parts [R, in] in the dtype of the products, and the B of each run, below each other [sum of out, r]."""


@dataclass(frozen=True)
class Layout:
    """How the factors of a group lie.

    Attributes:
        runs: numbers of neighbours whose B are one matrix.
        ranks: of each part; 0 without an update.
    """

    dtype: torch.dtype
    runs: tuple[int, ...]
    ranks: tuple[int, ...]

    def members(self, tensors: Sequence[Tensor | None]) -> list[Sequence[Tensor | None]]:
        """Return all A, and the B of each run.

        Args:
            tensors: `Part.tensors` of all parts.
        """
        return [tensors[0::3], *(tensors[1::3][run] for run in _spans(self.runs))]

    def shapes(self, tensors: Sequence[Tensor | None]) -> list[tuple[int, ...] | None]:
        """Return the shapes of A and of each run's B; None where a tensor of the group, or nothing, is taken."""
        found: list[tuple[int, ...] | None] = []
        for members in self.members(tensors):
            given = [t for t in members if t is not None]
            alone = len(members) == 1 and all(t.dtype == self.dtype for t in given)
            found.append(None if alone or not given else (sum(len(t) for t in given), given[0].shape[1]))
        return found


def pack(groups: Sequence[tuple[Layout, Sequence[Tensor | None]]]) -> list[Factors]:
    """Return the factors of groups, from `Part.tensors` of all their parts; one operation copies all of them."""
    factors: list[Factors] = []
    wanted: list[tuple[int, int, tuple[int, ...]]] = []
    for number, (layout, tensors) in enumerate(groups):
        factors.append([members[0] for members in layout.members(tensors)])
        wanted += [(number, i, shape) for i, shape in enumerate(layout.shapes(tensors)) if shape is not None]
    if not wanted:
        return factors
    ends = list(itertools.accumulate((-(-math.prod(shape) // ALIGNED) * ALIGNED for *_, shape in wanted), initial=0))
    like = next(t for layout, tensors in groups for t in tensors[0::3] if t is not None)
    flat = torch.empty(ends[-1], dtype=groups[wanted[0][0]][0].dtype, device=like.device)
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for (number, i, shape), start in zip(wanted, ends, strict=False):
        place = flat[start : start + math.prod(shape)].view(shape)
        factors[number][i] = place
        layout, tensors = groups[number]
        given = [t for t in layout.members(tensors)[i] if t is not None]
        targets += place.split([len(t) for t in given])
        sources += given
    torch._foreach_copy_(targets, sources)  # one kernel on CUDA: each place is dense, as its source is
    return factors


def _spans(sizes: Sequence[int]) -> list[slice]:
    return [slice(*pair) for pair in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


@dataclass
class Made:
    """What the backward pass needs of a product: xAᵀ of all parts [n, R], and the masks of dropout."""

    narrow: Tensor | None = None
    masks: list[Tensor] = field(default_factory=list)


class Group:
    """The linears of one input in one pass.

    Attributes:
        stacked: the weights are one matrix [sum of out, in], and so are the outputs and their gradients.
        sizes: number of outputs of each linear.
        spans, rows: the columns of each linear in a thin product, and its outputs among all.
        runs: numbers of neighbours that one batched product takes: stacked, those of one size and rank.
        tensors: the number of the group's tensors with gradients: three for each part, see `Part.tensors`.
    """

    def __init__(self, parts: Sequence[Part], rows: Tensor, dtype: torch.dtype) -> None:
        """See the class; `rows` is on the device of the weights, and `dtype` is that of the products."""
        self.dtype = dtype
        self.bases = [part.base for part in parts]
        self.quantizers: list[Any] = [quantizer_of(base) for base in self.bases]
        self.sizes = [q.shape(base)[0] for q, base in zip(self.quantizers, self.bases, strict=True)]
        self.drops = [p.dropout if p.a is not None else 0.0 for p in parts]
        self.scales = [p.scaling * drop_factor(rows, p.dropout) for p in parts]
        self.ranks = [0 if part.a is None else len(part.a) for part in parts]
        self.spans, self.rows = _spans(self.ranks), _spans(self.sizes)
        updated = {scale for scale, rank in zip(self.scales, self.ranks, strict=True) if rank}
        kernel = implementation("dequantize_4bit", rows, dtype) if len(updated) <= 1 else None
        self.stacked = kernel is not None and self._stacks()
        self.scale = next(iter(updated), 1.0)
        alike = itertools.groupby(zip(self.sizes, self.ranks, strict=True))
        self.runs = [len(list(each)) for _, each in alike] if self.stacked else [1] * len(self.bases)
        self.tensors = 3 * len(self.bases)

    def _stacks(self) -> bool:
        """Whether one kernel dequantises the weights of all linears."""
        alike = {type(quantizer) for quantizer in self.quantizers}
        taken = all(q.stacks(base) for q, base in zip(self.quantizers, self.bases, strict=True))
        return taken and len(alike) == 1 and len(self.bases) <= MOST

    @property
    def layout(self) -> Layout:
        """How the group's factors lie."""
        return Layout(self.dtype, tuple(self.runs), tuple(self.ranks))

    def weights(self) -> list[Tensor]:
        """Return each W [out, in] in the dtype of the products; stacked, one of all of them."""
        if self.stacked:
            return [self.quantizers[0].stack(self.bases, self.dtype)]
        return [q.dequantized(base, self.dtype) for q, base in zip(self.quantizers, self.bases, strict=True)]

    def forward(
        self, x: Tensor, tensors: Sequence[Tensor | None], factors: Sequence[Tensor | None],
        weights: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], Made]:  # fmt: skip
        """Return the outputs [n, out] of all linears, of which stacked ones are one, for x [n, in].

        Args:
            weights: from `weights`; None: dequantised here.
        """
        made = self.thin(x, factors)
        if not self.stacked:
            return [
                self._product(i, x, made.narrow, factors[1 + i], bias, weights) for i, bias in enumerate(tensors[2::3])
            ], made
        (weight,) = weights or self.weights()
        biases = [None if bias is None else bias.to(self.dtype) for bias in tensors[2::3]]
        start = None
        if any(bias is not None for bias in biases):
            start = torch.cat([x.new_zeros(n) if b is None else b for n, b in zip(self.sizes, biases, strict=True)])
        if made.narrow is None:
            return [x @ weight.t() if start is None else torch.addmm(start, x, weight.t())], made
        # The thin products come first: the other one adds to them where it writes.
        y = x.new_empty(len(x), len(weight))
        if start is not None:
            y.copy_(start)
        elif not all(self.ranks):
            y.zero_()
        for number, _, place, narrow in self._batches(y, made.narrow):
            b: Any = factors[1 + number]
            place.baddbmm_(narrow, b.unflatten(0, (len(place), -1)).mT, beta=float(start is not None), alpha=self.scale)
        return [y.addmm_(x, weight.t())], made

    def _batches(self, wide: Tensor, thin: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
        """Yield the number of each run with updates, its linears, and its columns as [linears, n, columns of one].

        Args:
            wide: outputs or their gradients [n, sum of out].
            thin: [n, R].
        """
        for number, run in enumerate(_spans(self.runs)):
            if self.ranks[run.start]:
                parts = ((wide, self.rows[run]), (thin, self.spans[run]))
                columns = (matrix[:, spans[0].start : spans[-1].stop] for matrix, spans in parts)
                first, second = (each.unflatten(1, (run.stop - run.start, -1)).transpose(0, 1) for each in columns)
                yield number, run, first, second

    def thin(self, x: Tensor, factors: Sequence[Tensor | None]) -> Made:
        """Return drop(x) Aᵀ of all parts."""
        a = factors[0]
        if a is None:
            return Made()
        if not any(self.drops):
            return Made(thin_product(x, a.t()))
        masks, parts = [], []
        for span, probability in zip(self.spans, self.drops, strict=True):
            inner = x
            if probability:
                inner, mask = drop(x, probability)
                masks.append(mask)
            if span.start < span.stop:
                parts.append(thin_product(inner, a[span].t()))
        return Made(parts[0] if len(parts) == 1 else torch.cat(parts, 1), masks)

    def _product(
        self, i: int, x: Tensor, narrow: Tensor | None, b: Tensor | None, bias: Tensor | None,
        weights: list[Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """Return the output [n, out] of one linear, whose weight is a matrix of its own."""
        base, quantizer = self.bases[i], self.quantizers[i]
        if not quantizer.dense or weights is None:
            y = quantizer.forward(base, x, bias)
        else:
            y = x @ weights[i].t() if bias is None else torch.addmm(bias.to(self.dtype), x, weights[i].t())
        if narrow is not None and b is not None:
            y.addmm_(narrow[:, self.spans[i]], b.t(), alpha=self.scales[i])
        return y

    def thin_gradient(self, gradients: Sequence[Tensor], factors: Sequence[Tensor | None]) -> Tensor | None:
        """Return s g B of all parts [n, R]; None without updates.

        Args:
            gradients: of the outputs [n, out], in the dtype of the products; stacked, one of all of them.
        """
        if factors[0] is None:
            return None
        if len(self.bases) == 1:
            return thin_product(gradients[0], factors[1], self.scale)  # type: ignore[arg-type]
        thin = _like_thin(gradients[0], sum(self.ranks))
        if self.stacked:
            for number, _, gradient, place in self._batches(gradients[0], thin):
                of_run: Any = factors[1 + number]
                place.baddbmm_(gradient, of_run.unflatten(0, (len(place), -1)), beta=0.0, alpha=self.scale)
            return thin
        for gradient, b, span, scale in zip(gradients, factors[1:], self.spans, self.scales, strict=True):
            if b is not None:
                thin[:, span] = thin_product(gradient, b, scale)
        return thin

    def input_gradient(
        self, gradients: Sequence[Tensor], thin: Tensor | None, factors: Sequence[Tensor | None],
        masks: Sequence[Tensor], weights: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the gradient of x [n, in].

        Args:
            thin: from `thin_gradient`.
            masks: from the forward pass.
            weights: from `weights`; None: dequantised here.
        """
        (first, *others), (weight, *more) = gradients, weights or self.weights()
        found = first @ weight
        for gradient, weight in zip(others, more, strict=True):
            found.addmm_(gradient, weight)
        if thin is None:
            return found
        a: Any = factors[0]
        if not masks:
            return found.addmm_(thin, a)
        for span, probability, mask in self._masked(masks):
            through = thin[:, span] @ a[span]
            found.add_(through if mask is None else drop_again(through, mask, probability))
        return found

    def factor_gradients(
        self, gradients: Sequence[Tensor], thin: Tensor | None, x: Tensor | None, made: Made,
        tensors: Sequence[Tensor | None], wants: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        """Return the gradients of `tensors`, of those that want one.

        Args:
            x: [n, in]; None: no A wants a gradient.
        """
        found: list[Tensor | None] = [None] * self.tensors
        each = list(gradients)
        if self.stacked and len(self.bases) > 1 and any(wants[2::3]):
            each = [gradients[0][:, rows] for rows in self.rows]
        for i, tensor in enumerate(tensors[2::3]):
            if wants[3 * i + 2] and tensor is not None:
                found[3 * i + 2] = each[i].sum(0, dtype=tensor.dtype)
        if made.narrow is not None and any(wants[1::3]):
            self._b_gradients(gradients, made.narrow, wants, found)
        if thin is not None and x is not None and any(wants[0::3]):
            whole = None if made.masks else thin.t() @ x
            for i, (span, probability, mask) in enumerate(self._masked(made.masks)):
                if wants[3 * i] and whole is not None:
                    found[3 * i] = whole[span]
                elif wants[3 * i]:
                    found[3 * i] = thin[:, span].t() @ (x if mask is None else drop_again(x, mask, probability))
        return _like(found, tensors)

    def _b_gradients(
        self, gradients: Sequence[Tensor], narrow: Tensor, wants: Sequence[bool], found: list[Tensor | None]
    ) -> None:
        if not self.stacked:
            for i, span in enumerate(self.spans):
                if wants[3 * i + 1]:
                    found[3 * i + 1] = thin_product(gradients[i].t(), narrow[:, span], self.scales[i])
            return
        for _, run, gradient, inner in self._batches(gradients[0], narrow):
            unused = inner.new_empty(1, 1, 1)
            made = torch.baddbmm(unused, gradient.mT, inner, beta=0, alpha=self.scale)  # each is dense, as its B is
            for i, one in zip(range(run.start, run.stop), made, strict=True):
                found[3 * i + 1] = one if wants[3 * i + 1] else None

    def _masked(self, masks: Sequence[Tensor]) -> Iterator[tuple[slice, float, Tensor | None]]:
        """Yield the columns of each linear in a thin product, its probability and its mask."""
        left = iter(masks)
        for span, probability in zip(self.spans, self.drops, strict=True):
            yield span, probability, next(left, None) if probability else None


def _like(found: list[Tensor | None], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return gradients in the dtypes and layouts of their tensors; one operation copies all."""
    places = [
        i for i, (new, old) in enumerate(zip(found, tensors, strict=True))
        if new is not None and old is not None and not (new.dtype == old.dtype and new.is_contiguous())
    ]  # fmt: skip
    if places:
        sources: list[Any] = [found[i] for i in places]
        targets: list[Any] = [torch.empty_like(tensors[i], requires_grad=False) for i in places]  # type: ignore[arg-type]
        torch._foreach_copy_(targets, sources)
        for i, target in zip(places, targets, strict=True):
            found[i] = target
    return found


def _like_thin(gradient: Tensor, rank: int) -> Tensor:
    """Return an empty tensor [n, rank], laid out as `thin_product` lays out its results."""
    if device_type(gradient) == "cpu":
        return gradient.new_empty(rank, len(gradient)).t()
    return gradient.new_empty(len(gradient), rank)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a frozen linear that a group takes."""
    quantizer = quantizer_of(module)
    return quantizer is not None and not quantizer.weight(module).requires_grad

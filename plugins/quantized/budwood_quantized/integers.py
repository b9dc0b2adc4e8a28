"""Linears whose weights are packed integers, with a scale and a zero point for each group: GPTQ's layout and HQQ's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class IntegerLinear(nn.Module):
    """x Wᵀ + bias, with W dequantised in every forward; the checkpoint's tensors are buffers of the same names."""

    packed: str
    """Name of the buffer with the integers."""

    def __init__(self, like: nn.Linear, tensors: Mapping[str, Tensor]) -> None:
        """Take the place of a linear.

        Args:
            tensors: those of its checkpoint, on the meta device; some tools write a bias for every linear.
        """
        super().__init__()
        self.in_features, self.out_features, self.bias = like.in_features, like.out_features, like.bias
        if self.bias is None and "bias" in tensors:
            self.bias = nn.Parameter(like.weight.new_empty(self.out_features), requires_grad=False)
        for name, tensor in tensors.items():
            if name != "bias":
                self.register_buffer(name, tensor)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return W [out, in]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + bias in the dtype of x [..., in]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.dequantize(x.dtype), bias)


class GPTQLinear(IntegerLinear):
    """A linear in GPTQ's layout: W[o, i] = scales[g, o] · (q[i, o] - zeros[g, o]) with g = g_idx[i].

    Attributes:
        qweight: [in · bits / 32, out] int32; the integers of an output are a stream of bits, lowest first.
        qzeros: [groups, out · bits / 32] int32, packed likewise along the outputs.
        scales: [groups, out] as stored.
        g_idx: [in] int32.
        less: what the stored zero points are too small by: 1 in the format `gptq`, 0 in `gptq_v2`.
        grouped: whether the inputs of a group are neighbours, in order.
    """

    packed = "qweight"
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def __init__(self, like: nn.Linear, tensors: Mapping[str, Tensor], bits: int, less: int) -> None:
        super().__init__(like, tensors)
        self.bits, self.less, self.grouped = bits, less, True

    @torch.no_grad()
    def settle(self) -> bool:
        """Find out whether groups are neighbours, once the tensors are read; returns whether g_idx names groups."""
        groups, index = len(self.scales), self.g_idx.long()
        each = -(-self.in_features // groups)
        self.grouped = self.in_features == each * groups and bool(
            (index == torch.arange(self.in_features, device=index.device) // each).all()
        )
        return bool(((index >= 0) & (index < groups)).all())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        inputs, outputs, groups = self.in_features, self.out_features, len(self.scales)
        weight = torch.empty(inputs, outputs, dtype=dtype, device=self.qweight.device)
        for rows, values in unpacked(self.qweight, self.bits):
            weight[rows] = values.to(dtype)
        zeros = torch.empty(outputs, groups, dtype=dtype, device=weight.device)
        for rows, values in unpacked(self.qzeros.t(), self.bits):
            zeros[rows] = (values + self.less & (1 << self.bits) - 1).to(dtype)
        zeros, scales = zeros.t(), self.scales
        if self.grouped:
            wide = weight.view(groups, -1, outputs)
            wide.sub_(zeros[:, None]).mul_(scales[:, None])
        else:
            index = self.g_idx.long()
            weight.sub_(zeros.index_select(0, index)).mul_(scales.index_select(0, index))
        return weight.t()


def unpacked(words: Tensor, bits: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the integers that words [n, m] int32 hold down each column: rows of the result, and their values."""
    period, step = (bits, 32) if 32 % bits else (1, 32 // bits)  # so many words hold so many integers
    mask = (1 << bits) - 1
    for place in range(step):
        word, shift = divmod(place * bits, 32)
        values = words[word::period] >> shift
        if shift + bits > 32:
            rest = words[word + 1 :: period] << (32 - shift)
            values = values & (1 << 32 - shift) - 1 | rest
        yield slice(place, None, step), values & mask


class HQQLinear(IntegerLinear):
    """A linear in HQQ's layout: the groups of W [out, in], row by row, are [-1, group] or, with axis 0, [group, -1].

    Attributes:
        W_q: their integers; a byte holds several (in 3 bit an int32 ten), the first rows in the highest bits.
        scale, zero: one a group, as stored; a weight is (q - zero) · scale.
        layout: bits, axis, and the shape of the groups.
    """

    packed = "W_q"
    W_q: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(
        self, like: nn.Linear, tensors: Mapping[str, Tensor], bits: int, axis: int, shape: tuple[int, int]
    ) -> None:
        super().__init__(like, tensors)
        self.layout = bits, axis, shape  # one attribute, as the checkpoint's tensors have these names

    def settle(self) -> str | None:
        """Drop what a checkpoint repeats of its configuration; return the name of one that contradicts it, or None."""
        bits, axis, _ = self.layout
        expected = {"nbits": [bits], "axis": [axis], "shape": [self.out_features, self.in_features]}
        for name in [name for name in self._buffers if name not in ("W_q", "scale", "zero")]:
            value: Any = self._buffers.pop(name)
            if name in expected and value.flatten().tolist() != expected[name]:
                return name
        return None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        bits, _, shape = self.layout
        count, mask = IN_A_WORD[bits], (1 << bits) - 1
        rows, wide = len(self.W_q), torch.promote_types(dtype, self.zero.dtype)
        weight = torch.empty(count * rows, self.W_q.shape[1], dtype=wide, device=self.W_q.device)
        for place in range(count):
            values = self.W_q >> bits * (count - 1 - place) & mask
            weight[place * rows : (place + 1) * rows] = values.to(wide)
        weight = weight[: shape[0]].sub_(self.zero).mul_(self.scale)
        return weight.to(dtype).view(self.out_features, self.in_features)


IN_A_WORD = {8: 1, 4: 2, 3: 10, 2: 4}
"""HQQ's integers in a byte, or in 3 bit in an int32, by their bits."""

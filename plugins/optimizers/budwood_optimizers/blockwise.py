"""bitsandbytes' AdamW with 8-bit states: without waits for the device, exact on a CPU, also if parameters shrink."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise
from torch import Tensor, nn

BLOCK = 256
"""Elements that share a scale; fixed in bitsandbytes' kernels."""
CHUNK = BLOCK << 12
"""Elements that a CPU updates at once, so that the copies of the moments in fp32 stay small."""


class BlockwiseAdamW(bitsandbytes.optim.AdamW):
    """AdamW (Loshchilov & Hutter, 2019) whose moments are quantised in blocks (Dettmers et al., 2022, section 2).

    A step dequantises both moments to fp32, updates them and the parameter with these values, and quantises the moments
    again. A moment x in a block with the largest absolute value a is stored as the element of a map of 256 values in
    [-1, 1], or (0, 1] for the second moment, that is nearest to x / a.

    Args:
        groups: torch parameter groups.
        min_elements: parameters with fewer elements have states in fp32.
        planning: the parameters are fake tensors, for which the maps cannot be computed; no value is read then.
    """

    def __init__(self, groups: list[dict[str, Any]], min_elements: int, planning: bool = False) -> None:
        self._planning = planning
        super().__init__(groups, betas=(0.9, 0.999), eps=1e-8, optim_bits=8, min_8bit_size=min_elements)

    def fill_qmap(self) -> None:
        """Create the two maps [256] fp32."""
        if self._planning:
            self.name2qmap = {name: torch.empty(256) for name in ("dynamic", "udynamic")}
        else:
            super().fill_qmap()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        bitsandbytes' own `step` waits for the device after each parameter, which only its paged states need.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            for position, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, index, position)
                self.update_step(group, parameter, index, position)
        return loss

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        """Update a parameter and its state."""
        state = self.state[p]
        quantised = state["state1"].dtype == torch.uint8
        if quantised and p.device.type == "cpu" and not self._planning:
            self._update_on_cpu(group, p, state)
        else:
            super().update_step(group, p, gindex, pindex)
        if quantised:
            # A second moment of 0 beside a first one that is not would divide by eps alone, for example in the row of
            # an embedding that a step does not use.
            state["state2"].clamp_(min=1)

    def _update_on_cpu(self, group: dict[str, Any], parameter: nn.Parameter, state: dict[str, Any]) -> None:
        """Compute the update of bitsandbytes' CUDA kernel.

        Its own for the CPU looks indices up by 16 bits of the quotient: it stores 0 as 2e-5 of the largest value.
        """
        state["step"] += 1
        lr, (first, second), decay = group["lr"], group["betas"], group["weight_decay"]
        corrections = 1 - first ** state["step"], math.sqrt(1 - second ** state["step"])
        values, gradient = parameter.data.view(-1), parameter.grad.reshape(-1)
        for start in range(0, values.numel(), CHUNK):
            part, blocks = slice(start, start + CHUNK), slice(start // BLOCK, (start + CHUNK) // BLOCK)
            stored = [(state[f"state{n}"].view(-1)[part], state[f"absmax{n}"][blocks], state[f"qmap{n}"]) for n in "12"]
            m, v = (dequantize_blockwise(i, absmax=a, code=code, blocksize=BLOCK) for i, a, code in stored)
            p, g = values[part], gradient[part]
            m.mul_(first).add_(g, alpha=1 - first)
            v.mul_(second).addcmul_(g, g, value=1 - second)
            p.mul_(1 - lr * decay)
            p.addcdiv_(m, (v.sqrt() / corrections[1]).add_(group["eps"]), value=-lr / corrections[0])
            for moment, (indices, absmax, code) in zip((m, v), stored, strict=True):
                new_indices, new_absmax = quantize(moment, code)
                indices.copy_(new_indices)
                absmax.copy_(new_absmax)

    def sliced_state(self, old: nn.Parameter, index: Any) -> dict[str, Any]:
        """Return the state of `old[index]`; see the hook `build_optimizer`.

        Blocks run over the flattened parameter, so the moments are dequantised, and quantised in their new blocks.
        """
        state: dict[str, Any] = dict(self.state[old])
        for number in "12":
            stored: Tensor = state[f"state{number}"]
            if stored.dtype != torch.uint8:
                state[f"state{number}"] = stored[index].clone()
                continue
            code, absmax = state[f"qmap{number}"], state[f"absmax{number}"]
            kept = dequantize_blockwise(stored, absmax=absmax, code=code, blocksize=BLOCK)[index].contiguous()
            if kept.numel() >= self.args.min_8bit_size:
                kept, state[f"absmax{number}"] = quantize(kept, code)
                kept.clamp_(min=int(number == "2"))
            else:
                del state[f"qmap{number}"], state[f"absmax{number}"]
            state[f"state{number}"] = kept
        return state


def quantize(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise fp32 values; returns indices of `code` in their shape, uint8, and the blocks' scales, fp32."""
    if values.device.type != "cpu":
        indices, state = quantize_blockwise(values, code=code, blocksize=BLOCK)
        return indices, state.absmax
    blocks = nn.functional.pad(values.reshape(-1), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    quotients = blocks / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    nearest = torch.bucketize(quotients, (code[1:] + code[:-1]) / 2, out_int32=True)
    return nearest.to(torch.uint8).view(-1)[: values.numel()].view(values.shape), absmax

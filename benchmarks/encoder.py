"""`python -m benchmarks.encoder`: what holds back a step of an encoder on short rows, on one thread of a CPU.

Six BERT layers of width 384 with frozen weights, as MiniLM's, and LoRA beside every linear compute forward and backward
on 16 rows: as transformers computes them, and compiled by inductor as a whole, in turns. Beside them stand the products
with the frozen weights alone, which every tool has to compute. What is reported is processor time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, INNER, HEADS, LAYERS, RANK, ROWS = 384, 1536, 12, 6, 8, 16


class Adapted(nn.Module):
    """A frozen linear with LoRA: x W^T + b + 2 x A^T B^T."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(0.02 * torch.randn(RANK, linear.in_features))
        self.b = nn.Parameter(0.02 * torch.randn(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 2 * F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


def stack(dtype: torch.dtype) -> nn.ModuleList:
    """Return the layers, in training mode."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    config = BertConfig(hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=HEADS)
    config._attn_implementation = "sdpa"
    layers = nn.ModuleList(BertLayer(config) for _ in range(LAYERS)).to(dtype).requires_grad_(False)
    for name, module in list(layers.named_modules()):
        if isinstance(module, nn.Linear):
            layers.set_submodule(name, Adapted(module))
    return layers.train()


def passes(layers: Any, x: Tensor) -> None:
    """Compute forward and backward."""
    for layer in layers:
        x = layer(x)
        x = x[0] if isinstance(x, tuple) else x
    x.float().square().mean().backward()


def products(tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that multiplies with each frozen weight, forward and for the gradient of its input."""
    shapes = 4 * LAYERS * [(WIDTH, WIDTH)] + LAYERS * [(INNER, WIDTH), (WIDTH, INNER)]
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    inputs = {width: torch.randn(tokens, width, dtype=dtype) for width in (WIDTH, INNER)}

    def compute() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)
            inputs[weight.shape[0]] @ weight

    return compute


def seconds(call: Callable[[], None]) -> float:
    """Return the processor time of a call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def main() -> None:
    """Measure, and print a line for each length of rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoder", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[14, 25], help="tokens of each row (default 14 25)")
    parser.add_argument("--pairs", type=int, default=25, help="passes of each kind (default 25)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="(default bf16)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[chosen.precision]
    plain, other = stack(dtype), stack(dtype)
    compiled = [torch.compile(layer, dynamic=False) for layer in other]
    for length in chosen.lengths:
        x = torch.randn(ROWS, length, WIDTH, dtype=dtype, requires_grad=True)
        calls = [products(ROWS * length, dtype), partial(passes, plain, x), partial(passes, compiled, x)]
        for call in 3 * calls:  # compiles, and warms up
            call()
        taken = [[seconds(call) for call in calls] for _ in range(chosen.pairs)]
        middle = [1e3 * statistics.median(times) for times in zip(*taken, strict=True)]
        ratios = sorted(times[1] / times[2] for times in taken)
        print(
            f"{ROWS} rows of {length} tokens, {chosen.precision}: products with frozen weights {middle[0]:.0f} ms, "
            f"layers {middle[1]:.0f} ms, compiled {middle[2]:.0f} ms: {statistics.median(ratios):.2f} times as fast "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()

"""`python -m benchmarks.kept`: what keeping dequantised weights on a CPU gives, in processor time.

One process computes with kept weights and dequantises in every pass, in turns and in changing order: training passes
over packed rows of a decoder in NF4 with adapters on all linears, with and without recomputation, and answers of
SmolLM2-135M in NF4. The results are the same bits in both ways.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from benchmarks import models
from benchmarks.gpu_record import Bench, nothing, stack, step_of
from benchmarks.halves import SHAPES, compare
from budwood import AdapterPool
from budwood.model.quantizers.room import Keeper, keep_dequantized
from budwood.model.recompute import recompute_layers

PLENTY = 1 << 40
ANSWER = 32
"""Tokens of an answer."""
KINDS = (
    ("kept", nothing),
    (
        "each time",
        partial(mock.patch.object, Keeper, "dequantized", lambda _, quantizer, *given: quantizer.dequantize(*given)),
    ),
)


def main() -> None:
    """Measure, and print a line for each setting."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kept", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 512, 2048], help="of a packed row")
    parser.add_argument("--pairs", type=int, default=6, help="calls in each way (default 6)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        bench = Bench(True, Path(), 600)
        bench.shapes, bench.dtype = SHAPES, dtype
        model = stack(bench)
        keep_dequantized(model, PLENTY, dtype)
        for tokens in chosen.tokens:
            for recomputes in (False, True):
                recompute_layers(model, recomputes)
                how = " recomputed" * recomputes
                compare(
                    f"{precision}, a pass of {tokens} tokens{how}", KINDS, chosen.pairs, step_of(bench, model, tokens)
                )
        pool = AdapterPool(str(models.smollm2()), quantization="nf4", precision=precision, device="cpu")

        def answer(pool: AdapterPool = pool) -> None:
            pool.generate(["The capital of France is"], max_new_tokens=ANSWER)

        compare(f"{precision}, an answer of {ANSWER} tokens", KINDS, chosen.pairs, answer)


if __name__ == "__main__":
    main()

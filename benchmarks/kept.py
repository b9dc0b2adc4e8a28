"""`python -m benchmarks.kept`: what keeping dequantised weights on a CPU gives, in processor time.

One process computes with kept weights and dequantises in every pass, in turns and in changing order: training passes
over packed rows of a decoder in NF4 with adapters on all linears, with and without recomputation, and answers of
SmolLM2-135M in NF4. The results are the same bits in both ways.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from benchmarks import models
from benchmarks.gpu_record import Bench, nothing, stack, step_of
from benchmarks.halves import SHAPES
from budwood import AdapterPool
from budwood.model.quantizers.room import Keeper, keep_dequantized
from budwood.model.recompute import recompute_layers

PLENTY = 1 << 40
ANSWER = 32
"""Tokens of an answer."""


def compare(what: str, pairs: int, call: Callable[[], None]) -> None:
    """Print the processor time of a call in both ways, and the ratio of each pair."""
    each_time = mock.patch.object(Keeper, "dequantized", lambda _, quantizer, *given: quantizer.dequantize(*given))
    seconds: dict[str, list[float]] = {"kept": [], "each time": []}
    for number in range(pairs + 1):
        for name, context in [("kept", nothing()), ("each time", each_time)][:: 1 if number % 2 else -1]:
            with context:
                started = time.process_time()
                call()
                if number:  # the first compiles kernels, and fills what is kept
                    seconds[name].append(time.process_time() - started)
    ratios = sorted(b / a for a, b in zip(*seconds.values(), strict=True))
    kept, other = (statistics.median(times) for times in seconds.values())
    print(
        f"{what}: kept {1e3 * kept:.0f} ms, dequantised each time {1e3 * other:.0f} ms, "
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
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
                compare(f"{precision}, a pass of {tokens} tokens{how}", chosen.pairs, step_of(bench, model, tokens))
        pool = AdapterPool(str(models.smollm2()), quantization="nf4", precision=precision, device="cpu")

        def answer(pool: AdapterPool = pool) -> None:
            pool.generate(["The capital of France is"], max_new_tokens=ANSWER)

        compare(f"{precision}, an answer of {ANSWER} tokens", chosen.pairs, answer)


if __name__ == "__main__":
    main()

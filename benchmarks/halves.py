"""`python -m benchmarks.halves`: processor time of layers in halves, and module by module, in turns, on a CPU.

One process holds a decoder with adapters on all linears, and computes forward and backward passes over a packed row in
both ways, one after the other and in changing order, so that noise of the machine affects both. What is reported is the
processor time, which other processes disturb less than the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.gpu_record import Bench, nothing, own_forward, stack, step_of
from budwood.model.recompute import recompute_layers

SHAPES = {"hidden": 512, "inner": 1408, "keys": 256, "vocabulary": 512}


def main() -> None:
    """Measure, and print a line for each dtype and setting."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.halves", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=512, help="of the packed row (default 512)")
    parser.add_argument("--pairs", type=int, default=6, help="passes of each kind (default 6)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for quantized in (False, True):
            bench = Bench(True, Path(), 600)
            bench.shapes, bench.dtype = SHAPES, dtype
            model = stack(bench, quantized)
            for recomputes in (False, True):
                recompute_layers(model, recomputes)
                step, seconds = step_of(bench, model, chosen.tokens), {"halves": [], "modules": []}
                kinds = [("halves", nothing), ("modules", own_forward)]
                for number in range(chosen.pairs + 1):
                    for name, context in kinds[:: 1 if number % 2 else -1]:
                        with context():
                            started = time.process_time()
                            step()
                            if number:  # the first compiles kernels for its shapes
                                seconds[name].append(time.process_time() - started)
                ratios = sorted(m / h for m, h in zip(seconds["modules"], seconds["halves"], strict=True))
                print(
                    f"{str(dtype).removeprefix('torch.')}, {'nf4' if quantized else 'none'}, "
                    f"{'recomputed' if recomputes else 'kept'}: halves {statistics.median(seconds['halves']):.3f} s, "
                    f"modules {statistics.median(seconds['modules']):.3f} s, modules / halves "
                    f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()

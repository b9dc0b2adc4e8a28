"""`python -m benchmarks.halves`: processor time of layers in halves, and module by module, in turns, on a CPU.

One process holds a decoder with adapters on all linears, and computes forward and backward passes over a packed row in
both ways, one after the other and in changing order, so that noise of the machine affects both. What is reported is the
processor time, which other processes disturb less than the clock.

`--labels SHARE` compares the last layer at label positions alone with the whole layer: of each segment, the last
tokens are labelled, and heads have 64 elements. `--rotary` compares rotary embeddings by halves with the operations of
the models, likewise with heads of 64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_record import SEGMENT, Bench, nothing, own_forward, stack, step_of
from budwood.model.halves.labels import hidden_states, labels_alone
from budwood.model.ops import rotary
from budwood.model.ops.attention import packed_mask
from budwood.model.recompute import recompute_layers

SHAPES = {"hidden": 512, "inner": 1408, "keys": 256, "vocabulary": 512}


def main() -> None:
    """Measure, and print a line for each dtype and setting."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.halves", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=512, help="of the packed row (default 512)")
    parser.add_argument("--pairs", type=int, default=6, help="passes of each kind (default 6)")
    parser.add_argument("--labels", type=float, metavar="SHARE", help="of the positions, which the last layer computes")
    parser.add_argument("--rotary", action="store_true", help="compare rotary embeddings instead of layers")
    chosen = parser.parse_args()
    kinds: list[tuple[str, Any]] = [("halves", nothing), ("modules", own_forward)]
    if chosen.labels:
        kinds = [("labels", labels_alone), ("whole", partial(labels_alone, False))]
    if chosen.rotary:
        kinds = [("by halves", nothing), ("own", own_rotations)]
    first, second = (name for name, _ in kinds)
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for quantized in (False, True):
            bench = Bench(True, Path(), 600)
            bench.shapes, bench.dtype = SHAPES | ({"head": 64} if chosen.labels or chosen.rotary else {}), dtype
            model = stack(bench, quantized)
            for recomputes in (False, True):
                recompute_layers(model, recomputes)
                seconds: dict[str, list[float]] = {first: [], second: []}
                step = step_of(bench, model, chosen.tokens)
                if chosen.labels:
                    step = labelled(bench, model, chosen.tokens, chosen.labels)
                for number in range(chosen.pairs + 1):
                    for name, context in kinds[:: 1 if number % 2 else -1]:
                        with context():
                            started = time.process_time()
                            step()
                            if number:  # the first compiles kernels for its shapes
                                seconds[name].append(time.process_time() - started)
                ratios = sorted(b / a for a, b in zip(seconds[first], seconds[second], strict=True))
                medians = {name: statistics.median(each) for name, each in seconds.items()}
                print(
                    f"{str(dtype).removeprefix('torch.')}, {'nf4' if quantized else 'none'}, "
                    f"{'recomputed' if recomputes else 'kept'}: {first} {medians[first]:.3f} s, {second} "
                    f"{medians[second]:.3f} s, {second} / {first} {statistics.median(ratios):.2f} "
                    f"({ratios[0]:.2f} to {ratios[-1]:.2f})",
                    flush=True,
                )


@contextmanager
def own_rotations() -> Iterator[None]:
    """Let the models' own operations rotate queries and keys."""
    before = rotary._in_halves
    rotary._in_halves = lambda *_: False
    try:
        yield
    finally:
        rotary._in_halves = before


def labelled(bench: Bench, model: Any, tokens: int, share: float) -> Callable[[], None]:
    """Return a forward and backward pass over a packed row, whose output is read at label positions."""
    x, at = bench.draw(1, tokens, bench.shapes["hidden"]), torch.arange(tokens)
    ends = (at // SEGMENT * SEGMENT + SEGMENT).clamp(max=tokens)
    starts = at // SEGMENT * SEGMENT
    positions = at[at >= starts + (1 - share) * (ends - starts)]
    inputs = {
        "inputs_embeds": x, "position_ids": (at % SEGMENT)[None], "segments": (*range(0, tokens, SEGMENT), tokens),
        "attention_mask": packed_mask(), "use_cache": False,
    }  # fmt: skip
    above = bench.draw(len(positions), bench.shapes["hidden"])

    def step() -> None:
        with torch.autocast("cpu", bench.dtype, bench.dtype != torch.float32):
            y = hidden_states(model, inputs, positions, (1, tokens))
        y[0, positions].backward(above)
        model.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()

"""`python -m benchmarks.halves`: processor time of layers in halves, and module by module, in turns, on a CPU.

One process holds a decoder with adapters on all linears, and computes forward and backward passes over a packed row in
both ways, one after the other and in changing order, so that noise of the machine affects both. What is reported is the
processor time, which other processes disturb less than the clock.

`--labels SHARE` compares the last layer at label positions alone with the whole layer: of each segment, the last
tokens are labelled, and heads have 64 elements. `--dropout P` compares dropout on the inputs of the adapters as it is
drawn in a run with torch's own. `--rotary` times the rotary embedding of a tensor of 8 heads of 64, by halves and by
the operations of the models, the best and the median of all passes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_record import SEGMENT, Bench, nothing, own_forward, stack, step_of
from budwood.model.halves.labels import hidden_states, labels_alone
from budwood.model.ops import dropout, rotary
from budwood.model.ops.attention import packed_mask
from budwood.model.recompute import recompute_layers

SHAPES = {"hidden": 512, "inner": 1408, "keys": 256, "vocabulary": 512}


def main() -> None:
    """Measure, and print a line for each dtype and setting."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.halves", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=512, help="of the packed row (default 512)")
    parser.add_argument("--pairs", type=int, default=6, help="passes of each kind (default 6)")
    parser.add_argument("--labels", type=float, metavar="SHARE", help="of the positions, which the last layer computes")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="of the adapters, here and by torch")
    parser.add_argument("--rotary", action="store_true", help="time rotary embeddings instead of layers")
    chosen = parser.parse_args()
    kinds: list[tuple[str, Any]] = [("halves", nothing), ("modules", own_forward)]
    if chosen.labels:
        kinds = [("labels", labels_alone), ("whole", partial(labels_alone, False))]
    elif chosen.dropout:
        kinds = [
            ("drawn here", nothing),
            ("torch", partial(mock.patch.object, dropout, "_is_drawn", return_value=False)),
        ]
    torch.set_num_threads(1)
    if chosen.rotary:
        rotations(chosen.tokens, chosen.pairs)
        return
    for dtype in (torch.float32, torch.bfloat16):
        for quantized in (False, True):
            bench = Bench(True, Path(), 600)
            bench.shapes, bench.dtype = SHAPES | ({"head": 64} if chosen.labels else {}), dtype
            model = stack(bench, quantized, chosen.dropout)
            for recomputes in (False, True):
                recompute_layers(model, recomputes)
                step = step_of(bench, model, chosen.tokens)
                if chosen.labels:
                    step = labelled(bench, model, chosen.tokens, chosen.labels)
                how = "recomputed" if recomputes else "kept"
                compare(f"{str(dtype).removeprefix('torch.')}, {'nf4' if quantized else 'none'}, {how}", kinds,
                        chosen.pairs, step)  # fmt: skip


def compare(what: str, kinds: Sequence[tuple[str, Any]], pairs: int, call: Callable[[], None]) -> None:
    """Print the processor time of a call in two contexts, in turns and in changing order, and the ratio of each pair.

    Args:
        kinds: name and maker of each context.
    """
    first, second = (name for name, _ in kinds)
    seconds: dict[str, list[float]] = {first: [], second: []}
    for number in range(pairs + 1):
        for name, context in kinds[:: 1 if number % 2 else -1]:
            with context():
                started = time.process_time()
                call()
                if number:  # the first compiles kernels for its shapes
                    seconds[name].append(time.process_time() - started)
    ratios = sorted(b / a for a, b in zip(seconds[first], seconds[second], strict=True))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    print(
        f"{what}: {first} {medians[first]:.3f} s, {second} {medians[second]:.3f} s, {second} / {first} "
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )


def rotations(tokens: int, pairs: int) -> None:
    """Print the processor time of the rotary embedding of one tensor, by halves and by the model's own operations."""
    from transformers.models.llama.modeling_llama import rotate_half

    def own(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        turned: torch.Tensor = rotate_half(x)
        return x * cosine[:, None] + turned * sine[:, None]

    for dtype in (torch.float32, torch.bfloat16):
        x, above = (torch.randn(1, tokens, 8, 64).to(dtype).transpose(1, 2) for _ in range(2))
        table = torch.rand(1, tokens, 64).to(dtype)
        x.requires_grad_()
        kinds: dict[str, Callable[..., torch.Tensor]] = {"by halves": rotary._Halves.apply, "own": own}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for _ in range(pairs + 1):
            for name, function in kinds.items():
                times = [time.process_time()]
                y = function(x, table, table)
                times.append(time.process_time())
                torch.autograd.grad(y, x, above)
                times.append(time.process_time())
                seconds[name].append((times[1] - times[0], times[2] - times[1]))
        for name, found in seconds.items():
            parts = [sorted(1e3 * each for each in column[1:]) for column in zip(*found, strict=True)]
            shown = [f"{word} {part[0]:.2f} ms, median {statistics.median(part):.2f}" for word, part in
                     zip(("forward", "backward"), parts, strict=True)]  # fmt: skip
            print(f"{str(dtype).removeprefix('torch.')}, {name}: {'; '.join(shown)}", flush=True)


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

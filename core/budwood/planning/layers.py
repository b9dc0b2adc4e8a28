"""Chooses how many layers recompute their activations, together with the size of micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from budwood.model.recompute import layers_of
from budwood.planning.cost import cost_of
from budwood.planning.options import Device
from budwood.planning.rehearsal import Rehearsal
from budwood.planning.sizes import ROOM, M, Measured, choose
from budwood.training.micro_tokens import ROUND, largest_group

ATTEMPTS = 4
"""Numbers of layers that are rehearsed for the size that is chosen."""
SMALL = {"cpu": 512, "cuda": 2048}
"""Tokens of a micro-batch below which products get slower, which a roofline does not know."""
SHRINK = 0.8
"""Each size that is considered is this share of the one before."""


def choose_layers(rehearsal: Rehearsal, device: Device, measure: Callable[[], M], sized: bool) -> M:
    """Let as few layers of a rehearsed run recompute as fit, with micro-batches of the size that is fastest then.

    Kept activations take memory that larger micro-batches would use, so both are chosen together, by the time of a
    step. Memory is taken as linear between all layers and none, and as proportional to the tokens; what is chosen is
    rehearsed, and improved.

    Args:
        measure: rehearses a step of the run as it is split, and with the layers that recompute.
        sized: whether the size of micro-batches is free.

    Returns:
        What was measured for the choice; the rehearsal has its settings.
    """
    layers, room = len(layers_of(rehearsal.run.model)), ROOM * device.memory
    lowest = largest_group(rehearsal.lengths, rehearsal.groups)
    top = max(rehearsal.wanted(device.kind), lowest) if sized else rehearsal.run.micro_tokens

    def at(size: int, count: int) -> M:
        rehearsal.split(size)
        rehearsal.recompute(count)
        return measure()

    none = at(top, 0)
    if none.needed <= room or not layers:
        return none
    every = at(top, layers)
    least = max(lowest, SMALL[device.kind])
    sizes = {int(none.tokens * SHRINK**n) // ROUND * ROUND for n in range(1, 99)} if sized else set()
    guesses = []
    for size in (top, *sorted((size for size in sizes if least <= size < top), reverse=True)):
        share = min(size / none.tokens, 1.0)
        most, fewest = (result.needed - result.work * (1 - share) for result in (none, every))
        if fewest <= room:
            count = _on_line((0, most), (layers, fewest), room) if most > room else 0
            seconds = _seconds(none, every, count / layers, share, device)
            guesses.append((seconds, -size, count, most, fewest))
    if not guesses:
        rehearsal.recompute(layers)
        return choose(rehearsal, device.kind, device.memory, measure) if sized else at(top, layers)
    _, negative, count, most, fewest = min(guesses)
    size, over, under, result = -negative, (0, most), (layers, fewest), None
    for _ in range(ATTEMPTS):
        found = at(size, count)
        if found.needed <= room:
            result, under = found, (count, found.needed)
            count = min(_on_line(over, under, room), count - 1)
            if count <= over[0] or under[0] - count <= layers // 16:
                break
        else:
            over = (count, found.needed)
            count = _on_line(over, under, room)
            if count <= over[0] or (result is not None and under[0] - count <= layers // 16):
                break
    if result is None:
        rehearsal.recompute(layers)
        return choose(rehearsal, device.kind, device.memory, measure) if sized else at(top, layers)
    rehearsal.split(size)
    rehearsal.recompute(under[0])
    return result


def _on_line(over: tuple[int, float], under: tuple[int, float], room: float) -> int:
    """Return how many layers should recompute to need `room` bytes, on the line through two (layers, bytes).

    Args:
        over: fewer layers, which need more than `room`.
        under: more layers, which need less.
    """
    (few, most), (many, least) = over, under
    if few >= many or most <= least:
        return many
    return min(max(math.ceil(few + (many - few) * (most - room) / (most - least)), few + 1), many)


def _seconds(none: Measured, every: Measured, recomputed: float, share: float, device: Device) -> float:
    """Return the time per token, up to a factor, of micro-batches `share` times as large as the rehearsed ones.

    Weights are dequantised for each micro-batch, and each operation is handed over once; the rest is proportional.
    """

    def one(result: Measured) -> float:
        scaled = [
            op
            if op.name.startswith("dequantize")
            else replace(op, flops=int(op.flops * share), moved=int(op.moved * share))
            for op in result.operations
            if op.in_pass
        ]
        return cost_of(scaled, device).worst

    kept = one(none)
    return (kept + recomputed * (one(every) - kept)) / share

"""The number of layers that recompute, chosen together with the size of micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from budwood.planning import layers
from budwood.planning.options import GIB, Device
from budwood.planning.trace import Operation
from budwood.training.micro_tokens import wanted

LAYERS, LONGEST = 32, 512
TOP = 3584
"""Tokens of an optimizer step."""


@dataclass
class Step:
    """A step that needs 4 GiB, 1 MiB a token for one layer at work, and 1 MiB for each layer that keeps activations.

    A token takes 1 TFLOP, and a third more if all layers recompute.
    """

    tokens: int
    recomputed: int
    operations: list[Operation] = field(default_factory=list)

    def __post_init__(self) -> None:
        flops = int(self.tokens * 1e12 * (1 + self.recomputed / LAYERS / 3))
        self.operations = [Operation("mm", flops, 0, torch.float32, True)]

    @property
    def work(self) -> int:
        return self.tokens * max(LAYERS - self.recomputed, 1) << 20

    @property
    def needed(self) -> int:
        return 4 * GIB + self.work


def chosen(gib: float, launch: float = 0.0, given: int | None = None) -> tuple[Any, int]:
    """Return (tokens, layers that recompute) for a memory, and how many steps were rehearsed."""
    rows = SimpleNamespace(lengths=np.full(20, LONGEST), groups=None)
    recipe = SimpleNamespace(micro_tokens=2048, train=SimpleNamespace(batch_tokens=4096, batch_examples=None))
    run = SimpleNamespace(
        recipe=recipe, examples=rows, steps=1, seed=0, hooks=SimpleNamespace(calls=lambda name: []), model=None,
        micro_tokens=given,
    )  # fmt: skip
    rehearsal: Any = SimpleNamespace(run=run, lengths=rows.lengths, groups=None, size=given, recomputed=0)
    rehearsal.wanted = lambda kind: wanted(run, kind)
    rehearsal.split = lambda size: setattr(rehearsal, "size", size)
    rehearsal.recompute = lambda count: setattr(rehearsal, "recomputed", count)
    count = 0

    def measure() -> Step:
        nonlocal count
        count += 1
        return Step(rehearsal.size, rehearsal.recomputed)

    device = Device("x", "cuda", int(gib * GIB), 1e12, {torch.float32: 1e15}, launch=launch, measured=True)
    result = layers.choose_layers(rehearsal, device, measure, given is None)
    assert (result.tokens, result.recomputed) == (rehearsal.size, rehearsal.recomputed)
    return (result.tokens, result.recomputed), count


@pytest.fixture(autouse=True)
def _layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "layers_of", lambda model: [None] * LAYERS)


def room(tokens: int, recomputed: int) -> float:
    """Return the GiB of a device on which such a step just fits."""
    return Step(tokens, recomputed).needed / GIB / layers.ROOM * 1.001


def test_no_layer_recomputes_if_none_must() -> None:
    assert chosen(room(TOP, 0)) == ((TOP, 0), 1)
    assert chosen(room(2048, 0), given=2048) == ((2048, 0), 1)


def test_the_fewest_layers_that_fit_recompute() -> None:
    """Within two of 32, and with few rehearsals."""
    for exact in (3, 10, 20, 29, 31):
        (size, count), steps = chosen(room(2048, exact), given=2048)
        assert size == 2048 and exact <= count <= exact + 2 and steps <= 6
    assert chosen(room(2048, 32) * 0.9, given=2048)[0] == (2048, 32)  # does not fit, and is reported


def test_time_decides_between_the_size_and_the_layers() -> None:
    memory = room(TOP, 10)
    (size, count), _ = chosen(memory)  # busy at any size, and no layer recomputes in the largest that allows it
    assert 2048 <= size < TOP * 22 / 32 and count == 0
    (size, count), _ = chosen(memory, launch=TOP)  # an operation costs as much as the work of so many tokens
    assert size == TOP and 10 <= count <= 12


def test_small_micro_batches_only_where_nothing_else_fits() -> None:
    (size, count), _ = chosen(room(1024, 32))
    assert LONGEST <= size <= 1024 and count == LAYERS
    (size, count), _ = chosen(room(LONGEST, 32) * 0.5)
    assert (size, count) == (LONGEST, LAYERS)

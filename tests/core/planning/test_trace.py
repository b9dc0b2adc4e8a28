"""The trace of a step: what is alive at the peak, where it stands, and what operations cost."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn

from budwood.planning.trace import Trace


def test_peak_parts_and_place_of_a_small_step():
    """What died before the peak does not count; what is born after it and stays does."""
    weight = nn.Parameter(torch.ones(1000, 1000))
    with Trace() as trace:
        trace.part_of("weights", [weight])
        start = trace.mark()
        torch.ones(500, 500).sum()
        kept = torch.ones(1000, 1000)
        y = kept @ weight
        del kept
        y.sum().backward()
        trace.part_of("gradients", [weight.grad])
        state = torch.zeros(100, 100)
        trace.part_of("state", [state])
        weight.grad = None
    peak = trace.peak(start)
    assert peak.parts["weights"] == 4_000_000
    assert peak.parts["gradients"] == 4_000_000
    assert peak.parts["state"] == 40_000  # it is there in every later step
    assert peak.total == sum(peak.parts.values())
    assert 0 <= peak.total - (4 * 4_000_000 + 40_000) < 100  # weights, input, output, gradient, state; a few scalars
    assert peak.where.startswith("backward")


def test_blocks_of_the_cuda_allocator():
    with Trace(block=512) as trace:
        start = trace.mark()
        kept = torch.ones(3)
        assert trace.peak(start).total == 512
    del kept


def test_modules_are_named_in_both_directions():
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.repeat(1, 50) * 2).sum(1, keepdim=True) * x

    model = nn.Sequential(nn.Linear(8, 8), Wide(), nn.Linear(8, 8))
    trace = Trace(lambda: ("strategy 'x'", "token_terms"))
    trace.name_modules(model)
    with trace:
        start = trace.mark()
        y = model(torch.ones(100, 8))
        assert trace.peak(start).where == "1, hook token_terms of strategy 'x'"
        start = trace.mark()
        y.sum().backward()
    assert trace.peak(start).where.startswith("backward of 1")


def test_operations_count_products_and_traffic():
    a, b = torch.ones(10, 20), torch.ones(20, 30)
    with Trace() as trace:
        torch.nn.functional.linear(a, b.t())
    product = next(op for op in trace.operations if op.flops)
    assert product.flops == 2 * 10 * 20 * 30
    assert product.moved == 4 * (10 * 20 + 20 * 30 + 10 * 30)


def test_a_trace_does_not_outlive_its_use():
    """A trace knows the modules of a model whose storages it watches: a cycle, which must be free to go."""
    model = nn.Linear(8, 8)
    with Trace() as trace:
        trace.name_modules(model)
        trace.part_of("weights", model.parameters())
        model(torch.ones(1, 8))
    ended = weakref.ref(model)
    del model, trace
    gc.collect()
    assert ended() is None

"""The trace of a step: what is alive at the peak, where it stands, and what operations cost."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from budwood.model.fake import fake_tensors
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


def test_products_in_place_count_as_those_that_return_a_tensor():
    a, b, total = torch.ones(10, 20), torch.ones(20, 30), torch.zeros(10, 30)
    with Trace() as trace:
        total.addmm_(a, b)
        total.view(1, 10, 30).baddbmm_(a[None], b[None])
    assert [op.flops for op in trace.operations] == 2 * [2 * 10 * 20 * 30]


def test_a_copy_of_several_tensors_is_one_operation_where_cuda_has_a_kernel_for_all():
    """ATen's has one if each target is dense and lies as its source does."""
    wide = [torch.ones(4, 6), torch.ones(5, 1)]
    narrow = [torch.zeros_like(t, dtype=torch.bfloat16) for t in wide]
    columns, turned = torch.zeros(4, 12)[:, :6], torch.zeros(6, 4).t()
    with Trace(on_cpu=False) as trace:
        torch._foreach_copy_(narrow, wide)
        assert [op.name for op in trace.operations] == ["_foreach_copy_"]
        for first in (columns, turned):
            trace.operations.clear()
            torch._foreach_copy_([first, narrow[1]], wide)
            assert [(op.name, op.moved) for op in trace.operations] == [("copy_", 2 * 4 * 24), ("copy_", (2 + 4) * 5)]


@pytest.mark.parametrize(("keys", "size", "expected"), [(2, 40, 495_616 + 7_744 + 64_000), (4, 136, 1_486_848 + 7_744)])
def test_the_backward_pass_of_attention_on_cuda_allocates_inside(keys, size, expected):
    """A gradient of the queries in fp32, whose heads are padded, a sum a row, and grouped heads' own gradients."""
    pytest.importorskip("torch.nn.attention.varlen")
    operation = torch.ops.torch_attn._varlen_attn_backward.default
    with fake_tensors():
        query, key = torch.empty(100, 4, size, dtype=torch.bfloat16), torch.empty(100, keys, size, dtype=torch.bfloat16)
        lse, bounds = torch.empty(4, 100), torch.zeros(4, dtype=torch.int32)  # three segments
        rest = (bounds, bounds, 50, 50, True, torch.empty(2, dtype=torch.uint64))
        with Trace(on_cpu=False) as trace:
            start = trace.mark()
            kept = operation(query, query, key, key, query, lse, *rest)
            peak = trace.peak(start)
    assert peak.total == expected + sum(tensor.nbytes for tensor in kept)

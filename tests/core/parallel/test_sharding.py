"""What a process keeps of a matrix before `fully_shard` divides it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from budwood.parallel.sharding import _give_back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(("rows", "count"), [(8, 2), (7, 3), (5, 4), (2, 4), (1, 1)])
def test_a_process_keeps_the_rows_that_it_will_hold(rows: int, count: int, dtype: torch.dtype) -> None:
    """The same rows as `torch.chunk`, by which FSDP2 divides; the other pages have never been written."""
    complete = torch.arange(1, 3 * rows + 1).view(rows, 3).to(dtype)
    for rank in range(count):
        matrix = nn.Parameter(complete.clone(), requires_grad=False)
        _give_back(matrix, count, rank)
        assert (matrix.shape, matrix.dtype) == (complete.shape, dtype)
        for index, (kept, original) in enumerate(zip(matrix.chunk(count), complete.chunk(count), strict=True)):
            assert torch.equal(kept, original if index == rank else torch.zeros_like(original))

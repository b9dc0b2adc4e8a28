"""The allocator of a GPU's memory grows its segments, unless the user has set it."""

from __future__ import annotations

import os

import pytest
import torch

from budwood.model.allocator import SETTING, use_expandable_segments

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize("own", [None, *NAMES])
@pytest.mark.parametrize("gpu", [True, False])
def test_segments_grow_also_where_torch_is_imported_already(
    monkeypatch: pytest.MonkeyPatch, own: str | None, gpu: bool
) -> None:
    """torch reads the environment when it is imported, as by a script before it calls `budwood.tune`."""
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    for name in NAMES:
        monkeypatch.setenv(name, "")  # restored at the end
        monkeypatch.delenv(name)
    if own is not None:
        monkeypatch.setenv(own, "backend:native")
    use_expandable_segments()
    use_expandable_segments()
    assert told == ([SETTING] if own is None and gpu else [])
    assert [os.environ.get(name) for name in NAMES] == (
        [SETTING, None] if own is None else ["backend:native" if name == own else None for name in NAMES]
    )

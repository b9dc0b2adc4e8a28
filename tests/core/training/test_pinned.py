"""Batches for a GPU wait in pinned memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from budwood.contract.examples import Batch
from budwood.training import batches
from budwood.training.batches import StepBatches


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_every_tensor_is_pinned_beside_the_step_if_it_goes_to_a_gpu(monkeypatch: pytest.MonkeyPatch, kind: str):
    index = torch.zeros(1, dtype=torch.int64)
    batch = Batch(
        {"input_ids": index[None]}, index, index, torch.ones(1), index, index, ("a",), (1,), ((0, 1),), 1, 1,
        columns={"scores": torch.ones(1)},
    )  # fmt: skip
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: (pinned.append(tensor), tensor + 0)[1])
    monkeypatch.setattr(batches, "collate_for", lambda *_: batch)
    run: Any = SimpleNamespace(
        micro_tokens=8, packed=True, processes=1, sharded=False, device=torch.device(kind),
        world=SimpleNamespace(share=lambda parts: parts),
    )  # fmt: skip
    examples: Any = type("Rows", (list,), {"lengths": np.ones(1, dtype=np.int64), "groups": None})(["a"])
    (made,) = StepBatches.collate(run, examples, np.zeros(1, dtype=np.int64), 0, 1).batches
    assert len(pinned) == (7 if kind == "cuda" else 0)
    assert (made is batch) == (kind == "cpu") and made.keys == batch.keys and torch.equal(made.labels, batch.labels)

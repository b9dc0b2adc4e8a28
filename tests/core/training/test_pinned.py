"""What a GPU is given waits in pinned memory, from which it is copied while the host goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from budwood.contract.examples import Batch
from budwood.model.decoding import Gumbel
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


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_noise_for_sampling_is_copied_without_a_wait(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    pinned: list[Tensor] = []
    copies: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: (pinned.append(tensor), tensor)[1])
    monkeypatch.setattr(Tensor, "to", lambda tensor, *args, **kwargs: (copies.append((*args, kwargs)), tensor)[1])
    scores: Any = SimpleNamespace(shape=(2, 5), device=torch.device(kind), double=lambda: torch.zeros(2, 5).double())
    found = Gumbel([1, 2])(torch.zeros(2, 1), scores)
    assert found.shape == (2, 5) and len(pinned) == (kind == "cuda")
    assert copies == [(torch.device(kind), {"non_blocking": True})]

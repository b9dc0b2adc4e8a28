"""Fake tensors: what their mode looks up in torch's cache is what torch computes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from budwood.model import fake
from budwood.testing.fake import run_on_fake_tensors


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> type[FakeTensorMode]:
    """The mode of fake tensors, with torch's own comparison of each result from the cache with a computed one."""

    class Checked(fake._Mode):
        def __init__(self) -> None:
            super().__init__()
            self.cache_crosscheck_enabled = True

    monkeypatch.setattr(fake, "_Mode", Checked)
    return Checked


@pytest.mark.parametrize(("quantization", "precision"), [("none", "fp32"), ("nf4", "bf16")])
def test_a_step_of_looked_up_results_is_that_of_torch(make_recipe, checked, quantization, precision):
    hits = FakeTensorMode.cache_hits
    recipe = make_recipe(base={"quantization": quantization}, train={"steps": 1, "precision": precision})
    run_on_fake_tensors(recipe)
    assert FakeTensorMode.cache_hits > hits + 500


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.view(torch.int32),
        lambda x: torch.empty(5, 4),
        lambda x: torch.empty(5, 4).t(),
        lambda x: torch.empty(21)[1:].view(4, 5),
        lambda x: torch.empty(21)[:20].view(4, 5),
        lambda x: x.requires_grad_(),
        lambda x: torch.empty(4, 5, device="cuda"),
    ],
)
def test_tensors_that_differ_have_their_own_results(checked, other):
    with checked():
        for x in (torch.empty(4, 5), other(torch.empty(4, 5)), torch.empty(4, 5)):
            negated, turned = torch.ops.aten.neg.default(x), torch.ops.aten.t.default(x)
            assert (negated.dtype, negated.device, negated.stride()) == (x.dtype, x.device, x.stride())
            assert (turned.stride(), turned.storage_offset()) == (x.stride()[::-1], x.storage_offset())
            assert torch.ops.aten.cat.default([x, x], 0).shape == (2 * len(x), x.shape[1])


def test_numbers_of_another_type_have_their_own_results(checked):
    with checked():
        x = torch.empty(3, dtype=torch.int64)
        assert [(x * number).dtype for number in (1, 1.0, 1, True)] == [
            torch.int64, torch.float32, torch.int64, torch.int64,
        ]  # fmt: skip

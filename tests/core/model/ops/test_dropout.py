"""Dropout on a CPU: its shares, what it is divided by, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from budwood.model.device import planned_device
from budwood.model.ops.dropout import drop, drop_again, drop_factor, dropout

ELEMENTS = 200_000


def kept(probability: float, elements: int = ELEMENTS) -> Tensor:
    return drop(torch.ones(elements), probability)[0].double()


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_each_element_is_dropped_with_its_probability_whatever_its_place_in_a_word(probability: float) -> None:
    torch.manual_seed(0)
    mask = kept(probability)
    share = math.sqrt(probability * (1 - probability))
    for place in range(4):
        part = mask[place::4]
        assert abs(1 - part.mean() - probability) < 5 * share / math.sqrt(len(part))


def test_elements_are_independent_of_others() -> None:
    torch.manual_seed(0)
    mask = kept(0.5) - 0.5
    for distance in (1, 2, 3, 4, 5, 8):
        assert abs((mask[:-distance] * mask[distance:]).mean() / 0.25) < 5 / math.sqrt(ELEMENTS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 9), (4, 4), (1,), (0, 3)])
def test_what_is_left_is_divided_by_the_share_that_is_left(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    zeroed, mask = drop(x, 0.3)
    assert zeroed.dtype == dtype
    assert torch.equal(zeroed, torch.where(mask.bool(), x, 0))
    assert torch.equal(drop_again(x, mask, 0.3), zeroed)
    share = round(0.3 * 2**15) / 2**15  # what is dropped in the mean
    assert drop_factor(x, 0.3) == pytest.approx(1 / (1 - share), rel=1e-12)
    assert share == pytest.approx(0.3, abs=2**-16)


def test_a_seed_gives_a_mask_and_the_next_one_is_another() -> None:
    torch.manual_seed(3)
    first, second = kept(0.5, 1000), kept(0.5, 1000)
    torch.manual_seed(3)
    assert torch.equal(kept(0.5, 1000), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("probability", [0.0, 1e-6, 1.0])
def test_probabilities_at_the_ends(probability: float) -> None:
    torch.manual_seed(0)
    out = dropout(torch.ones(1000), probability)
    assert out.isclose(torch.tensor(0.0 if probability == 1 else 1 / (1 - probability))).sum() >= 999


@pytest.mark.parametrize("probability", [1e-4, 0.9999])
def test_probabilities_that_the_bits_would_change_are_left_to_torch(probability: float) -> None:
    torch.manual_seed(0)
    zeroed, mask = drop(torch.ones(ELEMENTS), probability)
    torch.manual_seed(0)
    assert torch.equal(mask, torch.native_dropout(torch.ones(ELEMENTS), probability, True)[1])
    assert drop_factor(zeroed, probability) == 1


def test_values_and_gradient_of_rows_that_are_not_contiguous() -> None:
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).t().requires_grad_()
    torch.manual_seed(0)
    out = dropout(x, 0.5)
    out.sum().backward()
    mask = out != 0
    assert 0 < int(mask.sum()) < 60
    torch.testing.assert_close(out, torch.where(mask, 2 * x, 0))
    torch.testing.assert_close(x.grad, 2.0 * mask)


def test_nothing_that_is_not_finite_passes_where_it_is_dropped() -> None:
    """A product with a mask would give NaN there."""
    torch.manual_seed(0)
    zeroed, mask = drop(torch.full((1000,), math.inf), 0.5)
    assert torch.equal(zeroed == 0, ~mask.bool())


def test_a_plan_for_a_gpu_counts_torchs_kernel() -> None:
    x = torch.ones(1000)
    with planned_device("cuda"):
        torch.manual_seed(0)
        out, mask = drop(x, 0.25)
        assert drop_factor(x, 0.25) == 1
    torch.manual_seed(0)
    expected, theirs = torch.native_dropout(x, 0.25, True)
    assert torch.equal(out, expected)
    assert torch.equal(mask, theirs)


def test_modules_of_a_base_draw_quickly_in_training_alone() -> None:
    from budwood.model.halves.take_over import use_own_operations

    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    use_own_operations(model)
    x = torch.randn(5, 8)
    model.eval()
    assert torch.equal(model(x), model[0](x))
    model.train()
    torch.manual_seed(0)
    out = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(out, dropout(model[0](x), 0.5))

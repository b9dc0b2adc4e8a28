"""Devices that a plan can be for."""

from __future__ import annotations

import pytest

from budwood.errors import InputError
from budwood.planning.devices import CARDS, GIB, find_device


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "RTX 4090 24G"), ("RTX 3060 12G", "RTX 3060 12G"), ("rtx-4060-ti", "RTX 4060 Ti 16G"),
        ("nvidia h100", "H100 80G"), ("A100", "A100 80G"), ("A100 40G", "A100 40G"), ("H200", "H200 141G"),
    ],
)  # fmt: skip
def test_cards_are_found_by_loose_names(text: str, name: str):
    assert find_device(text).name == name


def test_memory_alone():
    device = find_device("cuda:24GiB")
    assert (device.kind, device.memory, device.bandwidth) == ("cuda", 24 * GIB, None)
    assert find_device("cuda:24G").memory == 24 * GIB
    assert find_device("cuda:24GB").memory == 24_000_000_000
    assert find_device("cpu:8GiB").memory == 8 * GIB


@pytest.mark.parametrize("text", ["RTX 9999", "9", "cuda:1", "cuda:lots", "cuda:0GiB", "cuda:", ""])
def test_what_is_not_known_is_refused_in_one_line(text: str):
    with pytest.raises(InputError, match="--device") as error:
        find_device(text)
    assert len(str(error.value).splitlines()) == 1


def test_every_card_has_a_source_and_plausible_numbers():
    for card in CARDS:
        assert card.source and card.bandwidth and len(card.rates) == 3, card.name
        assert 1e11 < card.bandwidth < 1e13, card.name
        assert all(1e12 < rate < 3e15 for rate in card.rates.values()), card.name

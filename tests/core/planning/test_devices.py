"""Devices that a plan can be for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from budwood.errors import InputError
from budwood.planning import measurement as measuring
from budwood.planning.cost import cost_of
from budwood.planning.devices import find_device
from budwood.planning.measurement import Measurement
from budwood.planning.options import CARDS, GIB, card_of, parse_link
from budwood.planning.trace import Operation


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


@pytest.mark.parametrize(
    ("text", "bytes_per_second"),
    [("16GB/s", 16e9), ("1.5 GB/s", 1.5e9), ("900MB/s", 9e8), ("2GiB/s", 2 << 30), ("100Gbit/s", 12.5e9)],
)
def test_a_bandwidth_is_read(text: str, bytes_per_second: float):
    assert parse_link(text) == bytes_per_second


def test_every_card_has_a_source_and_plausible_numbers():
    for card in CARDS:
        assert card.source and card.bandwidth and len(card.rates) == 3, card.name
        assert 1e11 < card.bandwidth < 1e13 and 1e10 < card.link < card.bandwidth, card.name
        assert all(1e12 < rate < 3e15 for rate in card.rates.values()), card.name


def test_full_names_of_gpus_are_found_in_the_table():
    names = {
        ("NVIDIA A100-SXM4-80GB", 80): "A100 80G", ("NVIDIA A100-PCIE-40GB", 40): "A100 40G",
        ("NVIDIA L40S", 45): "L40S 48G", ("NVIDIA GeForce RTX 4060 Ti", 16): "RTX 4060 Ti 16G",
        ("NVIDIA H100 80GB HBM3", 80): "H100 80G", ("NVIDIA H100 PCIe", 80): "H100 PCIe 80G",
        ("Tesla T4", 15): "T4 16G",
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16): None, ("NVIDIA GeForce GTX 1080", 8): None,
    }  # fmt: skip
    found = {key: card_of(key[0], key[1] * GIB) for key in names}
    assert {key: card and card.name for key, card in found.items()} == names


def test_an_unknown_card_is_answered_with_the_closest():
    with pytest.raises(InputError, match=r"Closest: [^.]*RTX 4090 24G[^.]*\. Others: .*RTX 3060 12G"):
        find_device("4090ti")


def test_a_measurement_is_kept_and_used_while_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BUDWOOD_CACHE", str(tmp_path))
    brief = find_device("cpu")
    assert "briefly just now; `budwood doctor --measure`" in brief.source
    assert brief.launch and 1e-7 < brief.launch < 1e-2
    assert brief.rates["fp32"] > 1e8 and brief.bandwidth and brief.bandwidth > 1e8
    monkeypatch.setattr("budwood.planning.devices.measure", lambda *_: measurement)  # quicker
    measurement = Measurement({"fp32": 2e11, "bf16": 4e11}, 5e10, 1e10, 3e-6, "2025-01-31", 12.0)
    path = measuring.keep("cpu", measurement)
    device = find_device("cpu")
    assert (device.source, device.launch, device.dequantize) == ("measured on 2025-01-31", 3e-6, 1e10)
    assert device.rates == {"fp32": 2e11, "bf16": 4e11} and device.bandwidth == 5e10
    operation = Operation("dequantize_4bit", 0, 10**9, torch.uint8, True)
    assert cost_of([operation], device).best == pytest.approx(0.1 + 3e-6)
    assert cost_of([operation], device).worst == pytest.approx(0.1 / 0.6 + 9e-6)
    other = json.loads(path.read_text())
    other["conditions"]["torch"] = "1.0"
    path.write_text(json.dumps(other))
    ignored = find_device("cpu").source
    assert "the measurement of 2025-01-31 is ignored: torch 1.0 then" in ignored
    for damaged in ("{", '{"conditions": {}}', json.dumps({**other, "measurement": {"rates": {}}})):
        path.write_text(damaged)
        assert f"{path} is ignored" in find_device("cpu").source


def test_the_operations_of_the_launch_measurement_are_counted():
    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += not func.is_view
            return func(*args, **(kwargs or {}))

    network, inputs = measuring.tiny_network(), torch.ones(4, 8)
    with Counter() as counter:
        network(inputs).sum().backward()
    assert counter.count == measuring.OPERATIONS


def test_every_measurement_gives_a_rate(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measuring, "SIZES", {"cpu": 256})
    monkeypatch.setattr(measuring, "BUFFER", 1 << 20)
    monkeypatch.setattr(measuring, "SECONDS", 0.01)
    found = measuring.measure("cpu", 0.01)
    assert set(found.rates) == {"fp32", "bf16", "fp16"}
    assert min(*found.rates.values(), found.bandwidth, found.dequantize or 0, 1 / found.launch) > 100
    assert "µs an operation" in str(found) and "NF4" in str(found)

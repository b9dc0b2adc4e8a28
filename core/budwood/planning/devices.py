"""Devices to plan for: those of a name, and this machine's, measured or with the rates of the table."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from budwood.errors import InputError, plural
from budwood.model.machine import host_memory
from budwood.planning.measurement import BRIEF, Measurement, kept, measure
from budwood.planning.options import Device, card_of, named_device


def find_device(text: str | None, option: str = "--device") -> Device:
    """Return the device that a user or a recipe names; None or auto: this machine's; see `named_device`.

    Raises:
        InputError: it is not known, or not there.
    """
    text = "auto" if text is None else text
    if (device := named_device(text, option)) is not None:
        return device
    if text == "cpu":
        return _cpu()
    if text != "auto" and not torch.cuda.is_available():
        raise InputError(
            f"{option}: torch finds no {text} here to plan for: name a card, as in 4090, or its memory, as in "
            "cuda:24GiB."
        )
    return _here()


def precision(device: Device, wanted: str) -> torch.dtype:
    """Return the compute dtype for `train.precision`, by the rules of a run on this device."""
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return names.get(wanted) or (torch.bfloat16 if device.capability >= (8, 0) else torch.float16)


def _here() -> Device:
    """Return this machine's GPU, with the kept measurement or the rates of the table; its CPU if it has none."""
    if not torch.cuda.is_available():
        return _cpu()
    properties = torch.cuda.get_device_properties(0)
    name, capability = properties.name, (properties.major, properties.minor)
    device = Device(name, "cuda", properties.total_memory, capability=capability, source="this machine")
    if (card := card_of(name, properties.total_memory)) is not None:
        device = replace(
            device, bandwidth=card.bandwidth, rates=card.rates, source=f"this machine; rates of {card.source}",
            link=card.link,
        )  # fmt: skip
    measurement, why_not = kept("cuda")
    if measurement is None:
        return replace(device, source=f"{device.source}; {why_not}" if why_not else device.source)
    return measured(device, measurement, f"measured on {measurement.day}")


def _cpu() -> Device:
    """Return this machine's CPU, with the kept measurement, or measured for half a second."""
    device = Device(f"this CPU, {plural(torch.get_num_threads(), 'thread')}", "cpu", host_memory(), capability=(0, 0))
    measurement, why_not = kept("cpu")
    if measurement is not None:
        return measured(device, measurement, f"measured on {measurement.day}")
    source = f"measured briefly just now; {why_not or '`budwood doctor --measure` measures longer, and keeps it'}"
    return measured(device, _brief(torch.get_num_threads()), source)


@functools.cache
def _brief(threads: int) -> Measurement:
    """Measure this CPU once for a process, with its current number of threads."""
    return measure("cpu", BRIEF)


def measured(device: Device, measurement: Measurement, source: str) -> Device:
    """Return a device with measured rates."""
    return replace(
        device, bandwidth=measurement.bandwidth, rates=measurement.rates, source=source, launch=measurement.launch,
        dequantize=measurement.dequantize, measured=True,
    )  # fmt: skip

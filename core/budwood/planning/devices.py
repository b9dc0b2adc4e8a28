"""Devices to plan for: memory, bandwidth and rates of matrix products, from a table or measured here."""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass, field, replace

import torch

from budwood.errors import InputError, plural
from budwood.model.machine import host_memory
from budwood.planning.measurement import BRIEF, DTYPES, Measurement, kept, measure
from budwood.untrusted.redaction import shorten

GIB = 1 << 30
CONTEXT = GIB // 2
"""Bytes of a CUDA device that its driver, context and libraries take: assumed; 0.3 to 0.6 GiB on current cards."""


@dataclass(frozen=True)
class Device:
    """A device to plan for.

    Attributes:
        kind: cpu or cuda.
        memory: bytes; on the CPU those available now.
        bandwidth: bytes per second of its memory; None: unknown.
        rates: floating-point operations per second of dense products with fp32 sums, by dtype; empty: unknown.
        capability: CUDA's compute capability.
        source: where the numbers are from.
        launch: seconds that the host needs for an operation; None: not measured.
        dequantize: bytes per second of the dequantisation of 4-bit weights; None: as `bandwidth`.
        link: bytes per second that it sends, and receives at once, between two cards of a machine; None: unknown.
        measured: whether `bandwidth` and `rates` were reached on the device, and are not its limits on paper.
    """

    name: str
    kind: str
    memory: int
    bandwidth: float | None = None
    rates: dict[torch.dtype, float] = field(default_factory=dict)
    capability: tuple[int, int] = (8, 0)
    source: str = ""
    launch: float | None = None
    dequantize: float | None = None
    link: float | None = None
    measured: bool = False

    def precision(self, wanted: str) -> torch.dtype:
        """Return the compute dtype for `train.precision`, by the rules of a run on this device."""
        names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        return names.get(wanted) or (torch.bfloat16 if self.capability >= (8, 0) else torch.float16)


def _card(
    name: str, gib: float, bandwidth: float, half: float, single: float, capability: tuple[int, int], source: str,
    link: float,
) -> Device:  # fmt: skip
    """Make a row: memory in GiB, bandwidth and link in GB/s, rates in TFLOP/s.

    Rates are those in 16 bit with fp32 sums and without sparsity, and those in fp32.
    """
    bf16 = half if capability >= (8, 0) else single
    rates = {torch.float16: half * 1e12, torch.bfloat16: bf16 * 1e12, torch.float32: single * 1e12}
    return Device(name, "cuda", int(gib * GIB), bandwidth * 1e9, rates, capability, source, link=link * 1e9)


AMPERE, ADA, BLACKWELL = "NVIDIA's GA102 whitepaper", "NVIDIA's Ada whitepaper", "NVIDIA's RTX Blackwell whitepaper"
GEFORCE = "NVIDIA's product page; 16 bit at twice the fp32 rate, as in its generation's whitepaper"
CARDS = [
    _card("T4 16G", 14.7, 320, 65, 8.1, (7, 5), "NVIDIA's T4 datasheet", 15.75),
    _card("V100 16G", 15.7, 900, 125, 15.7, (7, 0), "NVIDIA's V100 datasheet (SXM2)", 150),
    _card("V100 32G", 31.7, 900, 125, 15.7, (7, 0), "NVIDIA's V100 datasheet (SXM2)", 150),
    _card("RTX 3060 12G", 11.7, 360, 25.4, 12.7, (8, 6), GEFORCE, 31.5),
    _card("RTX 3070 8G", 7.8, 448, 40.6, 20.3, (8, 6), AMPERE, 31.5),
    _card("RTX 3080 10G", 9.7, 760, 59.5, 29.8, (8, 6), AMPERE, 31.5),
    _card("RTX 3090 24G", 23.6, 936, 71, 35.6, (8, 6), AMPERE, 31.5),
    _card("RTX 4060 8G", 7.7, 272, 30.2, 15.1, (8, 9), ADA, 15.75),
    _card("RTX 4060 Ti 16G", 15.6, 288, 44.1, 22.1, (8, 9), ADA, 15.75),
    _card("RTX 4070 12G", 11.7, 504, 58.3, 29.1, (8, 9), ADA, 31.5),
    _card("RTX 4070 Ti Super 16G", 15.6, 672, 88.2, 44.1, (8, 9), GEFORCE, 31.5),
    _card("RTX 4080 16G", 15.6, 717, 97.5, 48.7, (8, 9), ADA, 31.5),
    _card("RTX 4090 24G", 23.6, 1008, 165.2, 82.6, (8, 9), ADA, 31.5),
    _card("RTX 5060 Ti 16G", 15.4, 448, 47.4, 23.7, (12, 0), GEFORCE, 31.5),
    _card("RTX 5070 12G", 11.5, 672, 61.7, 30.9, (12, 0), BLACKWELL, 63),
    _card("RTX 5070 Ti 16G", 15.4, 896, 87.9, 43.9, (12, 0), BLACKWELL, 63),
    _card("RTX 5080 16G", 15.4, 960, 112.6, 56.3, (12, 0), BLACKWELL, 63),
    _card("RTX 5090 32G", 31.3, 1792, 209.5, 104.8, (12, 0), BLACKWELL, 63),
    _card("RTX A6000 48G", 47.4, 768, 154.8, 38.7, (8, 6), AMPERE, 31.5),
    _card("RTX 6000 Ada 48G", 44.4, 960, 364.2, 91.1, (8, 9), ADA, 31.5),
    _card("L4 24G", 22, 300, 121, 30.3, (8, 9), "NVIDIA's L4 datasheet", 31.5),
    _card("L40S 48G", 44.4, 864, 362, 91.6, (8, 9), "NVIDIA's L40S datasheet", 31.5),
    _card("A10G 24G", 22, 600, 70, 31.5, (8, 6), "NVIDIA's A10G datasheet", 31.5),
    _card("A100 40G", 39.4, 1555, 312, 19.5, (8, 0), "NVIDIA's A100 datasheet (SXM)", 300),
    _card("A100 80G", 79.1, 2039, 312, 19.5, (8, 0), "NVIDIA's A100 datasheet (SXM)", 300),
    _card("H100 PCIe 80G", 79.1, 2000, 756, 51, (9, 0), "NVIDIA's H100 datasheet (PCIe)", 63),
    _card("H100 80G", 79.1, 3350, 989, 67, (9, 0), "NVIDIA's H100 datasheet (SXM)", 450),
    _card("H200 141G", 139.8, 4800, 989, 67, (9, 0), "NVIDIA's H200 datasheet", 450),
    _card("B200 180G", 178, 8000, 2250, 75, (10, 0), "NVIDIA's HGX B200 datasheet", 900),
]
"""Cards by name. Memory is what torch reports on Linux, in messages that users posted: up to 8 % less than named. The
link is that in one direction: NVLink for SXM, otherwise PCI Express with the generation and the lanes of the card."""


def find_device(text: str | None) -> Device:
    """Return the device that a user or a recipe names: a card, `cuda:24GiB`, cpu, cuda; None or auto: this machine's.

    Raises:
        InputError: it is not known; the message lists the names.
    """
    if text in (None, "auto"):
        return _here()
    assert text is not None
    if text == "cpu" or text.startswith("cpu:"):
        size = text.partition(":")[2]
        return _cpu() if not size else Device(text, "cpu", parse_size(size, text))
    if re.fullmatch(r"cuda(:\d+)?", text, re.ASCII):
        if torch.cuda.is_available():
            return _here()
        raise InputError(
            f"--device: torch finds no {text} here to plan for: name a card, as in 4090, or its memory, as in "
            "cuda:24GiB."
        )
    if text.startswith("cuda:"):
        return Device(text, "cuda", parse_size(text[5:], text), source="memory as given")
    wanted = _plain(text)
    found = [card for card in CARDS if wanted in (_plain(card.name), _plain(card.name.rpartition(" ")[0]))]
    found = found or [card for card in CARDS if len(wanted) > 2 and _plain(card.name).startswith(wanted)]
    if not found:
        names = {_plain(card.name): card.name for card in CARDS}
        near = [names[name] for name in difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)]
        rest = [name for name in names.values() if name not in near]
        closest = f" Closest: {', '.join(near)}. Others: " if near else " Known: "
        raise InputError(
            f"--device: '{shorten(text)}' is not known.{closest}{', '.join(rest)}; or give the memory, as in "
            "cuda:24GiB."
        )
    return found[-1]


def parse_size(text: str, whole: str) -> int:
    """Return a size such as 24GiB, 24G or 24000MB in bytes; G and M alone are binary.

    Raises:
        InputError: it is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([gm])(i?b?)", text.strip().lower(), re.ASCII)
    if match is None or float(match[1]) <= 0:
        raise InputError(f"--device: '{shorten(whole)}': give a size such as 24GiB.")
    base = 1000 if match[3] == "b" else 1024
    return int(float(match[1]) * base ** (3 if match[2] == "g" else 2))


def parse_link(text: str) -> float:
    """Return a bandwidth such as 16GB/s, 900MB/s, 12GiB/s or 100Gbit/s in bytes per second.

    Raises:
        InputError: it is not a bandwidth.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([GM])(B|iB|bit)(?:/s)?", text.strip(), re.ASCII)
    if match is None or float(match[1]) <= 0:
        raise InputError(f"--link: '{shorten(text)}': give a bandwidth such as 16GB/s, 900MB/s or 100Gbit/s.")
    base = 1024 if match[3] == "iB" else 1000
    return float(match[1]) * base ** (3 if match[2] == "G" else 2) / (8 if match[3] == "bit" else 1)


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|[^a-z0-9]", "", name.lower())


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


def card_of(name: str, memory: int) -> Device | None:
    """Return the card of the table for a GPU's full name and bytes of memory; None for others, and for laptops'."""
    full = _plain(name)
    found = [card for card in CARDS if _plain(card.name.rpartition(" ")[0]) in full and "laptop" not in full]
    return max(found, key=lambda card: (len(_plain(card.name)), -abs(card.memory - memory)), default=None)


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
    rates = {DTYPES[name]: rate for name, rate in measurement.rates.items()}
    return replace(
        device, bandwidth=measurement.bandwidth, rates=rates, source=source, launch=measurement.launch,
        dequantize=measurement.dequantize, measured=True,
    )  # fmt: skip

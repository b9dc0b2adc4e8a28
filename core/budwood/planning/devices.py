"""Devices to plan for: memory, bandwidth and rates of matrix products, from a table or measured here."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

import torch

from budwood.errors import InputError, did_you_mean
from budwood.model.machine import host_memory
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
    """

    name: str
    kind: str
    memory: int
    bandwidth: float | None = None
    rates: dict[torch.dtype, float] = field(default_factory=dict)
    capability: tuple[int, int] = (8, 0)
    source: str = ""

    def precision(self, wanted: str) -> torch.dtype:
        """Return the compute dtype for `train.precision`, by the rules of a run on this device."""
        names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        return names.get(wanted) or (torch.bfloat16 if self.capability >= (8, 0) else torch.float16)


def _card(
    name: str, gib: float, bandwidth: float, half: float, single: float, capability: tuple[int, int], source: str
) -> Device:
    """Make a row: memory in GiB, bandwidth in GB/s, rates in TFLOP/s (16 bit with fp32 sums and without sparsity)."""
    rates = {torch.float16: half * 1e12, torch.bfloat16: half * 1e12, torch.float32: single * 1e12}
    return Device(name, "cuda", int(gib * GIB), bandwidth * 1e9, rates, capability, source)


AMPERE, ADA = "NVIDIA's GA102 whitepaper", "NVIDIA's Ada whitepaper"
CARDS = [
    _card("T4 16G", 15, 320, 65, 8.1, (7, 5), "NVIDIA's T4 datasheet"),
    _card("RTX 3060 12G", 12, 360, 25.6, 12.7, (8, 6), AMPERE),
    _card("RTX 3090 24G", 24, 936, 71, 35.6, (8, 6), AMPERE),
    _card("RTX 4060 Ti 16G", 16, 288, 44, 22.1, (8, 9), ADA),
    _card("RTX 4080 16G", 16, 717, 97.5, 48.7, (8, 9), ADA),
    _card("RTX 4090 24G", 24, 1008, 165.2, 82.6, (8, 9), ADA),
    _card("RTX 5090 32G", 32, 1792, 209.5, 104.8, (12, 0), "NVIDIA's Blackwell RTX whitepaper"),
    _card("L4 24G", 22.5, 300, 121, 30.3, (8, 9), "NVIDIA's L4 datasheet"),
    _card("A10G 24G", 22.5, 600, 70, 31.5, (8, 6), "NVIDIA's A10 datasheet"),
    _card("A100 40G", 40, 1555, 312, 19.5, (8, 0), "NVIDIA's A100 datasheet"),
    _card("A100 80G", 80, 2039, 312, 19.5, (8, 0), "NVIDIA's A100 datasheet"),
    _card("L40S 48G", 45, 864, 181, 91.6, (8, 9), "NVIDIA's L40S datasheet"),
    _card("H100 80G", 79.6, 3350, 989, 67, (9, 0), "NVIDIA's H100 datasheet (SXM)"),
    _card("H200 141G", 140, 4800, 989, 67, (9, 0), "NVIDIA's H200 datasheet"),
]
"""Cards by name. Memory is what the driver reports."""


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
        names = [card.name for card in CARDS]
        raise InputError(
            f"--device: '{shorten(text)}' is not known.{did_you_mean(text, names)} Known: {', '.join(names)}; or give "
            "the memory, as in cuda:24GiB."
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


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|[^a-z0-9]", "", name.lower())


def _here() -> Device:
    if not torch.cuda.is_available():
        return _cpu()
    properties = torch.cuda.get_device_properties(0)
    name, capability = properties.name, (properties.major, properties.minor)
    known = next((card for card in reversed(CARDS) if _plain(card.name.rpartition(" ")[0]) in _plain(name)), None)
    if known is None:
        return Device(name, "cuda", properties.total_memory, capability=capability, source="this machine")
    return Device(
        name, "cuda", properties.total_memory, known.bandwidth, known.rates, capability, f"this machine; {known.source}"
    )


def _cpu() -> Device:
    """Return this machine's CPU, measured for a fraction of a second."""
    rates = {dtype: _rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    rates[torch.float16] = rates[torch.float32]
    source = torch.ones(1 << 24)
    target = torch.empty_like(source)
    seconds = _best(lambda: target.copy_(source))
    name = f"this CPU, {torch.get_num_threads()} threads"
    return Device(name, "cpu", host_memory(), 2 * source.nbytes / seconds, rates, (0, 0), "measured just now")


def _rate(dtype: torch.dtype, size: int = 512) -> float:
    a = torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / _best(lambda: torch.mm(a, a))


def _best(function: object) -> float:
    """Return the shortest of five times that a call took, in seconds."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        function()  # type: ignore[operator]
        times.append(time.perf_counter() - started)
    return max(min(times), 1e-9)

"""What options of `budwood plan` and `tune --fit` name: devices, sizes, bandwidths, changes. Imports no torch."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field

from budwood.errors import InputError, did_you_mean
from budwood.untrusted.redaction import shorten

CHANGES = ("optimizer", "quantization", "rank", "max_length")
"""Settings that change what a run learns, in the order in which they are tried: what changes least first."""
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
        rates: floating-point operations per second of dense products with fp32 sums, by precision; empty: unknown.
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
    rates: dict[str, float] = field(default_factory=dict)
    capability: tuple[int, int] = (8, 0)
    source: str = ""
    launch: float | None = None
    dequantize: float | None = None
    link: float | None = None
    measured: bool = False


def _card(
    name: str, gib: float, bandwidth: float, half: float, single: float, capability: tuple[int, int], source: str,
    link: float,
) -> Device:  # fmt: skip
    """Make a row: memory in GiB, bandwidth and link in GB/s, rates in TFLOP/s.

    Rates are those in 16 bit with fp32 sums and without sparsity, and those in fp32.
    """
    bf16 = half if capability >= (8, 0) else single
    rates = {"fp16": half * 1e12, "bf16": bf16 * 1e12, "fp32": single * 1e12}
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


def named_device(text: str, option: str = "--device") -> Device | None:
    """Return the device that a name alone tells: a card, or memory as in cuda:24GiB or cpu:8GiB.

    Returns:
        None for auto, cpu, cuda and cuda:N: one of this machine's.

    Raises:
        InputError: it is not known; the message lists the names.
    """
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", text, re.ASCII):
        return None
    kind, colon, size = text.partition(":")
    if colon and kind in ("cpu", "cuda"):
        return Device(text, kind, parse_size(size, text, option), source="memory as given" if kind == "cuda" else "")
    wanted = _plain(text)
    found = [card for card in CARDS if wanted in (_plain(card.name), _plain(card.name.rpartition(" ")[0]))]
    found = found or [card for card in CARDS if len(wanted) > 2 and _plain(card.name).startswith(wanted)]
    if not found:
        names = {_plain(card.name): card.name for card in CARDS}
        near = [names[name] for name in difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)]
        rest = [name for name in names.values() if name not in near]
        closest = f" Closest: {', '.join(near)}. Others: " if near else " Known: "
        raise InputError(
            f"{option}: '{shorten(text)}' is not known.{closest}{', '.join(rest)}; or give the memory, as in "
            "cuda:24GiB."
        )
    return found[-1]


def fit_name(text: str, kind: str) -> str:
    """Return what `--fit` names as a device's name: memory such as 24GiB is that of a kind of device."""
    return f"{kind}:{text}" if text[:1].isdigit() and text[-1:] in "bBgGmM" else text


def allowed(text: str) -> set[str]:
    """Return the names in the value of `--allow`.

    Raises:
        InputError: one is not known.
    """
    names = {name.strip() for name in text.split(",") if name.strip()}
    for name in sorted(names - set(CHANGES)):
        raise InputError(f"--allow: '{name}' is not known.{did_you_mean(name, CHANGES)} Known: {', '.join(CHANGES)}.")
    return names


def parse_size(text: str, whole: str, option: str = "--device") -> int:
    """Return a size such as 24GiB, 24G or 24000MB in bytes; G and M alone are binary.

    Raises:
        InputError: it is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([gm])(i?b?)", text.strip().lower(), re.ASCII)
    if match is None or float(match[1]) <= 0:
        raise InputError(f"{option}: '{shorten(whole)}': give a size such as 24GiB.")
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


def card_of(name: str, memory: int) -> Device | None:
    """Return the card of the table for a GPU's full name and bytes of memory; None for others, and for laptops'."""
    full = _plain(name)
    found = [card for card in CARDS if _plain(card.name.rpartition(" ")[0]) in full and "laptop" not in full]
    return max(found, key=lambda card: (len(_plain(card.name)), -abs(card.memory - memory)), default=None)

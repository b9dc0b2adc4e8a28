"""Measures a device for plans: rates of matrix products, memory bandwidth, dequantisation, cost of an operation.

`budwood doctor --measure` keeps the result in `$BUDWOOD_CACHE/measured` (`~/.cache/budwood/measured` if not set), one
file per kind of device. It holds for the machine, threads and versions that it was taken with.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from budwood.errors import describe
from budwood.model.machine import host_memory
from budwood.model.quiet import hide_hub_kernels
from budwood.untrusted.files import complete_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {"cpu": 2048, "cuda": 8192}
"""Largest width of the square matrices that are multiplied."""
SECONDS, BRIEF = 2.0, 0.1
"""Seconds that each measurement repeats for: if it is kept (with growing matrices and warming up, all stay below a
minute), and if it is not."""
REPEATS = 40
"""Times that a product should be possible in these seconds; larger matrices are tried until it takes as long."""
BUFFER = 1 << 28
"""Bytes that are copied for the bandwidth: more than a processor's caches hold; a quarter if it is brief."""
LAYERS = 16
OPERATIONS = 8 * LAYERS + 1
"""Layers of a network whose operations cost almost nothing but their launch; operations of its step, views left out."""


@dataclass(frozen=True)
class Measurement:
    """Rates that a device reached.

    Attributes:
        rates: floating-point operations per second of matrix products, by precision; one that fails is absent.
        bandwidth: bytes per second that a copy reads and writes.
        dequantize: bytes per second that NF4's dequantisation to bf16 reads and writes; None: not measured.
        launch: seconds per operation of a small network's forward and backward pass, autograd included.
        day: date, as in 2025-01-31.
        seconds: time the measurement took.
    """

    rates: dict[str, float]
    bandwidth: float
    dequantize: float | None
    launch: float
    day: str
    seconds: float

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e12:,.3g} TFLOP/s" for name, rate in self.rates.items())
        four = f", NF4 dequantisation {self.dequantize / 1e9:,.3g} GB/s" if self.dequantize else ""
        return (
            f"products {rates}; memory {self.bandwidth / 1e9:,.3g} GB/s{four}; {self.launch * 1e6:,.1f} µs an operation"
        )


def measure(kind: str, seconds: float = SECONDS) -> Measurement:
    """Measure the CPU or the current CUDA device, in less than a minute.

    Args:
        kind: cpu or cuda.
        seconds: how long each single measurement repeats; dequantisation is left out if it is less than `SECONDS`.
    """
    device, started, rates = torch.device(kind), time.perf_counter(), {}
    for name, dtype in DTYPES.items():
        try:
            rates[name] = _rate(dtype, device, seconds)
        except RuntimeError:  # a device without this dtype
            continue
    return Measurement(
        rates, _bandwidth(device, seconds), None if seconds < SECONDS else _dequantize(device, seconds),
        _launch(device, seconds),
        time.strftime("%Y-%m-%d"), round(time.perf_counter() - started, 1),
    )  # fmt: skip


def _rate(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Return the FLOP/s of a square product that takes long enough for launches not to matter."""
    width, limit, enough = 256, SIZES[device.type], seconds / REPEATS
    while True:
        a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        torch.mm(a, b)
        once = _repeat(lambda: torch.mm(a, b), device, 0)  # noqa: B023  # called at once
        if once >= enough or width >= limit:
            break
        width = min(limit, width * (2 if once > enough / 8 else 4))
    return 2 * width**3 / _repeat(lambda: torch.mm(a, b), device, seconds)


def _bandwidth(device: torch.device, seconds: float) -> float:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory()
    size = BUFFER if seconds >= SECONDS else BUFFER // 4
    source = torch.ones(max(min(size, free // 8) // 4, 1), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _repeat(lambda: target.copy_(source), device, seconds)


def _dequantize(device: torch.device, seconds: float) -> float | None:
    """Return the bytes per second of bitsandbytes' dequantisation of a 4,096 x 4,096 weight; None if it fails."""
    try:
        hide_hub_kernels()
        from bitsandbytes import functional

        weight = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        moved = packed.nbytes + state.absmax.nbytes + weight.nbytes
        return moved / _repeat(lambda: functional.dequantize_4bit(packed, state), device, seconds)
    except Exception:  # absent, or without kernels for this device
        return None


def _launch(device: torch.device, seconds: float) -> float:
    """Return the seconds per operation of a network so small that only launching them costs time."""
    network, inputs = tiny_network().to(device), torch.ones(4, 8, device=device)

    def step() -> None:
        network(inputs).sum().backward()
        network.zero_grad()

    step()
    return _repeat(step, device, seconds) / OPERATIONS


def tiny_network() -> nn.Module:
    """Return the network whose step has `OPERATIONS` operations."""
    return nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(8, 8), nn.SiLU(), nn.LayerNorm(8))))


def _repeat(function: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Return the first quartile of the times of a call, repeated for `seconds`, but at least three times.

    Other processes only make a call slower.
    """
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return max(sorted(times)[len(times) // 4], 1e-9)


def conditions(kind: str) -> dict[str, str]:
    """Return what a measurement holds for: the device, and the versions of what computes on it."""
    versions = {"torch": str(torch.__version__)}
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["bitsandbytes"] = metadata.version("bitsandbytes")
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return {"device": properties.name, "memory": str(properties.total_memory), **versions}
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "device": _processor(), "instructions": capability, "threads": str(torch.get_num_threads()), **versions,
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {os.cpu_count()} cores" if names else f"{platform.processor()}, {os.cpu_count()} cores"


def folder() -> Path:
    """`$BUDWOOD_CACHE/measured`, or `~/.cache/budwood/measured`."""
    root = os.environ.get("BUDWOOD_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "budwood") / "measured"


def keep(kind: str, measurement: Measurement) -> Path:
    """Write a measurement of this machine, in place of an earlier one; returns its file.

    Raises:
        ResourceError: it cannot be written.
    """
    path = folder() / f"{kind}.json"
    with contextlib.suppress(OSError):  # writing says why
        path.parent.mkdir(parents=True, exist_ok=True)
    values = {"conditions": conditions(kind), "measurement": asdict(measurement)}
    complete_file(path, (json.dumps(values, indent=2) + "\n").encode())
    return path


def kept(kind: str) -> tuple[Measurement | None, str]:
    """Return the kept measurement if it holds here and now, and why it does not; None and "" if none is kept."""
    path = folder() / f"{kind}.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        before, measurement = values["conditions"], Measurement(**values["measurement"])
        numbers = [measurement.bandwidth, measurement.launch, *measurement.rates.values(), measurement.dequantize or 1]
        if not measurement.rates or not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError("a value is not a positive number")
        now = conditions(kind)
        differs = [
            f"{key} {before.get(key)} then, {value} now" for key, value in now.items() if before.get(key) != value
        ]
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return None, f"{path} is ignored: {describe(error)}"
    if differs:
        return None, f"the measurement of {measurement.day} is ignored: {'; '.join(differs)}"
    return measurement, ""


__all__ = ["Measurement", "conditions", "folder", "keep", "kept", "measure", "tiny_network"]

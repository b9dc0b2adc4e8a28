"""The cost of traced operations on a device, by a roofline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from budwood.planning.measurement import DTYPES
from budwood.planning.options import Device
from budwood.planning.trace import Operation

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""Precisions, as in the rates of a device, by dtype."""
LAUNCH = {"cuda": (10e-6, 60e-6), "cpu": (2e-6, 20e-6)}
"""Seconds that the host needs for an operation with its Python, at best and at worst."""
SHARES = (0.85, 0.5)
"""Share of a device's rates and bandwidth on paper that operations reach, at best and at worst."""
MEASURED_SHARES, MEASURED_LAUNCHES = (1.0, 0.6), (1.0, 3.0)
"""Share of measured rates, and times of the measured cost of an operation, at best and at worst."""


@dataclass(frozen=True)
class Cost:
    """Cost of operations: floating-point operations, bytes moved, their number, and seconds at best and at worst."""

    flops: float = 0.0
    moved: float = 0.0
    operations: float = 0.0
    best: float = 0.0
    worst: float = 0.0

    def plus(self, other: Cost, factor: float = 1.0) -> Cost:
        """Return this cost and `factor` times another."""
        return Cost(*(a + factor * b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def times(self, factor: float) -> Cost:
        """Return `factor` times this cost."""
        return Cost().plus(self, factor)

    def with_traffic(self, received: float, device: Device) -> Cost:
        """Return this cost and that of `received` bytes from other processes, if the device's link is known.

        On CUDA they arrive, at best, while it computes.
        """
        best, worst = travel(received, device.link)
        return replace(
            self, best=max(self.best, best) if device.kind == "cuda" else self.best + best, worst=self.worst + worst
        )

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds at best and at worst."""
        return self.best, self.worst


def travel(size: float, link: float | None) -> tuple[float, float]:
    """Return the seconds that bytes take over a link, at best and at worst; 0 if its bandwidth is not known."""
    if not link:
        return 0.0, 0.0
    best, worst = (size / (link * share) for share in SHARES)
    return best, worst


def costs_of_step(operations: Sequence[Operation], device: Device) -> tuple[Cost, Cost]:
    """Return the cost of the end of a step, and of its micro-batches."""
    parts = [[op for op in operations if op.in_pass is inside] for inside in (False, True)]
    end, passes = (cost_of(part, device) for part in parts)
    return end, passes


def cost_of(operations: Sequence[Operation], device: Device) -> Cost:
    """Sum operations by a roofline: each takes as long as its products or its traffic, whichever is slower.

    On CUDA the host hands over operations while the device computes, so the slower of both counts.
    """
    shares, launches, times = SHARES, LAUNCH[device.kind], []
    if device.measured and device.launch is not None:
        best, worst = MEASURED_LAUNCHES
        shares, launches = MEASURED_SHARES, (best * device.launch, worst * device.launch)
    for share, launch in zip(shares, launches, strict=True):
        busy = 0.0
        for op in operations:
            rate = device.rates.get(NAMES.get(op.dtype, "")) or next(iter(device.rates.values()), 0.0)
            products = op.flops / (rate * share) if rate else 0.0
            bandwidth = device.dequantize if op.name == "dequantize_4bit" and device.dequantize else device.bandwidth
            busy += max(products, op.moved / (bandwidth * share) if bandwidth else 0.0)
        hosted = launch * len(operations)
        times.append(busy + hosted if device.kind == "cpu" else max(busy, hosted))
    flops, moved = sum(op.flops for op in operations), sum(op.moved for op in operations)
    return Cost(float(flops), float(moved), float(len(operations)), *times)


def cost_line(
    points: list[tuple[int, Cost]], operations: Sequence[Operation], device: Device
) -> Callable[[float], Cost]:  # fmt: skip
    """Return the cost of a micro-batch by its positions: the line through one or two rehearsed ones.

    Through a single one, all but the dequantisation of weights is taken as proportional to the positions.

    Args:
        points: positions and cost of the rehearsed micro-batches.
        operations: of the last one.
    """
    (first, cost), *more = points
    if more:
        second, other = more[0]
        each, start = cost.plus(other, -1.0).times(1 / (first - second)), other
        return lambda cells: start.plus(each, cells - second)
    fixed = cost_of([op for op in operations if op.in_pass and op.name.startswith("dequantize")], device)
    rest = cost.plus(fixed, -1.0)
    return lambda cells: fixed.plus(rest, cells / first)

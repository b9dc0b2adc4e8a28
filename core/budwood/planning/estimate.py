"""Estimates what a recipe needs: memory by what holds it, time, disk, and whether it fits a device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from budwood.errors import InputError
from budwood.model.checkpoint import would_fetch
from budwood.model.device import planned_device
from budwood.planning.devices import CONTEXT, GIB, Device
from budwood.planning.rehearsal import ADAPTERS, BASE, GRADIENTS, OPTIMIZER, QUANTIZED, Micro, Rehearsal, rehearse
from budwood.planning.synthetic import synthetic
from budwood.planning.trace import KEPT, TEMPORARY, Operation, Peak
from budwood.recipe.schema import Recipe
from budwood.training.on_policy import find_generator
from budwood.training.sampling import TIMES

QUICK = 8.0
"""Seconds of a rehearsed step up to which a second micro-batch is rehearsed; beyond it, its cost is scaled."""
LIBRARIES = int(0.6e9)
"""Bytes of the host that Python and its libraries take: 0.54 GiB in a small run on Linux."""
LAUNCH = {"cuda": (10e-6, 60e-6), "cpu": (2e-6, 20e-6)}
"""Seconds that the host needs for an operation with its Python, at best and at worst."""
SHARES = (0.85, 0.5)
"""Share of a device's rates and bandwidth on paper that operations reach, at best and at worst."""
MEASURED_SHARES, MEASURED_LAUNCHES = (1.0, 0.6), (1.0, 3.0)
"""Share of measured rates, and times of the measured cost of an operation, at best and at worst."""


@dataclass
class Estimate:
    """What a recipe needs; `as_dict` is the part of `budwood plan --json`.

    Attributes:
        peak: bytes at the peak; on CUDA with the context.
        parts: bytes at the peak by what holds them.
        where: where in the step the peak stands.
        largest: the largest temporary tensor at the peak: its bytes, and the operation that made it.
        kv_cache: bytes of keys and values while a batch of answers is generated, 0 if none is.
        flops, moved, operations: of an optimizer step.
        tokens: of an optimizer step.
        micro_batches: of an optimizer step.
        largest_micro: tokens of the largest micro-batch.
        steps: optimizer steps of the run; None: unknown without data.
        seconds: of the run, at best and at worst, without evaluations and generation; None: unknown.
        disk, download, host: bytes.
        planned_in: seconds.
    """

    device: Device
    peak: int
    parts: dict[str, int]
    where: str
    largest: tuple[int, str]
    kv_cache: int
    flops: float
    moved: float
    operations: float
    tokens: float
    micro_batches: float
    largest_micro: int
    steps: int | None
    seconds: tuple[float, float] | None
    disk: int
    download: int
    host: int
    planned_in: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def needed(self) -> int:
        """Bytes of the device's memory: the peak; on the CPU with the libraries."""
        return self.host if self.device.kind == "cpu" else self.peak

    @property
    def fits(self) -> bool:
        """Whether the device has that much memory."""
        return self.needed <= self.device.memory

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        rate = None
        if self.seconds is not None and self.steps:
            rate = [self.tokens * self.steps / seconds for seconds in reversed(self.seconds)]
        device = {"name": self.device.name, "kind": self.device.kind, "memory_bytes": self.device.memory}
        return {
            "device": {**device, "source": self.device.source},
            "memory": {
                "peak_bytes": self.peak, "parts": self.parts, "where": self.where,
                "largest_temporary": {"bytes": self.largest[0], "operation": self.largest[1]},
                "kv_cache_bytes": self.kv_cache,
            },
            "step": {
                "flops": self.flops, "bytes": self.moved, "operations": self.operations, "tokens": self.tokens,
                "micro_batches": self.micro_batches, "largest_micro_batch": self.largest_micro,
            },
            "time": {
                "seconds": None if self.seconds is None else list(self.seconds), "steps": self.steps,
                "tokens_per_second": rate,
            },
            "disk": {"bytes": self.disk, "download_bytes": self.download},
            "host": {"peak_bytes": self.host},
            "fits": self.fits,
            "planned_in_seconds": self.planned_in,
            "notes": self.notes,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any], device: Device) -> Estimate:
        """Undo `as_dict`."""
        memory, step, disk, run_time = values["memory"], values["step"], values["disk"], values["time"]
        largest = memory["largest_temporary"]
        return cls(
            device, memory["peak_bytes"], memory["parts"], memory["where"], (largest["bytes"], largest["operation"]),
            memory["kv_cache_bytes"], step["flops"], step["bytes"], step["operations"], step["tokens"],
            step["micro_batches"], step["largest_micro_batch"], run_time["steps"],
            None if run_time["seconds"] is None else tuple(run_time["seconds"]), disk["bytes"],
            disk["download_bytes"], values["host"]["peak_bytes"], values["planned_in_seconds"],
            values["notes"],
        )  # fmt: skip


@dataclass(frozen=True)
class _Cost:
    """Cost of a part of a step."""

    flops: float = 0.0
    moved: float = 0.0
    operations: float = 0.0
    best: float = 0.0
    worst: float = 0.0

    def plus(self, other: _Cost, factor: float = 1.0) -> _Cost:
        return _Cost(*(a + factor * b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


def estimate(recipe: Recipe, device: Device, tokens: int | None = None) -> Estimate:
    """Estimate what a recipe needs on a device, by running its step on fake tensors. Use it in a process of its own.

    Args:
        tokens: plan micro-batches of this many tokens, all with a loss, without reading data; None: the data decides.

    Raises:
        BudwoodError: as `rehearse`.
    """
    started, notes = time.perf_counter(), []
    if tokens is not None:
        recipe, note = synthetic(recipe, tokens)
        notes.append(note)
    dtype = device.precision(recipe.train.precision)
    if device.kind == "cpu":
        from budwood.model.machine import pick_device_precision

        dtype = pick_device_precision("cpu", recipe.train.precision)[1]
    cuda = device.kind == "cuda"
    with planned_device(device.kind, device.capability), rehearse(recipe, dtype, cuda) as rehearsal:
        result = _estimate(rehearsal, device, tokens is not None, notes)
    result.planned_in = time.perf_counter() - started
    return result


def _estimate(rehearsal: Rehearsal, device: Device, without_data: bool, notes: list[str]) -> Estimate:
    run, trace = rehearsal.run, rehearsal.trace
    notes += [note for note in run.base.notes if note != "fake"]
    micros = [micro for step in rehearsal.steps for micro in step]
    if not micros:
        raise InputError("the data has no example to plan a step with.")
    largest = max(micros, key=lambda micro: (micro.cells, micro.labels))
    several = any(len(step) > 1 for step in rehearsal.steps)
    twice = several and rehearsal.engine.step_terms.active  # its first passes exist only with several micro-batches
    began = time.perf_counter()
    start = rehearsal.take_step([largest, largest] if twice else [largest], later=several)
    peak = trace.peak(start)
    end, passes = _costs(trace.operations, device)
    points = [(largest.cells * (2 if twice else 1), passes)]
    middle = sorted(micros, key=lambda micro: micro.cells)[len(micros) // 2]
    if time.perf_counter() - began < QUICK and middle.cells < 0.9 * largest.cells and not twice:
        rehearsal.take_step([middle])
        points.append((middle.cells, _costs(trace.operations, device)[1]))
    mean = _Cost()
    for step in rehearsal.steps:
        for micro in step:
            mean = mean.plus(_at(points, micro.cells, trace.operations, device), 1 / len(rehearsal.steps))
        mean = mean.plus(end, 1 / len(rehearsal.steps))
    steps = None if without_data and run.recipe.train.steps is None else run.steps
    parts, allocated = dict(peak.parts), peak.total
    cache, where = _kv_cache(rehearsal), peak.where
    answering = sum(parts.get(name, 0) for name in (QUANTIZED, BASE, ADAPTERS, OPTIMIZER, "strategies")) + cache
    if cache and answering > allocated:
        parts = {**{k: v for k, v in parts.items() if k not in (GRADIENTS, KEPT, TEMPORARY)}, "KV cache": cache}
        allocated, where = answering, "generation of answers"
    if device.kind == "cuda":
        parts["CUDA's context"] = CONTEXT
        allocated += CONTEXT
    train = sum(p.numel() * p.element_size() for p in run.trainable)
    host = LIBRARIES + _snapshot(train, parts) + (allocated if device.kind == "cpu" else 2 * _largest_weight(rehearsal))
    known = bool(device.rates and device.bandwidth)
    return Estimate(
        device, allocated, dict(sorted(parts.items(), key=lambda item: -item[1])), where, peak.largest, cache,
        mean.flops, mean.moved, mean.operations, float(np.mean([sum(m.tokens for m in s) for s in rehearsal.steps])),
        float(np.mean([len(step) for step in rehearsal.steps])), largest.tokens, steps,
        (mean.best * steps, mean.worst * steps) if known and steps is not None else None,
        _disk(run, train), _download(rehearsal), host, 0.0, notes,
    )  # fmt: skip


def _costs(operations: Sequence[Operation], device: Device) -> tuple[_Cost, _Cost]:
    """Return the cost of the end of a step, and of its micro-batches."""
    parts = [[op for op in operations if op.in_pass is inside] for inside in (False, True)]
    end, passes = (_cost(part, device) for part in parts)
    return end, passes


def _cost(operations: Sequence[Operation], device: Device) -> _Cost:
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
            rate = device.rates.get(op.dtype) or next(iter(device.rates.values()), 0.0)
            products = op.flops / (rate * share) if rate else 0.0
            bandwidth = device.dequantize if op.name == "dequantize_4bit" and device.dequantize else device.bandwidth
            busy += max(products, op.moved / (bandwidth * share) if bandwidth else 0.0)
        hosted = launch * len(operations)
        times.append(busy + hosted if device.kind == "cpu" else max(busy, hosted))
    flops, moved = sum(op.flops for op in operations), sum(op.moved for op in operations)
    return _Cost(float(flops), float(moved), float(len(operations)), *times)


def _at(points: list[tuple[int, _Cost]], cells: int, operations: Sequence[Operation], device: Device) -> _Cost:
    """Return the cost of a micro-batch, on the line through the rehearsed ones.

    After a single rehearsal, all but the dequantisation of weights is taken as proportional to the positions.
    """
    (first, cost), *more = points
    if more:
        second, other = more[0]
        return other.plus(cost.plus(other, -1.0), (cells - second) / (first - second))
    fixed = _cost([op for op in operations if op.in_pass and op.name.startswith("dequantize")], device)
    return fixed.plus(cost.plus(fixed, -1.0), cells / first)


def _kv_cache(rehearsal: Rehearsal) -> int:
    """Return the bytes of keys and values of the largest batch of generated answers; 0 if the run generates none."""
    run = rehearsal.run
    answers = run.eval_examples is not None and run.recipe.train.eval_generate > 0
    if not run.model.can_generate() or not (answers or find_generator(run.hooks) is not None):
        return 0
    config = run.model.config.get_text_config()
    queries = int(getattr(config, "num_attention_heads", None) or 1)
    heads = int(getattr(config, "num_key_value_heads", None) or queries)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // queries)
    each = 2 * int(getattr(config, "num_hidden_layers", None) or 0) * heads * size * run.dtype.itemsize
    return each * TIMES * run.recipe.train.micro_tokens


def _snapshot(train: int, parts: dict[str, int]) -> int:
    """Return the host's bytes of a checkpoint being written, the initial and the best parameters."""
    return 2 * train + parts.get(OPTIMIZER, 0)


def _largest_weight(rehearsal: Rehearsal) -> int:
    return max(parameter.numel() for parameter in rehearsal.run.model.parameters()) * rehearsal.run.dtype.itemsize


def _disk(run: Any, train: int) -> int:
    """Return the bytes of the checkpoints and the adapter, as `Saver.check_space` counts them."""
    evaluates = run.eval_examples is not None
    return (3 * train + train * evaluates) * (run.recipe.train.keep_checkpoints + 1 + evaluates) + train


def _download(rehearsal: Rehearsal) -> int:
    run = rehearsal.run
    if not would_fetch(run.recipe.base.model):
        return 0
    stored = getattr(run.model.config, "dtype", None) or run.dtype
    return run.base.parameters * int(getattr(stored, "itemsize", 2))


def advice(result: Estimate, recipe: Recipe) -> str:
    """Return what to change if an estimate does not fit, after the part that holds most of what can change."""
    parts = result.parts
    work = parts.get(KEPT, 0) + parts.get(TEMPORARY, 0)
    weights = parts.get(BASE, 0) + parts.get(QUANTIZED, 0)
    trained = sum(parts.get(name, 0) for name in (ADAPTERS, GRADIENTS, OPTIMIZER))
    if weights >= max(work, trained):
        if recipe.base.quantization == "none":
            return "set base.quantization: nf4, or take a smaller base"
        return "take a smaller base, or a device with more memory"
    if trained > work:
        return "lower the adapter's rank, or adapt fewer layers"
    if not recipe.train.gradient_checkpointing:
        return "set train.gradient_checkpointing: true, or lower train.micro_tokens"
    return f"lower train.micro_tokens (the largest micro-batch has {result.largest_micro:,}), or data.max_length"


def refusal(result: Estimate, recipe: Recipe) -> str:
    """Return the message for a recipe that does not fit: the largest part, and what to change."""
    part, size = next(iter(result.parts.items()))
    change = advice(result, recipe)
    if result.needed - result.peak > size:
        part, size, change = "libraries and copies on the host", result.needed - result.peak, "make memory free"
    return (
        f"memory: the run needs {gib(result.needed)}, and {result.device.name} has {gib(result.device.memory)}; "
        f"{gib(size)} are {part}: {change}."
    )


def gib(size: float) -> str:
    """Return a size in GiB, or in MiB if it is small."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.1f} MiB"


__all__ = ["Estimate", "Micro", "Peak", "advice", "estimate", "gib", "refusal"]

"""Estimates what a recipe needs: memory by what holds it, time, disk, and whether it fits a device."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from budwood.contract.discovery import installed
from budwood.errors import InputError
from budwood.model.checkpoint import missing_weights
from budwood.model.device import planned_device
from budwood.model.ops import kernels
from budwood.model.quantizers.room import dequantized_bytes, room_in
from budwood.model.recompute import layers_of
from budwood.planning.cost import Cost, cost_line, costs_of_step, travel
from budwood.planning.devices import precision
from budwood.planning.layers import choose_layers
from budwood.planning.options import GIB, Device
from budwood.planning.peak import CONTEXT_PART, LIBRARIES, Measured, measure
from budwood.planning.rehearsal import (
    ADAPTERS,
    BASE,
    GRADIENTS,
    OPTIMIZER,
    QUANTIZED,
    Micro,
    Rehearsal,
    rehearse,
)
from budwood.planning.sharding import Exchange
from budwood.planning.sizes import choose
from budwood.planning.synthetic import synthetic
from budwood.planning.trace import KEPT, TEMPORARY, Peak
from budwood.recipe.device import check_device
from budwood.recipe.schema import Recipe
from budwood.training.recompute import settled

COMPACT = "compact-optimizer"
"""What a strategy provides whose optimizer keeps its states in less memory than AdamW."""
QUICK = 8.0
"""Seconds of a rehearsed step up to which a second micro-batch is rehearsed; beyond it, its cost is scaled."""


@dataclass
class Estimate:
    """What a recipe needs; `as_dict` is the part of `budwood plan --json`.

    Attributes:
        peak: bytes at the peak; on CUDA with the context.
        parts: bytes at the peak by what holds them.
        where: where in the step the peak stands.
        largest: the largest temporary tensor at the peak: its bytes, and the operation that made it.
        kv_cache: bytes of keys and values while a batch of answers is generated, 0 if none is.
        flops, moved, operations: of an optimizer step, in one process.
        tokens: of an optimizer step, in all processes.
        micro_batches: of an optimizer step, in one process.
        largest_micro: tokens of the largest micro-batch.
        micro_tokens: the limit on micro-batches, as the recipe gives it, or as it was chosen.
        recomputed, layers: layers that recompute their activations, likewise, of all that can.
        offloaded: bytes of the host's memory that their inputs take.
        steps: optimizer steps of the run; None: unknown without data.
        seconds: of the run, at best and at worst; None: unknown.
        disk, download: bytes.
        host: bytes of the host's memory for loading and training.
        loading: bytes of the host's memory for loading alone.
        planned_in: seconds.
        evaluations: of the run.
        evaluation, generation: the shares of `seconds` that evaluations and the generation of answers take.
        exchange: what several processes hold and exchange; None: the run is one process.
        dequantized: bytes of the weights that a CPU would keep dequantised beside all that; see `kept`.
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
    loading: int = 0
    evaluations: int = 0
    evaluation: tuple[float, float] | None = None
    generation: tuple[float, float] | None = None
    micro_tokens: int = 0
    recomputed: int = 0
    layers: int = 0
    offloaded: int = 0
    exchange: Exchange | None = None
    dequantized: int = 0

    @property
    def needed(self) -> int:
        """Bytes of the device's memory: the peak; on the CPU with the libraries."""
        return self.host if self.device.kind == "cpu" else self.peak

    @property
    def gradient_checkpointing(self) -> bool | int:
        """The value of `train.gradient_checkpointing` for the layers that recompute."""
        return settled(self.recomputed, self.layers)

    @property
    def fits(self) -> bool:
        """Whether the device has that much memory."""
        return self.needed <= self.device.memory

    @property
    def kept(self) -> int:
        """Bytes of the weights that a CPU keeps dequantised, in a part of the memory that is free."""
        return min(self.dequantized, room_in(self.device.memory - self.needed))

    @property
    def training(self) -> tuple[float, float] | None:
        """Seconds of the optimizer steps alone, at best and at worst."""
        if self.seconds is None:
            return None
        others = [(self.evaluation or (0.0, 0.0))[i] + (self.generation or (0.0, 0.0))[i] for i in range(2)]
        return self.seconds[0] - others[0], self.seconds[1] - others[1]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        training, rate = self.training, None
        if training is not None and self.steps:
            rate = [self.tokens * self.steps / seconds for seconds in reversed(training)]
        device = {"name": self.device.name, "kind": self.device.kind, "memory_bytes": self.device.memory}
        return {
            "device": {**device, "source": self.device.source},
            "memory": {
                "peak_bytes": self.peak, "parts": self.parts, "where": self.where,
                "largest_temporary": {"bytes": self.largest[0], "operation": self.largest[1]},
                "kv_cache_bytes": self.kv_cache, "dequantized_weights_bytes": self.dequantized,
                "kept_weights_bytes": self.kept,
            },
            "step": {
                "flops": self.flops, "bytes": self.moved, "operations": self.operations, "tokens": self.tokens,
                "micro_batches": self.micro_batches, "largest_micro_batch": self.largest_micro,
                "micro_tokens": self.micro_tokens, "recomputed_layers": self.recomputed, "layers": self.layers,
            },
            "time": {
                "seconds": _listed(self.seconds), "training_seconds": _listed(training),
                "evaluation_seconds": _listed(self.evaluation), "generation_seconds": _listed(self.generation),
                "evaluations": self.evaluations, "steps": self.steps, "tokens_per_second": rate,
            },
            "disk": {"bytes": self.disk, "download_bytes": self.download},
            "host": {
                "peak_bytes": self.host, "loading_bytes": self.loading, "offloaded_bytes": self.offloaded,
            },
            "processes": None if self.exchange is None else self.exchange.as_dict(),
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
            _pair(run_time["seconds"]), disk["bytes"],
            disk["download_bytes"], values["host"]["peak_bytes"], values["planned_in_seconds"],
            values["notes"], values["host"]["loading_bytes"], run_time["evaluations"],
            _pair(run_time["evaluation_seconds"]), _pair(run_time["generation_seconds"]), step["micro_tokens"],
            step["recomputed_layers"], step["layers"], values["host"]["offloaded_bytes"],
            None if values["processes"] is None else Exchange.from_dict(values["processes"]),
            memory["dequantized_weights_bytes"],
        )  # fmt: skip


def _listed(pair: tuple[float, float] | None) -> list[float] | None:
    return None if pair is None else list(pair)


def _pair(values: list[float] | None) -> tuple[float, float] | None:
    return None if values is None else (values[0], values[1])


def estimate(recipe: Recipe, device: Device, tokens: int | None = None, processes: int = 1) -> Estimate:
    """Estimate what a recipe needs on a device, by running its step on fake tensors. Use it in a process of its own.

    Args:
        device: of each process.
        processes: of the run. If the recipe leaves `train.parallel` open, they shard a base that does not fit else.
        tokens: plan micro-batches of this many tokens, all with a loss, without reading data; None: the data decides.

    Raises:
        BudwoodError: as `rehearse`.
    """
    started, notes = time.perf_counter(), []
    with ExitStack() as stack:
        if tokens is not None:
            recipe, note = stack.enter_context(synthetic(recipe, tokens))
            notes.append(note)
        result = _rehearsed(recipe, device, tokens is not None, notes, processes)
    result.planned_in = time.perf_counter() - started
    return result


def _rehearsed(recipe: Recipe, device: Device, without_data: bool, notes: list[str], processes: int) -> Estimate:
    check_device(recipe, device.kind)
    kernels.compile_ops(recipe.train.compile)
    dtype = precision(device, recipe.train.precision)
    if device.kind == "cpu":
        from budwood.model.machine import pick_device_precision

        dtype = pick_device_precision("cpu", recipe.train.precision)[1]
    cuda = device.kind == "cuda"
    planned = planned_device(device.kind, device.capability, device.memory)
    with planned, rehearse(recipe, dtype, cuda, processes) as rehearsal:
        return _estimate(rehearsal, device, without_data, notes)


def _estimate(rehearsal: Rehearsal, device: Device, without_data: bool, notes: list[str]) -> Estimate:
    run, trace = rehearsal.run, rehearsal.trace
    notes += [note for note in run.base.notes if note != "fake"]
    micros = [micro for step in rehearsal.steps for micro in step]
    if not micros:
        raise InputError("the data has no example to plan a step with.")
    steps = None if without_data and run.recipe.train.steps is None else run.steps
    parallel = run.recipe.train.parallel if rehearsal.processes > 1 else "replicate"
    if parallel == "shard":
        rehearsal.gathering.shard()
    memory = _choose(rehearsal, device, steps)
    if memory.needed > device.memory and parallel is None and rehearsal.can_shard:
        rehearsal.gathering.shard()
        memory = _choose(rehearsal, device, steps)
    micros = [micro for step in rehearsal.steps for micro in step]
    largest, end, passes = memory.largest, memory.end, memory.passes
    points = [(largest.cells * memory.times, passes)]
    middle = sorted(micros, key=lambda micro: micro.cells)[len(micros) // 2]
    if memory.seconds < QUICK and middle.cells < 0.9 * largest.cells and memory.times == 1:
        rehearsal.take_step([middle])
        points.append((middle.cells, costs_of_step(trace.operations, device)[1]))
    mean, at = Cost(), cost_line(points, memory.operations, device)
    own = [rehearsal.own(len(step)) for step in rehearsal.steps]
    for step, count in zip(rehearsal.steps, own, strict=True):
        for micro in step:
            mean = mean.plus(at(micro.cells), count / len(step) / len(rehearsal.steps))
        mean = mean.plus(end, 1 / len(rehearsal.steps))
    exchange = _exchange(rehearsal, device, memory, float(np.mean(own)))
    if exchange is not None:
        best, worst = travel(exchange.reduced, device.link)  # nothing computes meanwhile
        mean = mean.with_traffic(exchange.received, device).plus(Cost(best=best, worst=worst))
    train = sum(p.numel() * p.element_size() for p in run.trainable)
    others = memory.others
    known = bool(device.rates and device.bandwidth) and steps is not None
    cost = mean.times(steps or 0).plus(others.evaluation).plus(others.generation)
    keeps = device.kind == "cpu" and run.recipe.base.keep_dequantized and not rehearsal.gathering.active
    return Estimate(
        device, memory.allocated, dict(sorted(memory.parts.items(), key=lambda item: -item[1])), memory.where,
        memory.temporary, memory.cache, mean.flops, mean.moved, mean.operations,
        float(np.mean([sum(m.tokens for m in s) for s in rehearsal.steps])),
        float(np.mean(own)), largest.tokens, steps,
        cost.seconds if known else None, _disk(run, train), _download(rehearsal), memory.host, 0.0, notes,
        memory.loading, others.evaluations, others.evaluation.seconds if known else None,
        others.generation.seconds if known else None, run.micro_tokens, rehearsal.recomputed,
        len(layers_of(run.model)), memory.offloaded, exchange,
        dequantized_bytes(run.model, run.dtype) if keeps else 0,
    )  # fmt: skip


def _choose(rehearsal: Rehearsal, device: Device, steps: int | None) -> Measured:
    """Settle what the recipe leaves open of the size of micro-batches and of the layers that recompute."""
    train = rehearsal.run.recipe.train

    def measured() -> Measured:
        return measure(rehearsal, device, steps)

    if train.gradient_checkpointing == "auto":
        return choose_layers(rehearsal, device, measured, train.micro_tokens is None)
    if train.micro_tokens is None:
        return choose(rehearsal, device.kind, device.memory, measured)
    return measured()


def _exchange(rehearsal: Rehearsal, device: Device, memory: Measured, micro_batches: float) -> Exchange | None:
    """Return what the processes of a rehearsed run hold and exchange; None if it is one.

    Args:
        micro_batches: of a process in an optimizer step.
    """
    count, gathering = rehearsal.processes, rehearsal.gathering
    if count == 1:
        return None
    others, run = 1 - 1 / count, rehearsal.run
    reduced = 2 * others * sum(p.nbytes for p in run.trainable)
    received = others * memory.complete * micro_batches
    best, worst = travel(reduced + received, device.link)
    parts = memory.parts
    share = gathering.sharded.total - sum(gathering.absent()) if gathering.active else 0
    trained = parts.get(ADAPTERS, 0) + parts.get(OPTIMIZER, 0) + sum(p.nbytes for p in run.trainable)
    return Exchange(
        count, "shard" if gathering.active else "replicate", run.recipe.train.parallel is None, share,
        parts.get(QUANTIZED, 0) + parts.get(BASE, 0) - share, gathering.gathered if gathering.active else 0, trained,
        reduced, received, memory.gathers * micro_batches, device.link, (best, worst) if device.link else None,
    )  # fmt: skip


def _disk(run: Any, train: int) -> int:
    """Return the bytes of the checkpoints and the adapter, as `Saver.check_space` counts them."""
    evaluates = run.eval_examples is not None
    return (3 * train + train * evaluates) * (run.recipe.train.keep_checkpoints + 1 + evaluates) + train


def _download(rehearsal: Rehearsal) -> int:
    """Return the bytes of a hub base's weights that are not in the hub's cache; small files are there by now."""
    run = rehearsal.run
    if Path(run.recipe.base.model).expanduser().is_dir():
        return 0
    missing, size = missing_weights(run.base.path)
    if not missing:
        return 0
    stored = getattr(run.model.config, "dtype", None) or run.dtype
    return size or run.base.parameters * int(getattr(stored, "itemsize", 2))


def compact_optimizer() -> str | None:
    """Return the installed strategy whose optimizer keeps its states in less memory; the first of several."""
    names = [name for name, entries in installed().items() if COMPACT in entries[0].declared("provides")]
    return min(names, default=None)


def fixed(result: Estimate) -> int:
    """Return the bytes of the device's memory that no setting changes: libraries, on CUDA its context."""
    return LIBRARIES if result.device.kind == "cpu" else result.parts.get(CONTEXT_PART, 0)


def advice(result: Estimate, recipe: Recipe) -> str:
    """Return what to change if an estimate does not fit: the step's work if that can be enough, or the largest part."""
    parts = result.parts
    if fixed(result) > result.device.memory:
        return f"libraries alone take {gib(fixed(result))}: take a device with more memory"
    work = parts.get(KEPT, 0) + parts.get(TEMPORARY, 0)
    weights = parts.get(BASE, 0) + parts.get(QUANTIZED, 0)
    trained = sum(parts.get(name, 0) for name in (ADAPTERS, GRADIENTS, OPTIMIZER))
    saved = work * (0.8 if result.recomputed < result.layers else 0.5)  # by recomputing, or by half a micro-batch
    loading = result.loading if result.device.kind == "cpu" else 0
    is_enough = max(result.needed - saved, loading) <= result.device.memory
    if weights >= max(work, trained) and not is_enough:
        if recipe.base.quantization == "none":
            return "set base.quantization: nf4, or take a smaller base"
        return "take a smaller base, or a device with more memory"
    if trained > work and not is_enough:
        optimizer = compact_optimizer() if 3 * parts.get(OPTIMIZER, 0) > trained else None
        other = f"add the strategy {optimizer}, " if optimizer else ""
        return f"{other}lower the adapter's rank, or adapt fewer layers"
    if result.recomputed < result.layers:
        return "set train.gradient_checkpointing: true, or lower train.micro_tokens"
    if result.layers and result.device.kind == "cuda" and not recipe.train.activation_offloading:
        return "set train.activation_offloading: true, or lower train.micro_tokens"
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

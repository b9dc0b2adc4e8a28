"""Estimates what a recipe needs: memory by what holds it, time, disk, and whether it fits a device."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from budwood.contract.discovery import installed
from budwood.contract.types import Run
from budwood.errors import InputError
from budwood.model.checkpoint import missing_weights
from budwood.model.device import planned_device
from budwood.model.recompute import layers_of
from budwood.planning.cost import Cost, cost_line, costs_of_step
from budwood.planning.devices import CONTEXT, GIB, Device
from budwood.planning.layers import choose_layers
from budwood.planning.passes import Passes, rehearse_passes
from budwood.planning.rehearsal import ADAPTERS, BASE, GRADIENTS, OPTIMIZER, QUANTIZED, Micro, Rehearsal, rehearse
from budwood.planning.sizes import choose
from budwood.planning.synthetic import synthetic
from budwood.planning.trace import KEPT, ROUNDING, TEMPORARY, Operation, Peak
from budwood.recipe.schema import Recipe
from budwood.training.recompute import check_device, settled

CONTEXT_PART = "CUDA's context"
COMPACT = "compact-optimizer"
"""What a strategy provides whose optimizer keeps its states in less memory than AdamW."""
QUICK = 8.0
"""Seconds of a rehearsed step up to which a second micro-batch is rehearsed; beyond it, its cost is scaled."""
LIBRARIES = int(0.6e9)
"""Bytes of the host that Python and its libraries take: 0.54 GiB in a small run on Linux."""


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
                "kv_cache_bytes": self.kv_cache,
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
        )  # fmt: skip


def _listed(pair: tuple[float, float] | None) -> list[float] | None:
    return None if pair is None else list(pair)


def _pair(values: list[float] | None) -> tuple[float, float] | None:
    return None if values is None else (values[0], values[1])


def estimate(recipe: Recipe, device: Device, tokens: int | None = None) -> Estimate:
    """Estimate what a recipe needs on a device, by running its step on fake tensors. Use it in a process of its own.

    Args:
        tokens: plan micro-batches of this many tokens, all with a loss, without reading data; None: the data decides.

    Raises:
        BudwoodError: as `rehearse`.
    """
    started, notes = time.perf_counter(), []
    with ExitStack() as stack:
        if tokens is not None:
            recipe, note = stack.enter_context(synthetic(recipe, tokens))
            notes.append(note)
        result = _rehearsed(recipe, device, tokens is not None, notes)
    result.planned_in = time.perf_counter() - started
    return result


def _rehearsed(recipe: Recipe, device: Device, without_data: bool, notes: list[str]) -> Estimate:
    check_device(recipe, device.kind)
    dtype = device.precision(recipe.train.precision)
    if device.kind == "cpu":
        from budwood.model.machine import pick_device_precision

        dtype = pick_device_precision("cpu", recipe.train.precision)[1]
    cuda = device.kind == "cuda"
    with planned_device(device.kind, device.capability), rehearse(recipe, dtype, cuda) as rehearsal:
        return _estimate(rehearsal, device, without_data, notes)


def _estimate(rehearsal: Rehearsal, device: Device, without_data: bool, notes: list[str]) -> Estimate:
    run, trace = rehearsal.run, rehearsal.trace
    notes += [note for note in run.base.notes if note != "fake"]
    micros = [micro for step in rehearsal.steps for micro in step]
    if not micros:
        raise InputError("the data has no example to plan a step with.")
    steps = None if without_data and run.recipe.train.steps is None else run.steps
    sized = run.recipe.train.micro_tokens is None
    if run.recipe.train.gradient_checkpointing == "auto":
        memory = choose_layers(rehearsal, device, lambda: _measure(rehearsal, device, steps), sized)
    elif sized:
        memory = choose(rehearsal, device.kind, device.memory, lambda: _measure(rehearsal, device, steps))
    else:
        memory = _measure(rehearsal, device, steps)
    micros = [micro for step in rehearsal.steps for micro in step]
    largest, end, passes = memory.largest, memory.end, memory.passes
    points = [(largest.cells * memory.times, passes)]
    middle = sorted(micros, key=lambda micro: micro.cells)[len(micros) // 2]
    if memory.seconds < QUICK and middle.cells < 0.9 * largest.cells and memory.times == 1:
        rehearsal.take_step([middle])
        points.append((middle.cells, costs_of_step(trace.operations, device)[1]))
    mean, at = Cost(), cost_line(points, memory.operations, device)
    for step in rehearsal.steps:
        for micro in step:
            mean = mean.plus(at(micro.cells), 1 / len(rehearsal.steps))
        mean = mean.plus(end, 1 / len(rehearsal.steps))
    train = sum(p.numel() * p.element_size() for p in run.trainable)
    others = memory.others
    known = bool(device.rates and device.bandwidth) and steps is not None
    cost = mean.times(steps or 0).plus(others.evaluation).plus(others.generation)
    return Estimate(
        device, memory.allocated, dict(sorted(memory.parts.items(), key=lambda item: -item[1])), memory.where,
        memory.temporary, memory.cache, mean.flops, mean.moved, mean.operations,
        float(np.mean([sum(m.tokens for m in s) for s in rehearsal.steps])),
        float(np.mean([len(step) for step in rehearsal.steps])), largest.tokens, steps,
        cost.seconds if known else None, _disk(run, train), _download(rehearsal), memory.host, 0.0, notes,
        memory.loading, others.evaluations, others.evaluation.seconds if known else None,
        others.generation.seconds if known else None, run.micro_tokens, rehearsal.recomputed,
        len(layers_of(run.model)), memory.offloaded,
    )  # fmt: skip


@dataclass(frozen=True)
class _Measured:
    """The memory of a run, and the cost of a step of its largest micro-batch; see `Estimate`."""

    largest: Micro
    times: int
    """How often the micro-batch was in the step."""
    end: Cost
    passes: Cost
    operations: list[Operation]
    seconds: float
    others: Passes
    allocated: int
    parts: dict[str, int]
    where: str
    temporary: tuple[int, str]
    cache: int
    host: int
    loading: int
    needed: int
    offloaded: int

    @property
    def work(self) -> int:
        return self.parts.get(KEPT, 0) + self.parts.get(TEMPORARY, 0) + self.parts.get("KV cache", 0)

    @property
    def tokens(self) -> int:
        return self.largest.tokens


def _measure(rehearsal: Rehearsal, device: Device, steps: int | None) -> _Measured:
    """Rehearse a step of the largest micro-batch, and what a run does beside its steps."""
    run, trace = rehearsal.run, rehearsal.trace
    largest = max((m for step in rehearsal.steps for m in step), key=lambda micro: (micro.cells, micro.labels))
    several = any(len(step) > 1 for step in rehearsal.steps)
    twice = several and rehearsal.engine.step_terms.active  # its first passes exist only with several micro-batches
    began, trace.host_peak = time.perf_counter(), 0
    start = rehearsal.take_step([largest, largest] if twice else [largest], later=several)
    peak = trace.peak(start)
    seconds = time.perf_counter() - began
    operations = list(trace.operations)
    end, passes = costs_of_step(operations, device)
    others = rehearse_passes(rehearsal, device, steps or 1)
    if others.peak is not None and others.peak.total > peak.total:
        peak = replace(others.peak, where=f"evaluation, {others.peak.where}")
    parts, allocated = dict(peak.parts), peak.total
    cache, where = others.cached_tokens * _token_bytes(run), peak.where
    answering = sum(parts.get(name, 0) for name in (QUANTIZED, BASE, ADAPTERS, OPTIMIZER, "strategies")) + cache
    if cache and answering > allocated:
        parts = {
            **{k: v for k, v in parts.items() if k not in (GRADIENTS, KEPT, TEMPORARY, ROUNDING)},
            "KV cache": cache,
        }
        allocated, where = answering, "generation of answers"
    if device.kind == "cuda":
        parts[CONTEXT_PART] = CONTEXT
        allocated += CONTEXT
    train = sum(p.numel() * p.element_size() for p in run.trainable)
    loading = LIBRARIES + 2 * _largest_weight(rehearsal)  # a tensor as stored, and its copy
    if device.kind == "cpu":
        loading += parts.get(BASE, 0) + parts.get(QUANTIZED, 0)
    beside = allocated if device.kind == "cpu" else trace.host_peak
    host = max(loading, LIBRARIES + _snapshot(train, parts) + beside)
    needed = host if device.kind == "cpu" else allocated
    return _Measured(
        largest, 2 if twice else 1, end, passes, operations, seconds, others, allocated, parts, where, peak.largest,
        cache, host, loading, needed, trace.host_peak,
    )  # fmt: skip


def _token_bytes(run: Run) -> int:
    """Return the bytes of the keys and values of a token."""
    config = run.model.config.get_text_config()
    queries = int(getattr(config, "num_attention_heads", None) or 1)
    heads = int(getattr(config, "num_key_value_heads", None) or queries)
    size = int(getattr(config, "head_dim", None) or (getattr(config, "hidden_size", None) or 0) // queries)
    return 2 * int(getattr(config, "num_hidden_layers", None) or 0) * heads * size * run.dtype.itemsize


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

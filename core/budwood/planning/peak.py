"""The peak of a rehearsed run's memory: of its step, its evaluations, its generation, and the exchange of gradients."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from budwood.contract.types import Run
from budwood.planning.cost import Cost, costs_of_step
from budwood.planning.options import CONTEXT, Device
from budwood.planning.passes import Passes, rehearse_passes
from budwood.planning.rehearsal import (
    ADAPTERS,
    BASE,
    GRADIENTS,
    OPTIMIZER,
    QUANTIZED,
    STRATEGIES,
    Micro,
    Rehearsal,
)
from budwood.planning.sharding import GATHERED, REDUCED
from budwood.planning.trace import KEPT, TEMPORARY, Operation, without_collection

CONTEXT_PART = "CUDA's context"
LIBRARIES = int(0.6e9)
"""Bytes of the host that Python and its libraries take: 0.54 GiB in a small run on Linux."""


@dataclass(frozen=True)
class Measured:
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
    gathers: float
    complete: float
    """All-gathers of layers in a micro-batch, and the bytes of the layers that they complete."""

    @property
    def work(self) -> int:
        return self.parts.get(KEPT, 0) + self.parts.get(TEMPORARY, 0) + self.parts.get("KV cache", 0)

    @property
    def tokens(self) -> int:
        return self.largest.tokens


def measure(rehearsal: Rehearsal, device: Device, steps: int | None) -> Measured:
    """Rehearse a step of the largest micro-batch, and what a run does beside its steps."""
    run, trace = rehearsal.run, rehearsal.trace
    largest = max((m for step in rehearsal.steps for m in step), key=lambda micro: (micro.cells, micro.labels))
    several = any(rehearsal.own(len(step)) > 1 for step in rehearsal.steps)
    twice = several and rehearsal.engine.step_terms.active  # its first passes exist only with several micro-batches
    with without_collection():
        began, trace.host_peak = time.perf_counter(), 0
        rehearsal.gathering.reset()
        start = rehearsal.take_step([largest, largest] if twice else [largest], later=several)
        peak = trace.peak(start)
        seconds = time.perf_counter() - began
    operations = list(trace.operations)
    end, passes = costs_of_step(operations, device)
    times, gathering = 2 if twice else 1, rehearsal.gathering
    gathers, complete = gathering.gathers / times, gathering.complete / times
    others = rehearse_passes(rehearsal, device, steps or 1)
    if others.peak is not None and others.peak.total > peak.total:
        peak = replace(others.peak, where=f"evaluation, {others.peak.where}")
    parts, allocated, where = dict(peak.parts), peak.total, peak.where
    train = sum(p.numel() * p.element_size() for p in run.trainable)
    for part, absent in zip((QUANTIZED, BASE), gathering.absent(), strict=True):
        parts[part], allocated = parts.get(part, 0) - absent, allocated - absent
    cache = others.cached_tokens * _token_bytes(run)
    lasting = {name: parts.get(name, 0) for name in (QUANTIZED, BASE, ADAPTERS, OPTIMIZER, STRATEGIES)}
    elsewhere = []
    if cache:
        complete_layers = {GATHERED: gathering.gathered} if gathering.active else {}
        elsewhere.append(("generation of answers", {**lasting, **complete_layers, "KV cache": cache}))
    if rehearsal.processes > 1:
        elsewhere.append((REDUCED, {**lasting, GRADIENTS: train, REDUCED: train}))
    for place, held in elsewhere:
        if sum(held.values()) > allocated:
            parts, allocated, where = held, sum(held.values()), place
    if device.kind == "cuda":
        parts[CONTEXT_PART] = CONTEXT
        allocated += CONTEXT
    loading = LIBRARIES + 2 * _largest_weight(rehearsal)  # a tensor as stored, and its copy
    if device.kind == "cpu":
        loading += parts.get(BASE, 0) + parts.get(QUANTIZED, 0)
    beside = allocated if device.kind == "cpu" else trace.host_peak
    host = max(loading, LIBRARIES + _snapshot(train, parts) + beside)
    needed = host if device.kind == "cpu" else allocated
    return Measured(
        largest, times, end, passes, operations, seconds, others, allocated, parts, where, peak.largest,
        cache, host, loading, needed, trace.host_peak, gathers, complete,
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

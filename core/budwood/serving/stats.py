"""What an engine tells of itself, for metrics and readiness."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from budwood.serving.engine import Engine
    from budwood.serving.loaded import Loaded

BLEND = "blend"
"""Stands for the identities of blends in `Stats.tokens`, of which requests can make any number."""


@dataclass(frozen=True)
class AdapterStats:
    """An adapter that has a name.

    Attributes:
        identity: hash of its content and of the base.
        names: its names.
        bytes: of its tensors, in memory or not.
        resident: whether they are in memory.
        pinned: whether they stay there.
        requests: number of requests and blends that keep it in memory.
        quarantined: why requests may not use it; "": they may.
    """

    identity: str
    names: tuple[str, ...]
    bytes: int
    resident: bool
    pinned: bool
    requests: int
    quarantined: str


@dataclass(frozen=True)
class Stats:
    """The state of an engine; a number called a count only grows.

    Attributes:
        alive: whether its thread runs, or was not needed yet.
        step_seconds: for how long the step in progress runs; 0: none does.
        rows: number of requests in flight.
        waiting: number of requests that wait for a row, for memory or for an adapter.
        steps: count of steps.
        preempted: count of rows that had to make room.
        quarantines: count of adapters that were quarantined.
        loads: count of adapters that were put in memory; evictions: that left it to make room.
        adapters: the adapters that have a name.
        adapter_bytes: of all adapters in memory.
        kv_bytes: of keys and values of rows; stack_bytes: of stacked adapters; prefix_bytes: of kept prefixes.
        prefix_hits: count of blocks of prompts that were not computed again.
        tokens: counts of tokens of prompts and of answers, by (identity, tenant); the base's identity is "".
    """

    alive: bool
    step_seconds: float
    rows: int
    waiting: int
    steps: int
    preempted: int
    quarantines: int
    loads: int
    evictions: int
    adapters: tuple[AdapterStats, ...]
    adapter_bytes: int
    kv_bytes: int
    stack_bytes: int
    prefix_bytes: int
    prefix_hits: int
    tokens: Mapping[tuple[str, str], tuple[int, int]]


def stats_of(engine: Engine) -> Stats:
    """Return the state of an engine, from any thread and without waiting for a step."""
    scheduler, residents, thread = engine.scheduler, engine.residents, engine.thread.current
    began = scheduler.began
    names: dict[Loaded, list[str]] = {}
    for name, loaded in list(engine.names.items()):
        names.setdefault(loaded, []).append(name)
    return Stats(
        alive=thread is None or thread.is_alive(),
        step_seconds=0.0 if began is None else time.monotonic() - began,
        rows=len(scheduler.rows),
        waiting=scheduler.waiting + engine.thread.waiting,
        steps=scheduler.steps,
        preempted=scheduler.preempted,
        quarantines=scheduler.quarantines,
        loads=residents.loads,
        evictions=residents.evictions,
        adapters=tuple(
            AdapterStats(
                loaded.identity, tuple(own), loaded.bytes, loaded.memory is not None, loaded.pinned,
                residents.requests[loaded], loaded.quarantined,
            )
            for loaded, own in names.items()
        ),
        adapter_bytes=residents.bytes,
        kv_bytes=scheduler.forward.cache.bytes(),
        stack_bytes=engine.table.stacks.bytes,
        prefix_bytes=engine.prefixes.bytes,
        prefix_hits=engine.prefixes.hits,
        tokens=dict(scheduler.tokens),
    )  # fmt: skip

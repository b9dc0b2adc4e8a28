"""Compares an adapter on the live engine with the logits that it had when it was saved."""

from __future__ import annotations

from functools import partial

import torch

from budwood.adapters.golden import Golden, measure
from budwood.adapters.store import GOLDEN, SavedAdapter
from budwood.contract.examples import Example
from budwood.errors import InputError
from budwood.model.task import Task
from budwood.serving.engine import Engine
from budwood.serving.verify import judge


def compare(engine: Engine, task: Task, key: str, saved: SavedAdapter, needed: bool) -> str:
    """Replay an adapter's golden logits, one probe between two steps of the engine, and return what was found.

    Args:
        task: the engine's.
        key: what the engine calls the adapter.
        needed: whether an adapter without golden logits is refused.

    Raises:
        InputError: it has none although they are needed, or the base is another one.
        CorruptError: it computes something else than when it was saved.
    """
    if saved.manifest is None or saved.manifest.golden is None:
        if needed:
            raise InputError(f"{saved.directory}: holds no golden logits to compare with; verify: hash accepts that.")
        return "holds no golden logits"
    golden = Golden.load(saved.directory / GOLDEN)

    def measured(adapter: bool) -> torch.Tensor:
        name = key if adapter else None
        rows = [engine.with_adapter(name, partial(_measure, engine, task, probe)) for probe in golden.probes]
        return torch.cat(rows)

    return f"as recorded ({judge(saved, golden, engine.base, task, measured).adapter})"


def _measure(engine: Engine, task: Task, probe: Example) -> torch.Tensor:
    return measure(task, engine.model, engine.tokenizer, [probe], engine.base.dtype)

"""What `budwood eval` measures on preference data: the metrics of the objective that trained the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from budwood.adapters.store import SavedAdapter
from budwood.contract.calls import ask_owner
from budwood.contract.loading import build_strategy, load_strategy
from budwood.contract.strategy import Strategy, hookimpl
from budwood.contract.types import Run
from budwood.errors import BudwoodError
from budwood.serving.pool import AdapterPool


class PooledAdapter(Strategy):
    """An adapter of a pool in the role of a run's adapter, which an objective disables for its reference."""

    api = 2
    slots = ("adapter",)

    def __init__(self, pool: AdapterPool, adapter: str) -> None:
        super().__init__(name="adapter")
        self.pool, self.adapter = pool, adapter

    @hookimpl
    def use_adapters(self, model: Any, names: Sequence[str], index: Sequence[int]) -> None:
        self.pool.use(self.adapter if names else None)


def objective_metrics(run: Run, pool: AdapterPool, adapter: str, saved: SavedAdapter) -> dict[str, float]:
    """Return the metrics of the objective of the adapter's run on `run.eval_examples`; none on data without a kind.

    Args:
        adapter: name in the pool of the adapter, which is in use.
        saved: the same adapter, whose manifest lists the strategies of its run.
    """
    holds = run.eval_examples.holds if run.eval_examples is not None else ""
    if not holds or holds in run.task.trains_on:  # a task of this kind of data has measured them
        return {}
    manifest = saved.manifest
    for record in manifest.strategies if manifest is not None else ():
        try:
            if holds not in load_strategy(str(record["name"]))[0].trains_on:
                continue
        except BudwoodError:  # not installed here
            continue
        objective = build_strategy(str(record["name"]), record.get("options") or {}, str(saved.directory))
        if objective.uses_reference == "start" and manifest is not None and manifest.parent is not None:
            run.say(f"note: {objective.name} compared with the adapter that its run continued, which is not known here")
            break
        run.strategies = [PooledAdapter(pool, adapter), objective]
        metrics: dict[str, float] = ask_owner(objective, "evaluate", run=run)
        return metrics
    run.say(f"note: of {holds} only the task's loss is measured, that of the answers to learn, not their order")
    return {}

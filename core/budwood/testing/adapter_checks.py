"""Checks for strategies that own an adapter: save and load, merge, detach."""

from __future__ import annotations

from budwood.adapters.golden import TOLERANCE, threads
from budwood.adapters.live import module_ids
from budwood.errors import BudwoodError
from budwood.serving.pool import AdapterPool
from budwood.testing.bench import Bench, NotApplicable, PromiseBroken, Result, explain, implements
from budwood.testing.expect import expect_state
from budwood.testing.probe import distance, same_bytes, state_of, stored

MERGED = 1e-4
"""Largest allowed difference of a logit between a merged and an attached adapter, relative to the largest logit."""


def save_and_load(bench: Bench) -> None:
    """Check that a saved adapter, loaded on the base, reproduces the logits after training."""
    promise = "save → load → same logits"
    result = bench.run(promise)
    for how, table in _ways(bench).items():
        pool, _ = _pool(bench, result, promise, table)
        pool.use("adapter")
        loaded = pool.logits(result.probe.prompts)
        gap, bound = distance(result.logits, loaded), TOLERANCE * max(1.0, float(result.logits.abs().max()))
        if not gap <= bound:
            raise PromiseBroken(
                f"{promise}: a logit of the {how} adapter differs from that of the trained one by {gap:.3g} "
                f"(at most {bound:.1g} allowed; the adapter itself changes logits by {_effect(result):.3g})."
            )


def merge(bench: Bench) -> None:
    """Check that the logits after merging into the unquantised fp32 base equal those of the attached adapter."""
    promise = "merged equals unmerged"
    if not bench.owns_adapter:
        raise NotApplicable("it owns no adapter")
    if not implements(bench.spec.strategy, "merge_adapter"):
        raise NotApplicable("it has no merge_adapter")
    result = bench.run(promise)
    pool, modules = _pool(bench, result, promise)
    pool.use("adapter")
    attached = pool.logits(result.probe.prompts)
    try:
        pool.merge("adapter")
    except BudwoodError as error:
        raise PromiseBroken(f"{promise}: merging failed with {explain(error)}") from error
    merged = pool.logits(result.probe.prompts)
    gap, bound = distance(attached, merged), MERGED * float(attached.abs().max())
    if not gap <= bound:
        raise PromiseBroken(
            f"{promise}: a logit of the merged model differs by {gap:.3g} (at most {bound:.1g} allowed; the adapter "
            f"itself changes logits by {_effect(result):.3g})."
        )
    if module_ids(pool.model) != modules:
        raise PromiseBroken(f"{promise}: after merging, the base still has {_other_modules(pool, modules)}.")


def off(bench: Bench) -> None:
    """Check that a disabled adapter gives the base's logits bitwise, and that detaching leaves no trace."""
    promise = "off restores the base bitwise"
    result = bench.run(promise)
    if result.off is None:
        raise NotApplicable("no strategy of its recipe owns an adapter")
    gap = distance(result.probe.base_logits, result.off)
    if gap or not same_bytes(result.probe.base_logits, result.off):
        raise PromiseBroken(
            f"{promise}: after training, with the adapter disabled, a logit differs from the base's by {gap:.3g}."
        )
    if not bench.owns_adapter:
        return
    for table in _ways(bench).values():
        _leaves_no_trace(bench, result, promise, table)


def _leaves_no_trace(bench: Bench, result: Result, promise: str, table: bool) -> None:
    prompts = result.probe.prompts
    pool = AdapterPool(
        str(bench.files.base), task=bench.spec.task, precision="fp32", device="cpu", labels=_labels(result),
        task_options=result.run.task.options.model_dump(mode="json", exclude_none=True),
    )  # fmt: skip
    pool.engine.loader.table_first = table
    with threads(1):
        before, state = pool.logits(prompts), state_of(pool.model)
        tensors = {name: (tensor, tensor.clone()) for name, tensor in stored(pool.model).items()}
        _load(pool, result, promise)
        pool.use("adapter")
        pool.logits(prompts)
        pool.use(None)
        gap = distance(before, pool.logits(prompts))
        if gap:
            raise PromiseBroken(f"{promise}: in a pool, with no active adapter, a logit differs by {gap:.3g}.")
        try:
            pool.unload("adapter")
        except BudwoodError as error:
            raise PromiseBroken(f"{promise}: detach_adapter: {explain(error)}") from error
        gap = distance(before, pool.logits(prompts))
    if gap:
        raise PromiseBroken(f"{promise}: after detach_adapter a logit differs by {gap:.3g}.")
    expect_state(f"{promise}: detach_adapter", state, state_of(pool.model))
    changed = [
        f"{name} by {distance(live, old):.3g}" for name, (live, old) in tensors.items() if not same_bytes(live, old)
    ]
    if changed:
        raise PromiseBroken(f"{promise}: detach_adapter left {len(changed)} tensors changed: {', '.join(changed[:3])}.")


def _ways(bench: Bench) -> dict[str, bool]:
    """Return how a pool loads the adapter: by the owner's entries for the table, if it has any, and attached."""
    return {"loaded": True, "attached": False} if implements(bench.spec.strategy, "live_adapter") else {"loaded": False}


def _effect(result: Result) -> float:
    return distance(result.logits, result.probe.base_logits)


def _labels(result: Result) -> list[str] | None:
    return list(result.run.examples.labels) or None


def _pool(bench: Bench, result: Result, promise: str, table: bool = True) -> tuple[AdapterPool, list[tuple[str, int]]]:
    """Return a pool with the run's adapter loaded, and the ids of the base's modules before loading."""
    if not result.adapter.is_dir():
        raise NotApplicable("no strategy of its recipe owns an adapter")
    pool = AdapterPool(
        str(bench.files.base), task=bench.spec.task, precision="fp32", device="cpu", labels=_labels(result),
        task_options=result.run.task.options.model_dump(mode="json", exclude_none=True),
    )  # fmt: skip
    pool.engine.loader.table_first = table
    modules = module_ids(pool.model)
    _load(pool, result, promise)
    return pool, modules


def _load(pool: AdapterPool, result: Result, promise: str) -> None:
    try:
        pool.load("adapter", result.adapter)
    except BudwoodError as error:
        raise PromiseBroken(f"{promise}: the saved adapter cannot be loaded: {explain(error)}") from error


def _other_modules(pool: AdapterPool, modules: list[tuple[str, int]]) -> str:
    paths = [path for path, identity in module_ids(pool.model) if (path, identity) not in set(modules)]
    return f"{len(paths)} other modules ({', '.join(paths[:2])})"

"""Memory that runs out in a step: the step begins again in smaller parts, or the run says what to change.

What it has done by then is undone first: gradients, sums of the loss terms, what was logged, what was drawn of the
streams of random numbers. So an optimizer step is the same however often it began.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from budwood.contract.calls import noted
from budwood.contract.discovery import PluginError
from budwood.contract.examples import Batch
from budwood.contract.registry import Composition
from budwood.contract.types import Run, Step
from budwood.errors import ResourceError, is_out_of_memory
from budwood.model.evaluation import does_not_fit
from budwood.model.streaming import release_memory
from budwood.training.batches import StepBatches
from budwood.training.step import Engine

_DONE = 1 << 62
REMEDIES = "lower train.micro_tokens or data.max_length, turn on train.gradient_checkpointing, or take a smaller base"


class TornStepError(ResourceError):
    """An optimizer ran out of memory when it had moved some parameters and not others: together they are no adapter."""


class DoesNotFitError(ResourceError):
    """One group of examples is more than memory holds; every process raises it in the same step."""


def accumulate(run: Run, hooks: Composition, engine: Engine, step: StepBatches) -> list[Batch]:
    """Add up the gradients of an optimizer step's micro-batches; returns these, as they were in the end.

    Where memory runs out, on whichever process, all of them begin the step again with micro-batches half as large as
    the one that failed, and keep to that size.

    Raises:
        ResourceError: memory does not even hold one group of examples.
    """
    logged = dict(run.logged)  # while the step's examples were made, which is not done again
    while True:
        limit = _agree(run, _passes(run, hooks, engine, step.batches))
        if limit == _DONE:
            return step.batches
        run.begin_step_again()
        run.logged |= logged
        engine.forget_step()
        release_memory()
        if limit == 0:
            alone = [b for b in step.batches if len(b.groups) == 1]
            keys = set(max(alone or step.batches, key=lambda batch: sum(batch.lengths)).keys)
            members = [int(i) for i in step.indices if step.examples.keys[int(i)] in keys]
            raise DoesNotFitError(f"step {run.step + 1}: {does_not_fit(run.recipe, step.examples, members)}")
        run.micro_tokens = limit
        run.say(
            f"step {run.step + 1}: out of memory: the step begins again, and from here on there are at most {limit:,} "
            f"tokens at once (train.micro_tokens: {limit})"
        )
        step = step.again(run)


def _passes(run: Run, hooks: Composition, engine: Engine, batches: Sequence[Batch]) -> int:
    """Run every micro-batch. Returns _DONE, or if one is too large half its tokens, 0 if it is one group.

    The error, and all that its frames hold on to, is gone by then.
    """
    ready: dict[int, Batch] = {}

    def look(index: int, batch: Batch) -> None:
        ready[index] = _prepared(run, hooks, batch)
        engine.step_terms.look(Step(run, ready[index], engine, index))

    def work(index: int, batch: Batch) -> None:
        prepared = ready.pop(index) if index in ready else _prepared(run, hooks, batch)
        step = Step(run, prepared, engine, index)
        engine.begin(step)
        engine.step_terms.restore_random(step)
        hooks.call("backward", step=step)

    if engine.step_terms.gathers(len(batches)):
        limit = _agree(run, _each(batches, look))  # the others would wait for one that runs out of memory
        if limit != _DONE:
            return limit
        engine.step_terms.exchange()
    return _each(batches, work)


def _each(batches: Sequence[Batch], work: Callable[[int, Batch], None]) -> int:
    at = 0
    try:
        for index, batch in enumerate(batches):
            at = index
            work(index, batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failed = batches[at]
        return failed.rows * failed.width // 2 if len(failed.groups) > 1 else 0
    return _DONE


def _prepared(run: Run, hooks: Composition, batch: Batch) -> Batch:
    """A micro-batch on its device, as the strategies' `prepare_batch` leave it.

    Raises:
        PluginError: they changed its counts, which the optimizer step's loss is divided by.
    """
    moved = prepared = batch.to(run.device)
    before = {**moved.counts, "labels": float(len(moved.labels))}
    weights, version = prepared.weights, prepared.weights._version  # a hook may write into the tensor it was given
    for plugin, prepared in hooks.follow("prepare_batch", "batch", moved, run=run):
        if prepared.weights is not weights or weights._version != version:
            weights, version = prepared.weights, prepared.weights._version
            prepared.total_weight = float(weights.sum(dtype=torch.float64))
        now = {**prepared.counts, "labels": float(len(prepared.labels))}
        for unit, count in before.items():
            if not abs(now[unit] - count) <= 1e-6 * max(abs(count), 1.0):
                raise PluginError(
                    f"{plugin}, hook prepare_batch: the batch now counts {now[unit]:g} of '{unit}', not {count:g}; "
                    "change the examples in prepare_examples, before they are counted."
                )
    return prepared


def _agree(run: Run, limit: int) -> int:
    """The smallest limit of all processes."""
    if run.processes > 1:
        least = torch.tensor(limit, dtype=torch.int64, device=run.device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        return int(least)
    return limit


def optimizer_step(run: Run, scaler: torch.amp.GradScaler) -> None:
    """Step the optimizer; where memory runs out before it has moved anything, once more.

    Raises:
        ResourceError: memory ran out again.
        TornStepError: it ran out halfway, or it cannot be told.
    """
    before = _versions(run.optimizer)
    if _stepped(run, scaler):
        return
    release_memory()
    text = f"step {run.step + 1}: out of memory in the optimizer: {REMEDIES}"
    # Others may write past torch's counters of changes.
    if not type(run.optimizer).__module__.startswith("torch.optim") or not _untouched(run.optimizer, before):
        raise TornStepError(text)
    for parameter in [p for p in run.optimizer.state if id(p) not in before[1]]:
        del run.optimizer.state[parameter]  # made in the attempt, perhaps half
    if not _stepped(run, scaler):
        raise ResourceError(text) if _untouched(run.optimizer, before) else TornStepError(text)
    run.say(f"step {run.step + 1}: out of memory in the optimizer; it went through at the second attempt")


def _stepped(run: Run, scaler: torch.amp.GradScaler) -> bool:
    try:
        scaler.step(run.optimizer)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


_Versions = tuple[list[int], dict[int, list[int]]]


def _versions(optimizer: Any) -> _Versions:
    """Torch's counters of changes in place: of the parameters, and of the states by parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {id(p): [v._version for v in s.values() if isinstance(v, Tensor)] for p, s in optimizer.state.items() if s}
    return [p._version for p in parameters], states


def _untouched(optimizer: Any, before: _Versions) -> bool:
    """Whether nothing has moved. States that are new have counted no step."""
    parameters, states = _versions(optimizer)
    new = [s for p, s in optimizer.state.items() if s and id(p) not in before[1]]
    return (
        parameters == before[0]
        and all(states.get(key) == versions for key, versions in before[1].items())
        and not any(float(state.get("step", 0)) for state in new)
    )


def explain_out_of_memory(run: Run, error: Exception) -> Exception:
    """The error itself, or where memory ran out elsewhere in a step a ResourceError with a remedy."""
    if not is_out_of_memory(error):
        return error
    what = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ResourceError(f"step {run.step + 1}: out of memory{noted(error)} ({what}): {REMEDIES}")

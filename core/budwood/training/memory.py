"""Out of memory in a training step: repeat the step with smaller micro-batches, or fail with a remedy.

A failed attempt is undone first: gradients, sums of the loss terms, logged values, and the state of random generators.
An optimizer step therefore gives the same result however often it is attempted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from budwood.contract.calls import noted
from budwood.contract.discovery import PluginError
from budwood.contract.examples import Batch
from budwood.contract.registry import Composition
from budwood.contract.types import Run, Step
from budwood.errors import ResourceError, is_out_of_memory
from budwood.model.device import device_type
from budwood.model.evaluation import does_not_fit
from budwood.model.streaming import release_memory
from budwood.training.batches import StepBatches
from budwood.training.step import Engine

_DONE = 1 << 62
IDLE = -1
"""Micro-step of a pass that only keeps up with the other processes."""
REMEDIES = "lower train.micro_tokens or data.max_length, turn on train.gradient_checkpointing, or take a smaller base"


class PartialStepError(ResourceError):
    """An optimizer ran out of memory after it had updated only some parameters, which leaves no valid adapter."""


class DoesNotFitError(ResourceError):
    """A single group of examples exceeds the memory; every process raises this in the same step."""


def accumulate(run: Run, hooks: Composition, engine: Engine, step: StepBatches) -> list[Batch]:
    """Accumulate the gradients of an optimizer step's micro-batches; returns the micro-batches as finally split.

    If any process runs out of memory, all processes repeat the step with micro-batches half the size of the one that
    failed, and keep that size from then on.

    Raises:
        ResourceError: a single group of examples exceeds the memory.
    """
    logged = dict(run.logged)  # values logged while the step's examples were generated, which is not repeated
    while True:
        limit = _minimum(run, _run_passes(run, hooks, engine, step.batches, step.idle))
        if limit == _DONE:
            return step.batches
        run.begin_step_again()
        run.logged |= logged
        engine.reset_step()
        release_memory()
        if limit == 0:
            alone = [b for b in step.batches if len(b.groups) == 1]
            keys = set(max(alone or step.batches, key=lambda batch: sum(batch.lengths)).keys)
            members = [int(i) for i in step.indices if step.examples.keys[int(i)] in keys]
            raise DoesNotFitError(f"step {run.step + 1}: {does_not_fit(run.recipe, step.examples, members)}")
        run.micro_tokens = limit
        run.say(
            f"step {run.step + 1}: out of memory: the step is repeated, from now on with at most {limit:,} tokens at "
            f"once (train.micro_tokens: {limit})"
        )
        step = step.split_again(run)


def _run_passes(
    run: Run, hooks: Composition, engine: Engine, batches: Sequence[Batch], idle: Batch | None = None
) -> int:
    """Run every micro-batch; before them, without an effect, the passes of `idle`.

    Returns _DONE, or half the tokens of the micro-batch that exceeded the memory; 0 if it is a single group. The error
    and the tensors that its frames hold are released by then.
    """
    ready: dict[int, Batch] = {}

    def collect(index: int, batch: Batch) -> None:
        ready[index] = _prepare(run, hooks, batch)
        engine.step_terms.collect(Step(run, ready[index], engine, index))

    def backward(index: int, batch: Batch) -> None:
        prepared = ready.pop(index) if index in ready else _prepare(run, hooks, batch)
        step = Step(run, prepared, engine, index)
        engine.step_terms.restore_reference(step)
        engine.begin(step)
        engine.step_terms.restore_random(step)
        with _adding_at_once(run) if at_once else nullcontext():
            hooks.call("backward", step=step)

    at_once = len(hooks.calls("backward")) == 1  # a wrapper sees the sum over the micro-batches so far
    catches = not run.sharded  # else the others wait for this process' part of a layer
    if engine.step_terms.needs_first_pass(len(batches)):
        if idle is not None:
            engine.step_terms.pass_by(Step(run, _prepare(run, hooks, idle), engine, IDLE))
        limit = _minimum(run, _for_each(batches, collect, catches))  # `exchange` would wait for a process that failed
        if limit != _DONE:
            return limit
        engine.step_terms.exchange()
    if idle is not None:
        backward(IDLE, idle)
        run.drop_gradients()
        engine.sums, engine.terms = {}, {}
    return _for_each(batches, backward, catches)


@contextmanager
def _adding_at_once(run: Run) -> Iterator[None]:
    """Add a micro-batch's gradients to those before it by one operation, where autograd would add each by itself.

    On a GPU each of these small sums costs the host as much time as a large product. A pass that fails in this context
    leaves no gradients, and its optimizer step begins again or ends the run.
    """
    before = [(p, p.grad) for p in run.trainable if p.grad is not None and device_type(p) == "cuda"]
    for parameter, _ in before:
        parameter.grad = None
    yield
    both = [(total, p.grad) for p, total in before if p.grad is not None]
    if both:
        torch._foreach_add_([total for total, _ in both], [added for _, added in both])
    for parameter, total in before:
        parameter.grad = total


def _for_each(batches: Sequence[Batch], function: Callable[[int, Batch], None], catches: bool) -> int:
    current = 0
    try:
        for index, batch in enumerate(batches):
            current = index
            function(index, batch)
    except Exception as error:
        if not is_out_of_memory(error) or not catches:
            raise
        failed = batches[current]
        return failed.rows * failed.width // 2 if len(failed.groups) > 1 else 0
    return _DONE


def _prepare(run: Run, hooks: Composition, batch: Batch) -> Batch:
    """Move a micro-batch to its device and apply the strategies' `prepare_batch`.

    Raises:
        PluginError: a strategy changed the counts, by which the optimizer step's loss is divided.
    """
    moved = prepared = batch.to(run.device)
    before = {**moved.counts, "labels": float(len(moved.labels))}
    weights, version = prepared.weights, prepared.weights._version  # a hook may also modify the tensor in place
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


def _minimum(run: Run, limit: int) -> int:
    """Return the smallest limit of all processes."""
    return min(run.world.gather(limit))


def optimizer_step(run: Run, scaler: torch.amp.GradScaler) -> None:
    """Step the optimizer; retry once if memory runs out before any parameter was updated.

    Raises:
        ResourceError: memory ran out again.
        PartialStepError: some parameters were updated, or that cannot be determined.
    """
    before = _versions(run.optimizer)
    if _try_step(run, scaler):
        return
    release_memory()
    text = f"step {run.step + 1}: out of memory in the optimizer: {REMEDIES}"
    # Optimizers outside torch may write without a change of torch's version counters.
    if not type(run.optimizer).__module__.startswith("torch.optim") or not _untouched(run.optimizer, before):
        raise PartialStepError(text)
    for parameter in [p for p in run.optimizer.state if id(p) not in before[1]]:
        del run.optimizer.state[parameter]  # created in the failed attempt, possibly incomplete
    if not _try_step(run, scaler):
        raise ResourceError(text) if _untouched(run.optimizer, before) else PartialStepError(text)
    run.say(f"step {run.step + 1}: out of memory in the optimizer; the second attempt succeeded")


def _try_step(run: Run, scaler: torch.amp.GradScaler) -> bool:
    try:
        scaler.step(run.optimizer)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


_Versions = tuple[list[int], dict[int, list[int]]]


def _versions(optimizer: Any) -> _Versions:
    """Return torch's version counters: of the parameters, and of the state tensors per parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {id(p): [v._version for v in s.values() if isinstance(v, Tensor)] for p, s in optimizer.state.items() if s}
    return [p._version for p in parameters], states


def _untouched(optimizer: Any, before: _Versions) -> bool:
    """Whether no parameter or state has changed; a new state may exist if it has counted no step."""
    parameters, states = _versions(optimizer)
    new = [s for p, s in optimizer.state.items() if s and id(p) not in before[1]]
    return (
        parameters == before[0]
        and all(states.get(key) == versions for key, versions in before[1].items())
        and not any(float(state.get("step", 0)) for state in new)
    )


def explain_out_of_memory(run: Run, error: Exception) -> Exception:
    """Return a ResourceError with a remedy for an out-of-memory error, and any other error unchanged."""
    if not is_out_of_memory(error):
        return error
    cause = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ResourceError(f"step {run.step + 1}: out of memory{noted(error)} ({cause}): {REMEDIES}")

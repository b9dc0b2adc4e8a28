"""The reference of objectives: the model as it was at the start of the run, or its base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor

from budwood.adapters.use import use_adapters
from budwood.contract.discovery import PluginError
from budwood.contract.examples import Batch
from budwood.contract.strategy import RUN_ADAPTER
from budwood.contract.types import Outputs, Reference, Run, Which
from budwood.data.examples import Examples
from budwood.data.packing import split_micro
from budwood.errors import InputError, ResourceError, is_out_of_memory
from budwood.model.evaluation import (
    at_least_fp32,
    autocast,
    collate_for,
    does_not_fit,
    extra_passes,
    from_all_processes,
    head_rows,
)
from budwood.model.streaming import release_memory

CACHED = "reference_log_probs"
"""Column of examples whose reference was computed before the first step."""


def is_off(run: Run, which: Which) -> bool:
    """Whether a reference is the model with its adapter off.

    So is the start of a run with a new adapter, unless that changes the base at once; then it shares its computation
    with the base.
    """
    return which == "base" or (run.start_adapter is None and run.only_adapter_trains and run.starts_as_base)


def read_reference(run: Run, batch: Batch, which: Which = "start") -> Reference:
    """Run a reference model on a batch, in a step or an evaluation; see `Step.reference`."""
    with as_reference(run, which):
        outputs = run.task.outputs(run.model, batch)
        hidden = outputs.hidden.flatten(0, -2)[batch.label_positions]
        log_probs = _label_log_probs(run, batch, outputs, hidden) if run.task.has_log_probs() else None

    def logits(positions: Tensor) -> Tensor:
        with as_reference(run, which):
            return outputs.head(hidden[positions])

    return Reference(hidden, log_probs, logits)


def label_log_probs(run: Run, batch: Batch) -> Tensor:
    """Return the labels' log-probabilities [L] under the current model, without a graph: for `evaluate`.

    Raises:
        InputError: the task has no log-probabilities.
    """
    with inference(run):
        outputs = run.task.outputs(run.model, batch)
        return _label_log_probs(run, batch, outputs, outputs.hidden.flatten(0, -2)[batch.label_positions])


def _label_log_probs(run: Run, batch: Batch, outputs: Outputs, hidden: Tensor) -> Tensor:
    size = head_rows(run, 2)
    parts = zip(hidden.split(size), batch.labels.split(size), strict=True)
    return torch.cat([run.task.log_probs(outputs.head(rows), labels) for rows, labels in parts])


def reference_log_probs(run: Run, batch: Batch) -> Tensor:
    """Return the labels' log-probabilities [L] at the start of the run: cached if a strategy sets `caches_reference`.

    Raises:
        InputError: the task has no log-probabilities.
    """
    if CACHED in batch.columns:
        return batch.columns[CACHED]
    return log_probs_of(run, read_reference(run, batch))


def log_probs_of(run: Run, reference: Reference) -> Tensor:
    """Return a reference's log-probabilities [L].

    Raises:
        InputError: the task has no log-probabilities.
    """
    if reference.log_probs is None:
        raise InputError(f"{run.task} has no log-probabilities, which a reference needs.")
    return reference.log_probs


def cache_reference(run: Run) -> None:
    """Compute the reference's log-probabilities of all examples, if a strategy of the run caches them.

    They become a column of the training and evaluation examples. Batches depend on the data and `run.reference_tokens`
    alone, so a resumed run computes the same bytes. If memory runs out, all of it is repeated with smaller batches.

    Raises:
        InputError: the task has no log-probabilities, or varies its examples in each epoch.
        PluginError: the examples already have a column of that name.
        ResourceError: a single group of examples exceeds the memory.
    """
    owner = next((strategy for strategy in run.strategies if strategy.caches_reference), None)
    if owner is None:
        return
    if not run.task.has_log_probs() or run.task.varies():
        reason = "varies its examples in every epoch" if run.task.has_log_probs() else "has no log-probabilities"
        raise InputError(f"{owner}: the reference cannot be cached, because {run.task} {reason}.")
    parts = [run.examples, *([] if run.eval_examples is None else [run.eval_examples])]
    if any(len(part) and CACHED in part[0].columns for part in parts):
        raise PluginError(f"{owner}: the examples already have a column '{CACHED}': rename that one.")
    while len(values := _cached_parts(run, parts)) < len(parts):
        release_memory()
        run.say(
            "out of memory: the reference is computed again, with at most "
            f"{run.reference_tokens:,} tokens at once (train.micro_tokens: {run.reference_tokens})"
        )
    cached = [part.with_label_column(CACHED, v, _offsets(part)) for part, v in zip(parts, values, strict=True)]
    run.examples, run.eval_examples = cached[0], cached[1] if cached[1:] else None
    labels = sum(int(part.label_counts.sum()) for part in parts)
    run.say(f"reference: the log-probabilities of {labels:,} labels were computed before the first step")


def _cached_parts(run: Run, parts: Sequence[Examples]) -> list[np.ndarray]:
    """Return the log-probabilities [labels] of each set of examples; fewer, and a smaller limit, if memory runs out.

    Raises:
        ResourceError: a single group of examples exceeds the memory.
    """
    if run.planning:  # values are unknown
        return [np.zeros(int(part.label_counts.sum()), dtype=np.float32) for part in parts]
    results: list[np.ndarray] = []
    for part in parts:
        values, limit = _log_probs_of_all(run, part)
        limit = min(from_all_processes(run, limit))
        if limit == 0:
            tokens = np.bincount(np.unique(part.groups, return_inverse=True)[1], part.lengths)
            largest = np.unique(part.groups)[tokens.argmax()]
            raise ResourceError(does_not_fit(run.recipe, part, np.flatnonzero(part.groups == largest).tolist()))
        if limit < run.reference_tokens:
            run.reference_tokens = limit
            break
        for dtype in run.world.gather(values.dtype):  # a process without a row has not seen that of the others
            values = values.to(torch.promote_types(values.dtype, dtype))
        run.world.sum([values])
        results.append(values.cpu().numpy())
    return results


def _log_probs_of_all(run: Run, examples: Examples) -> tuple[Tensor, int]:
    """Return the log-probabilities of all labels, those of other processes 0, and the limit of tokens at once.

    The limit is half of the batch for which memory ran out; 0 if that is a single group. The error and the tensors
    that its frames hold are released by then.
    """
    offsets, groups = _offsets(examples), examples.groups
    values = torch.zeros(int(offsets[-1]), device=run.device)
    rows = split_micro(range(len(examples)), examples.lengths, run.reference_tokens, run.packed, groups)
    row: list[int] = []
    extra = extra_passes(run, len(run.world.share(rows)))  # asked before any pass, in which the processes wait too
    try:
        for row in run.world.share(rows):
            batch = collate_for(run, [examples[i] for i in row], "eval").to(run.device)
            log_probs = log_probs_of(run, read_reference(run, batch))
            values = values.to(torch.promote_types(values.dtype, log_probs.dtype))  # float64 stays float64
            at = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in row])
            values[torch.from_numpy(at).to(run.device)] = at_least_fp32(log_probs).to(values.dtype)
        for _ in range(extra):
            read_reference(run, collate_for(run, [examples[i] for i in rows[0]], "eval").to(run.device))
    except Exception as error:
        if not is_out_of_memory(error) or run.sharded:
            raise
        sizes = examples.lengths[row]
        alone = len(set(groups[row].tolist())) == 1
        return values, 0 if alone else int(sizes.sum() if run.packed else sizes.max() * len(sizes)) // 2
    return values, run.reference_tokens


def _offsets(examples: Examples) -> np.ndarray:
    """Return the index of each example's first label, and the number of labels."""
    return np.concatenate([[0], np.cumsum(examples.label_counts)])


def as_reference(run: Run, which: Which) -> AbstractContextManager[None]:
    """Turn the model into a reference inside the context: evaluation mode, no gradients."""
    return adapter_off(run) if is_off(run, which) else _start_parameters(run)


@contextmanager
def adapter_off(run: Run) -> Iterator[None]:
    """Make `run.model` compute as its base inside the context: adapter disabled, evaluation mode, no gradients.

    Raises:
        InputError: no strategy of the run owns an adapter; declare `requires = ("adapter",)`.
    """
    owner = next((strategy for strategy in run.strategies if "adapter" in strategy.slots), None)
    if owner is None:
        raise InputError("no strategy of the recipe owns an adapter that could be disabled: add one such as lora.")
    use_adapters(owner, run.model)
    try:
        with inference(run):
            yield
    finally:
        use_adapters(owner, run.model, [RUN_ADAPTER])


@contextmanager
def _start_parameters(run: Run) -> Iterator[None]:
    """Give `run.model` inside the context its trainable parameters from before the first step."""
    parameters = run.trainable
    current = [parameter.data for parameter in parameters]
    for parameter, value in zip(parameters, run.start, strict=True):
        parameter.data = value
    try:
        with inference(run):
            yield
    finally:
        for parameter, value in zip(parameters, current, strict=True):
            parameter.data = value


@contextmanager
def inference(run: Run) -> Iterator[None]:
    """Compute with `run.model` inside the context in evaluation mode, in the run's precision, without gradients."""
    training = run.model.training
    run.model.eval()
    try:
        # Without autocast's cache: casts made without a gradient would be reused by a forward that needs one.
        with torch.no_grad(), autocast(run, cache=False):
            yield
    finally:
        run.model.train(training)

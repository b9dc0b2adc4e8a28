"""Check that a model keeps the examples of a packed row independent; if it does not, rows are padded instead."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from budwood.contract.discovery import PluginError
from budwood.contract.examples import Batch, Example
from budwood.contract.types import Run
from budwood.errors import BudwoodError, InputError, ResourceError, describe, is_out_of_memory
from budwood.model.evaluation import at_least_fp32, autocast, collate_for
from budwood.model.experts import same_routing
from budwood.model.ops import attention
from budwood.model.quantizers import quantizer_of
from budwood.parallel.sharding import forget_failure

ROUNDING, SIMILAR = 0.05, 0.25
"""Tolerances for logits in 16 bit, or with inputs in 8, relative to the largest: rounding alone, and the limit for the
independence check. If a token attends to another example, the difference is above 1."""

_BY_LENGTH = re.compile("compress|chunk|index_(topk|block)")
"""Entries of a config by which a model treats rows beyond a length otherwise."""


def check_packing(run: Run, report: Any) -> None:
    """Compare two examples packed together with each alone in the model's own forward; pad rows if they differ.

    In a mixture of experts, tokens go to the experts that they chose in the model's own forward.

    In 16 bit, or if linears round their inputs to 8, the rounding of a deep model may exceed ROUNDING. Rows are then
    packed if neither example's logits depend on the other's inputs: they must be bitwise identical if the other example
    changes.

    Some models do otherwise in rows beyond a length of their config, as those that compress their keys by the hundred;
    they are also compared at the end of a row as long as the run's.

    Args:
        report: an object with a method `say`.

    Raises:
        PluginError: even with padded rows, Budwood's forward pass gives other logits than the model's own.
        ResourceError: two examples do not fit into memory.
    """
    with same_routing(run.model) as repeat:
        _check(run, report, repeat)


def _check(run: Run, report: Any, repeat: Callable[[], None]) -> None:
    model, task = run.model, run.task
    model.eval()
    order = run.examples.lengths.argsort(kind="stable")
    labelled = order[run.examples.label_counts[order] > 0]
    order = labelled if len(labelled) else order
    if not len(order):
        run.packed = task.packs_rows(model)
        return
    chosen = [int(order[len(order) // 2]), int(order[len(order) // 4])]
    pair = [run.examples[index] for index in chosen]
    if not len(labelled):
        pair = [task.probe(example) for example in pair]  # prompts, whose last output counts
    run.packed = False
    try:
        own = [_own_logits(run, [example]) for example in pair]
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, BudwoodError):
            raise
        name = type(model).__name__
        raise InputError(f"model class {name} fails on an example of this data: {describe(error)}") from error
    if not task.packs_rows(model):
        run.packed = False
        reason = "this model pools by row" if task.pools_examples(model) else f"{task.name} packs none"
        report.say(f"rows are grouped by length and padded: {reason}")
        return
    repeat()
    quantizers = map(quantizer_of, model.modules())
    eight = any(quantizer is not None and quantizer.rounds_inputs for quantizer in quantizers)
    coarse = eight or run.dtype in (torch.float16, torch.bfloat16)
    same, similar = (ROUNDING, SIMILAR) if coarse else (1e-4, 1e-4)
    reason, row = "", pair
    try:
        model.set_attn_implementation(attention.IMPLEMENTATION)
        run.packed = True
        for row in rows_to_try(run, chosen, pair):
            packed = _logits(run, row)
            worst = _distance(packed, torch.cat(own))
            if worst > same and (worst > similar or not _independent(run, row, packed)):
                reason = f"packed, its logits differ by {worst:.1%}"
                break
    except Exception as error:
        if is_out_of_memory(error):
            what, remedy = (
                ("two examples do", "data.max_length") if row is pair else ("a row does", "train.micro_tokens")
            )
            raise ResourceError(f"out of memory: {what} not fit at once: lower {remedy}") from error
        if not _raised_by_model(error):
            raise
        forget_failure(model)
        reason = f"it does not support packed rows ({type(error).__name__})"
    if reason:
        run.packed = False
        model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
        alone = [_distance(_logits(run, [e]), logits) for e, logits in zip(pair, own, strict=True)]
        padded = _distance(_logits(run, pair), torch.cat(own))
        if max(alone) > same or padded > similar:
            difference = max(*alone, padded)
            raise PluginError(
                f"model class {type(model).__name__}: logits at labels differ from those of its own forward "
                f"by {difference:.{1 if difference > 1e-3 else 3}%}; the model class is not supported."
            )
        report.say(f"rows are padded, not packed, for this model: {reason}")


def rows_to_try(run: Run, indices: Sequence[int], pair: list[Example]) -> list[list[Example]]:
    """Return the rows in which a model packs the pair if it packs any: itself, and one as long as the run's.

    The longer one ends with the pair, and is only there if the model's config calls for it.

    Args:
        indices: those of the pair's examples in the run's.
    """
    config, lengths = run.model.config.get_text_config(), run.examples.lengths
    tokens, longest = int(lengths[indices].sum()), max(run.micro_tokens, run.eval_tokens, int(lengths.max()))
    if tokens >= longest or not any(value and _BY_LENGTH.search(name) for name, value in vars(config).items()):
        return [pair]
    return [pair, [example.without_labels() for example in pair] * (-(-longest // tokens) - 1) + pair]


def _raised_by_model(error: Exception) -> bool:
    """Whether the model class or torch raised the error, or core's attention does not support the model."""
    if isinstance(error, BudwoodError):
        return False
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inner = next((name for name in reversed(frames) if not name.startswith("torch.")), "")
    return isinstance(error, NotImplementedError) or not inner.startswith("budwood") or "model.ops" in inner


def _independent(run: Run, row: list[Example], packed: Tensor) -> bool:
    """Whether each example's `packed` logits stay bitwise identical if the other example's inputs change.

    In a longer row, the first changes too, for all those before the pair.
    """
    for number in sorted({0, len(row) - 2, len(row) - 1}):
        changed = run.task.altered(run.model, row[number])
        if changed is None:
            return False
        others = list(row)
        others[number] = changed
        rest = collate_for(run, others, "eval").example_of_label != number
        if not torch.equal(_logits(run, others)[rest], packed[rest]):
            return False
    return True


def _batch(run: Run, examples: list[Example]) -> Batch:
    return collate_for(run, examples, "eval").to(run.device)


def _logits(run: Run, examples: list[Example]) -> Tensor:
    batch = _batch(run, examples)
    with torch.no_grad(), autocast(run):
        return at_least_fp32(run.task.logits(run.task.outputs(run.model, batch), batch))


def _own_logits(run: Run, examples: list[Example]) -> Tensor:
    """Logits at the labels, from the model's own forward."""
    batch = _batch(run, examples)
    with torch.no_grad(), autocast(run):
        return at_least_fp32(run.task.own_logits(run.model, batch))


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest logit; infinite if the shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))

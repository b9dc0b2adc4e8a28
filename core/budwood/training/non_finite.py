"""Numbers that are not finite: who caused a loss or gradient, may the run go on; and the parameters after a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from budwood.contract.examples import Batch
from budwood.contract.registry import Composition
from budwood.contract.strategy import Strategy
from budwood.contract.types import Run, Step
from budwood.errors import DivergedError
from budwood.model.evaluation import autocast
from budwood.training.durability.changes import named_parameters
from budwood.training.step import Engine

MAX_SKIPPED = 20
"""Consecutive steps that may be skipped before the run is considered diverged."""


def check_skip(
    run: Run,
    engine: Engine,
    hooks: Composition,
    batches: Sequence[Batch],
    values: dict[str, Tensor],
    norm: Tensor,
    skipped: int,
    scaled: bool,
) -> None:
    """Return if a non-finite step may be skipped, and report it; the caller leaves all state unchanged.

    Args:
        batches: the step's micro-batches on this process.
        values: its loss terms and their sum, over all processes.
        norm: its gradient norm, over all processes.
        skipped: consecutive non-finite steps, including this one.
        scaled: the loss is scaled for fp16: an overflowing gradient under a finite loss is left to the scaler.

    Raises:
        DivergedError: the recipe says stop, too many in a row were skipped, or the parameters are not finite.
    """
    check_parameters(run)
    if scaled and bool(torch.isfinite(values["loss"])):
        text = f"step {run.step + 1}: the gradient overflowed in fp16"
        remedy = "use bf16 or fp32"
    else:
        text = f"step {run.step + 1}: {_cause(run, engine, hooks, batches, values, norm)}"
        remedy = "lower train.learning_rate, or look at these rows"
        if run.recipe.train.non_finite == "stop":
            raise DivergedError(f"{text}; {remedy}, or skip such steps with train.non_finite: skip")
        run.say(f"warning: {text}: the step is skipped")
    if skipped > MAX_SKIPPED:
        raise DivergedError(f"{text}; {skipped} steps in a row were skipped: {remedy}")


def check_parameters(run: Run) -> None:
    """Check that the optimizer has left finite parameters; call it before they are saved, evaluated or written.

    After the last step no loss would tell.

    Raises:
        DivergedError: a parameter holds NaN or infinity; whatever the recipe says of steps, it cannot be taken back.
    """
    named = named_parameters(run)
    finite = torch.stack([torch.isfinite(parameter).all() for parameter in named.values()]).tolist()
    bad = [name for name, sound in zip(named, finite, strict=True) if not sound]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise DivergedError(
            f"step {run.step}: the optimizer left NaN or infinity in '{bad[0]}'{more}, although loss and gradient were "
            "finite; lower train.learning_rate"
        )


def _cause(
    run: Run, engine: Engine, hooks: Composition, batches: Sequence[Batch], values: dict[str, Tensor], norm: Tensor
) -> str:
    """What is not finite, and the rows that cause it, found by running each example's forward again."""
    wrong = [name for name, value in values.items() if not torch.isfinite(value)]
    wrong = [name for name in wrong if name != "loss"] or wrong
    owner = engine.owners[wrong[0]][0] if wrong and wrong[0] in engine.owners else None
    whose = f" of {owner}" if isinstance(owner, Strategy) else ""
    what = f"loss '{wrong[0]}'{whose}" if wrong else "the gradient"
    rows: list[int] = []
    everyone: list[int] = []
    with torch.no_grad(), autocast(run):
        for batch in (b.to(run.device) for b in batches):
            everyone += batch.source_rows
            outputs = hooks.call("forward", step=Step(run, batch, engine))
            flat = outputs.hidden.reshape(-1, outputs.hidden.shape[-1])
            finite = torch.isfinite(outputs.head(flat[batch.label_positions])).all(-1)
            rows += [batch.source_rows[i] for i in batch.example_of_label[~finite].unique().tolist()]
    rows, everyone = _gather(run, rows), _gather(run, everyone)
    named = [run.examples.rows.location(i) for i in (rows or everyone)[:5]]
    more = f" and {len(rows or everyone) - 5} more" if len(rows or everyone) > 5 else ""
    return f"{what} is not finite (gradient norm {float(norm):g}); rows {', '.join(named)}{more}"


def _gather(run: Run, rows: list[int]) -> list[int]:
    """Return the rows of all processes, sorted."""
    found: list[Any] = [rows]
    if run.processes > 1:
        found = [None] * run.processes
        torch.distributed.all_gather_object(found, rows)
    return sorted(row for some in found for row in some)

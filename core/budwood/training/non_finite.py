"""Non-finite losses and gradients: find the cause and skip or stop; and a check of the parameters after a step."""

from __future__ import annotations

from collections.abc import Sequence

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
    """Report a non-finite step and return if it may be skipped; the caller then leaves all state unchanged.

    Args:
        batches: the step's micro-batches on this process.
        values: the step's loss terms and their sum, over all processes.
        norm: the step's gradient norm, over all processes.
        skipped: consecutive non-finite steps, including this one.
        scaled: the loss is scaled for fp16; the scaler then handles an overflowing gradient under a finite loss.

    Raises:
        DivergedError: `non_finite` is "stop", too many steps in a row were skipped, or the parameters are not finite.
    """
    check_parameters(run)
    if scaled and bool(torch.isfinite(values["loss"])):
        text = f"step {run.step + 1}: the gradient overflowed in fp16"
        remedy = "use bf16 or fp32"
    else:
        text = f"step {run.step + 1}: {_cause(run, engine, hooks, batches, values, norm)}"
        remedy = "lower train.learning_rate, or inspect these rows"
        if run.recipe.train.non_finite == "stop":
            raise DivergedError(f"{text}; {remedy}, or skip such steps with train.non_finite: skip")
        run.say(f"warning: {text}: the step is skipped")
    if skipped > MAX_SKIPPED:
        raise DivergedError(f"{text}; {skipped} steps in a row were skipped: {remedy}")


def check_parameters(run: Run) -> None:
    """Check that all parameters are finite; call before they are saved, evaluated or written.

    After the last step, no later loss would reveal it.

    Raises:
        DivergedError: a parameter holds NaN or infinity, whatever `train.non_finite` is: the update cannot be undone.
    """
    named = named_parameters(run)
    finite = torch.stack([torch.isfinite(parameter).all() for parameter in named.values()]).tolist()
    bad = [name for name, is_finite in zip(named, finite, strict=True) if not is_finite]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise DivergedError(
            f"step {run.step}: the optimizer left NaN or infinity in '{bad[0]}'{more}, although loss and gradient were "
            "finite; lower train.learning_rate"
        )


def _cause(
    run: Run, engine: Engine, hooks: Composition, batches: Sequence[Batch], values: dict[str, Tensor], norm: Tensor
) -> str:
    """Describe the non-finite value and the rows that cause it, found by repeating the forward pass."""
    bad_terms = [name for name, value in values.items() if not torch.isfinite(value)]
    bad_terms = [name for name in bad_terms if name != "loss"] or bad_terms
    owner = engine.owners[bad_terms[0]][0] if bad_terms and bad_terms[0] in engine.owners else None
    origin = f" of {owner}" if isinstance(owner, Strategy) else ""
    subject = f"loss '{bad_terms[0]}'{origin}" if bad_terms else "the gradient"
    bad_rows: list[int] = []
    all_rows: list[int] = []
    with torch.no_grad(), autocast(run):
        for batch in (b.to(run.device) for b in batches):
            all_rows += batch.source_rows
            outputs = hooks.call("forward", step=Step(run, batch, engine))
            flat = outputs.hidden.reshape(-1, outputs.hidden.shape[-1])
            finite = torch.isfinite(outputs.head(flat[batch.label_positions])).all(-1)
            bad_rows += [batch.source_rows[i] for i in batch.example_of_label[~finite].unique().tolist()]
    bad_rows, all_rows = _gather(run, bad_rows), _gather(run, all_rows)
    rows = bad_rows or all_rows
    locations = [run.examples.rows.location(i) for i in rows[:5]]
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"{subject} is not finite (gradient norm {float(norm):g}); rows {', '.join(locations)}{more}"


def _gather(run: Run, rows: list[int]) -> list[int]:
    """Return the rows of all processes, sorted."""
    return sorted(row for process_rows in run.world.gather(rows) for row in process_rows)

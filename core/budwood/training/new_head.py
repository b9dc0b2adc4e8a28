"""Gives a new classification head weights of a size at which its logits depend on the input from the first step on.

A head is drawn with a standard deviation of 0.02 or so, whatever it reads. Where that is small, as the pooled output
of a sentence encoder, all inputs have nearly the same logits. The gradient of everything below is then noise, of which
Adam makes steps of full size, and adapters at their usual rate can train all inputs to one point before the head has
learned anything. So the weight is scaled by the spread of its logits on some examples (after Mishkin & Matas, 2016,
"All you need is a good init", who scale each layer by the variance of its output).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from budwood.adapters.carried import CarriedAdapter
from budwood.contract.types import Run
from budwood.model.classification import Classification
from budwood.model.evaluation import autocast, batches_of, label_logits

SPREAD = 0.25
"""Standard deviation over examples that the logits shall have at least, up to a factor of √2."""
OFFSET = 1.0
"""Largest size that what all logits of a class have in common may get by it."""
EXAMPLES = 32


def scale_new_head(run: Run) -> None:
    """Multiply the weight of a new classification head by a power of two, if its logits vary less than `SPREAD`.

    The factor is a power of two, so that it does not depend on roundings, and neither does a resumed run.
    """
    weight = _new_weight(run)
    continued = run.start_adapter is not None and not isinstance(run.start_adapter, CarriedAdapter)
    if weight is None or run.sharded or continued:  # an adapter that is continued brings its head
        return
    logits = _logits(run)
    if len(logits) < 2:
        return
    spread, offset = float(logits.std(0).mean()), float(logits.mean(0).abs().max())
    if not 0 < spread < SPREAD:
        return
    factor = 2 ** round(math.log2(min(SPREAD / spread, OFFSET / offset if offset else math.inf)))
    if factor > 1:
        with torch.no_grad():
            weight.mul_(factor)
        run.say(f"new head: its weight is multiplied by {factor}, as its logits hardly depend on the input")


def _new_weight(run: Run) -> Tensor | None:
    """Return the weight [classes, d] that makes the logits, if it is not in the checkpoint and a head has one."""
    if not isinstance(run.task, Classification):
        return None
    heads = tuple(f"{head}." for head in run.task.head_modules(run.model))
    new = [run.model.get_parameter(name) for name in run.base.new if name.startswith(heads) and name.endswith("weight")]
    found = [weight for weight in new if weight.dim() == 2 and len(weight) == len(run.examples.labels)]
    return found[0] if len(found) == 1 else None


def _logits(run: Run) -> Tensor:
    """Return the logits [n, classes] of some examples, fp32; the model is in eval mode until its first step."""
    count = min(EXAMPLES, len(run.examples))
    chosen = [i * len(run.examples) // count for i in range(count)]
    with torch.no_grad(), autocast(run):
        batches = batches_of(run, chosen)
        return torch.cat([part for batch in batches for _, part in label_logits(run.task, run, batch, None)])

"""Chooses what a recipe leaves open of a run's length, batches and learning rate, from the data and the base."""

from __future__ import annotations

import math
from dataclasses import dataclass

from budwood.recipe.sections import TrainSection

STEPS = 128
"""Optimizer steps that a run on little data should have, unless that takes more than `EPOCHS` passes."""
EPOCHS, SHORT_EPOCHS, SHORT = 4, 10, 16
"""Most passes over the data; over short answers and classes, which are learned by heart later; most labels of those."""
PASSES = ((10_000, 3), (100_000, 2))
"""Fewest passes over data of up to so many examples; larger data is seen once."""
BATCH = (4, 32)
"""Fewest and most examples per optimizer step."""
BATCHES = 32
"""Optimizer steps that an epoch should have, within the limits of `BATCH`."""
RATE, WIDTH, POWER = 5e-4, 2000, 0.781
"""Learning rate of a low-rank adapter on a base of that width; it falls with the width to that power.

The fit of "LoRA Without Regret" (Schulman et al., 2025) to Llama models: ten times the rate of full fine-tuning, the
same at every rank.
"""
WARMUP, WARMUP_STEPS = 0.1, 30
"""Share of the run in which the rate rises, and its most steps."""


@dataclass(frozen=True)
class Facts:
    """What the choice depends on.

    Attributes:
        examples: number of examples, or of groups.
        tokens: sum of their lengths.
        labels: mean number of labels of an example.
        width: hidden size of the base; None: unknown.
        scale: multiple of the learning rate that suits the strategies.
        evaluated: whether there is data to evaluate on.
    """

    examples: int
    tokens: int
    labels: float
    width: int | None
    scale: float = 1.0
    evaluated: bool = False


def choose(train: TrainSection, facts: Facts) -> tuple[TrainSection, str]:
    """Return a recipe's `train` section with every value set, and a line about what was chosen; empty if nothing."""
    chosen: dict[str, float] = {}
    told: list[str] = []
    count = max(facts.examples, 1)
    batch_examples = train.batch_examples
    if batch_examples is None and train.batch_tokens is None:
        batch_examples = min(max(2 ** round(math.log2(count / BATCHES)), BATCH[0]), BATCH[1])
        chosen["batch_examples"] = batch_examples
        told.append(f"batches of {batch_examples} examples")
    if batch_examples is not None:
        per_epoch = math.ceil(count / batch_examples)
    else:
        per_epoch = math.ceil(max(facts.tokens, 1) / (train.batch_tokens or 1))
    if train.epochs is None and train.steps is None:
        least = next((passes for largest, passes in PASSES if count <= largest), 1)
        most = SHORT_EPOCHS if facts.labels <= SHORT else EPOCHS
        epochs = max(least, min(math.ceil(STEPS / per_epoch), most))
        chosen["epochs"] = epochs
        told.append(f"{epochs} epochs")
        if facts.evaluated and train.eval_every is None:
            chosen["eval_every"] = per_epoch
            told.append("an evaluation after each, of which the best is kept")
    if train.learning_rate is None:
        rate = RATE * (WIDTH / (facts.width or WIDTH)) ** POWER * facts.scale
        chosen["learning_rate"] = float(f"{rate:.2g}")
        told.append(f"a learning rate of {rate:.2g}")
    if train.warmup is None:
        steps = train.steps or per_epoch * (train.epochs or int(chosen["epochs"]))
        warmup = min(round(WARMUP * steps), WARMUP_STEPS)
        chosen["warmup"] = float(warmup)
        told.append(f"a warm-up of {warmup} step{'s'[: warmup != 1]}" if warmup else "no warm-up")
    if not chosen:
        return train, ""
    base = f" and a base of width {facts.width:,}" if facts.width else ""
    fields = ", ".join(f"train.{name}" for name in chosen)
    line = f"chosen for {count:,} examples{base}: {', '.join(told)}; a recipe can set {fields}"
    return train.model_copy(update=chosen), line

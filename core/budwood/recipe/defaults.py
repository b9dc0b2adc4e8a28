"""Chooses a run's length, batches and learning rate from the data and the base, if the recipe does not set them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from budwood.errors import plural
from budwood.recipe.sections import TrainSection

STEPS = 128
"""Optimizer steps of a run on little data, unless that takes more than `EPOCHS` passes."""
EPOCHS, SHORT_EPOCHS, SHORT = 4, 10, 8
"""Maximum number of epochs; that for short answers and classes, memorised later; the maximum labels of those.

Prompts that a run answers itself count as longer answers, whose length is unknown.
"""
ENCODER = 2
"""Factor of the steps and epochs of a text encoder that learns classes; its new head starts from random values."""
PASSES = ((10_000, 3), (100_000, 2))
"""Pairs of a number of examples and the minimum number of epochs up to it; beyond the last, 1."""
BATCH = (4, 32)
"""Minimum and maximum number of examples per optimizer step."""
BATCHES = 32
"""Target number of optimizer steps per epoch, within the limits of `BATCH`."""
RATE, WIDTH, POWER = 5e-4, 2000, 0.781
"""Learning rate of a low-rank adapter at this width of the base; it is proportional to width^-POWER.

The fit of "LoRA Without Regret" (Schulman et al., 2025) to Llama models: ten times the rate of full fine-tuning, the
same at every rank.
"""
ENCODER_RATE = 2 / 3
"""Factor of the learning rate of a text encoder that learns classes: its layers normalise after each sum, and more
runs fail at higher rates (docs/decisions.md).
"""
LITTLE = 16
"""Examples per optimizer step below which the learning rate falls with the square root of their number, unless answers
are short: Adam's rule for small batches (Malladi et al., 2022, "On the SDEs and Scaling Rules for Adaptive Gradient
Algorithms"). Short answers and classes learn less at the lower rate.
"""
WARMUP, WARMUP_STEPS = 0.1, 30
"""Warm-up as a fraction of the run, and its maximum number of steps."""


@dataclass(frozen=True)
class Facts:
    """The facts on which the choice depends.

    Attributes:
        examples: number of examples, or of groups.
        tokens: sum of their lengths.
        labels: mean number of labels of an example; 0: the run generates the answers.
        width: hidden size of the base; None: unknown.
        scale: product of the strategies' `learning_rate_scale`.
        evaluated: whether there is evaluation data.
        encoder: whether the base is a text encoder that learns classes.
        updates: optimizer steps per batch of examples.
    """

    examples: int
    tokens: int
    labels: float
    width: int | None
    scale: float = 1.0
    evaluated: bool = False
    encoder: bool = False
    updates: int = 1


def evaluates_each_epoch(train: TrainSection) -> bool:
    """Return whether a run with rows for evaluation is evaluated after each epoch unless the recipe says otherwise."""
    return train.eval_every is None and (train.patience is not None or (train.epochs is None and train.steps is None))


def choose(train: TrainSection, facts: Facts) -> tuple[TrainSection, str]:
    """Return a recipe's `train` section with every value set, and a line about the choices; empty if there are none."""
    chosen: dict[str, float] = {}
    told: list[str] = []
    count = max(facts.examples, 1)
    batch_examples = train.batch_examples
    if batch_examples is None and train.batch_tokens is None:
        batch_examples = min(max(2 ** round(math.log2(count / BATCHES)), BATCH[0]), BATCH[1])
        chosen["batch_examples"] = batch_examples
        told.append(f"batches of {plural(batch_examples, 'example')}")
    if batch_examples is not None:
        per_epoch = math.ceil(count / batch_examples)
    else:
        per_epoch = math.ceil(max(facts.tokens, 1) / (train.batch_tokens or 1))
    steps = per_epoch * facts.updates
    short = 0 < facts.labels <= SHORT
    encoder = facts.encoder and short
    if train.epochs is None and train.steps is None:
        least = next((passes for largest, passes in PASSES if count <= largest), 1)
        factor = ENCODER if encoder else 1
        most = factor * (SHORT_EPOCHS if short else EPOCHS)
        epochs = max(least, min(math.ceil(factor * STEPS / steps), most))
        chosen["epochs"] = epochs
        told.append(plural(epochs, "epoch"))
    if facts.evaluated and evaluates_each_epoch(train):
        chosen["eval_every"] = steps
        each = "each" if "epochs" in chosen else "each epoch"
        told.append(f"an evaluation after {each} (the best adapter is kept)")
    if train.learning_rate is None:
        rate = RATE * (WIDTH / (facts.width or WIDTH)) ** POWER * facts.scale
        if encoder:
            rate *= ENCODER_RATE
        if not short:
            rate *= math.sqrt(min((batch_examples or count / per_epoch) / LITTLE, 1.0))
        chosen["learning_rate"] = float(f"{rate:.2g}")
        told.append(f"a learning rate of {rate:.2g}" + (f" ({facts.scale:g} times LoRA's)" if facts.scale != 1 else ""))
    if train.warmup is None:
        total = train.steps or steps * (train.epochs or int(chosen["epochs"]))
        warmup = min(round(WARMUP * total), WARMUP_STEPS)
        chosen["warmup"] = float(warmup)
        told.append(plural(warmup, "warm-up step") if warmup else "no warm-up")
    if not chosen:
        return train, ""
    mean = f"{facts.labels:,.0f}" if facts.labels >= 10 else f"{facts.labels:.2g}"
    labels = f" with {mean} {'label' if mean == '1' else 'labels'} each" if facts.labels else ""
    base = f" and {'an encoder' if facts.encoder else 'a base'} of width {facts.width:,}" if facts.width else ""
    fields = ", ".join(f"train.{name}" for name in chosen)
    line = f"chosen for {plural(count, 'example')}{labels}{base}: {', '.join(told)}; to change this, set {fields}"
    return train.model_copy(update=chosen), line

"""Prepares a run's data: training and evaluation examples, held out if the recipe names no evaluation data."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from budwood.contract.registry import Composition
from budwood.contract.types import Run
from budwood.data.build import build_examples, overlap
from budwood.data.checking import check_examples
from budwood.data.chunk import PARALLEL
from budwood.data.examples import Examples
from budwood.data.held_out import HeldOut, hold_out, rows_held_out
from budwood.data.packing import plan_epoch
from budwood.data.sources import Data, data_size, locate
from budwood.data.unused import columns_read
from budwood.data.use import check_use
from budwood.errors import InputError, plural
from budwood.model.encoders import is_encoder
from budwood.model.limits import check_fits
from budwood.parallel.together import one_per_machine_first
from budwood.recipe.data import chat_note, encoding_options
from budwood.recipe.defaults import Facts, choose
from budwood.recipe.schema import Recipe
from budwood.recipe.sections import TrainSection
from budwood.training.durability.resume import Resume
from budwood.training.encoding import encoding
from budwood.training.on_policy import find_generator, updates_of
from budwood.training.report import Report


def read_data(
    run: Run, hooks: Composition, report: Report, date: str, model: Any, resume: Resume | None = None
) -> None:
    """Read training and evaluation data into `run`, report their data formats, and count the optimizer steps.

    Args:
        date: the date for chat templates that write one.
        model: the base's skeleton.
        resume: the checkpoint; its held-out rows stay held out if the data is the same.

    Raises:
        InputError: the data is invalid, does not fit the base, or leaves nothing to train on or to evaluate.
    """
    data = run.recipe.data
    options: dict[str, Any] = {"tokenizer": run.tokenizer, "task": run.task, **encoding_options(run.recipe)}
    options |= {"date": date, "read": columns_read(run.strategies)}
    console = None if report.quiet or report.mute else report.console
    found = locate(data.train)
    with _encoded_once(found), encoding(found, console) as progress:
        examples = build_examples(found, **options, progress=progress)
    report.say(examples.describe())
    plugins = (*run.strategies, run.task)
    check_use(examples.path, examples, plugins)
    if note := chat_note(run.recipe, examples, run.tokenizer):
        report.say(note)
    check_fits(examples, model, run.tokenizer, run.recipe.base.model)
    if data.evaluated is not None:
        found = locate(data.evaluated)
        with _encoded_once(found), encoding(found, console) as progress:
            run.eval_examples = build_examples(found, **options, labels=examples.labels or None, progress=progress)
        report.say(run.eval_examples.describe())
        check_use(run.eval_examples.path, run.eval_examples, plugins)
        check_fits(run.eval_examples, model, run.tokenizer, run.recipe.base.model)
        shared = overlap(examples, run.eval_examples)
        if shared:
            report.say(
                f"warning: {plural(shared, 'evaluation example')} equal to a training example; the metrics are too "
                "optimistic"
            )
    elif data.holds_out:
        examples = _hold_out(run, report, examples, resume)
    run.examples = _prepare_examples(run, hooks, examples)
    if run.examples is not examples:
        check_fits(run.examples, model, run.tokenizer, run.recipe.base.model)
    train, line = choose_for(run.recipe, run.examples, model, run.eval_examples is not None, hooks)
    run.recipe = run.recipe.with_train(train)
    if line:
        report.say(line)
    sizes = (train.batch_tokens, train.batch_examples, run.examples.groups)
    if train.steps is not None:
        run.steps = train.steps
    else:
        epochs = range(train.epochs or 0)
        planned = sum(len(plan_epoch(run.examples.lengths, run.seed, epoch, *sizes)) for epoch in epochs)
        run.steps = planned * updates_of(hooks)
    if hooks.implements("prepare_examples") and len(run.examples) == 0:
        raise InputError("no examples are left after the strategies' prepare_examples")
    _report_large_groups(run, report)


def _encoded_once(data: Data) -> AbstractContextManager[None]:
    """Let the first process of each machine encode a large file, which its others then read from the cache."""
    return nullcontext() if data_size(data) < PARALLEL else one_per_machine_first(str(data))


def choose_for(
    recipe: Recipe, examples: Examples, model: Any, evaluated: bool, hooks: Composition | None = None
) -> tuple[TrainSection, str]:
    """Choose the values that a recipe's `train` section does not set; see `recipe.defaults`.

    Args:
        model: the base, or its skeleton.
        evaluated: whether there is evaluation data.
        hooks: the strategies; None: they are unknown, and only the size of the batches counts.
    """
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    generates = hooks is not None and find_generator(hooks) is not None
    facts = Facts(
        examples=len(np.unique(examples.groups)),
        tokens=int(examples.lengths.sum()),
        labels=float(examples.label_counts.mean()) if len(examples) and not generates else 0.0,
        width=width,
        scale=math.prod(strategy.learning_rate_scale for strategy in hooks.strategies) if hooks is not None else 1.0,
        evaluated=evaluated,
        encoder=is_encoder(model.config) and bool(examples.labels),
        updates=updates_of(hooks) if hooks is not None else 1,
    )
    return choose(recipe.train, facts)


def split_held_out(recipe: Recipe, examples: Examples) -> HeldOut:
    """Choose the part of the training data that a recipe without `data.eval` holds out.

    Raises:
        InputError: the data has no column `data.group_by`.
    """
    where = f"{recipe.where('data', 'group_by')}: data.group_by"
    return hold_out(examples, recipe.train.seed, recipe.data.group_by, where)


def _hold_out(run: Run, report: Report, examples: Examples, resume: Resume | None) -> Examples:
    """Set the run's evaluation examples to the held-out part, and return the rest."""
    before = (resume.checkpoint.setting.get("data") or {}) if resume is not None else {}
    if before.get("held_out") and before.get("train") == examples.sha256:
        held = rows_held_out(examples, before["held_out"])
    else:
        held = split_held_out(run.recipe, examples)
    report.say(held.note)
    if not len(held.indices):
        needs = next((name for name in ("eval_every", "patience") if getattr(run.recipe.train, name)), None)
        if needs:
            raise InputError(f"train.{needs}: needs evaluation data, but {held.note.partition(': ')[2]}.")
    run.held_out = held.rows.tolist()
    examples, run.eval_examples = held.split(examples)
    return examples


def _prepare_examples(run: Run, hooks: Composition, examples: Examples) -> Examples:
    """Apply the strategies' `prepare_examples`.

    Raises:
        InputError: a strategy returned an invalid example; the message names the strategy and the row.
    """
    current: Any = examples
    for plugin, result in hooks.follow("prepare_examples", "examples", examples, run=run):
        if result is not current and not isinstance(result, Examples):
            try:
                check_examples(result, examples)
            except InputError as error:
                raise InputError(f"{plugin}, hook prepare_examples: {error}") from error
        current = result
    return current if isinstance(current, Examples) else Examples.gather(current, examples, run.task)


def _report_large_groups(run: Run, report: Report) -> None:
    """Report examples or groups larger than the size that the recipe gives; the plan chooses a size that holds all."""
    limit, examples = run.recipe.train.micro_tokens, run.examples
    if limit is None or not len(examples):
        return
    sizes = np.bincount(examples.groups, weights=examples.lengths)
    large = np.flatnonzero(sizes > limit)
    if len(large):
        what = "group" if len(sizes) < len(examples) else "example"
        what += " is" if len(large) == 1 else "s are"
        largest = int(np.argmax(sizes))
        where = examples.location(int(np.flatnonzero(examples.groups == largest)[0]))
        report.say(
            f"note: {len(large):,} {what} larger than train.micro_tokens ({limit:,}); each forms a separate "
            f"micro-batch, the largest of {int(sizes[largest]):,} tokens ({where})"
        )

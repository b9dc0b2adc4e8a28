"""The guarantees of every task, one check each, which raises `PromiseBroken` if the guarantee does not hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from budwood.adapters.golden import TOLERANCE, measure, threads
from budwood.contract.examples import Example
from budwood.contract.loading import check_hooks
from budwood.contract.types import Generator
from budwood.errors import BudwoodError, InputError
from budwood.model.evaluation import collate_for
from budwood.planning.synthetic import synthetic
from budwood.recipe.data import recipe_task
from budwood.serving.pool import AdapterPool
from budwood.serving.verify import verify
from budwood.testing.bench import NotApplicable, PromiseBroken, Result, explain
from budwood.testing.expect import EXACT, expect_equal, expect_trained
from budwood.testing.fake import run_on_fake_tensors
from budwood.testing.probe import distance
from budwood.testing.task_bench import TaskBench
from budwood.training.evaluate import evaluate_adapter

PLANNED = 64
"""Tokens of an example that is planned without data."""


def declares(bench: TaskBench) -> None:
    """Check that it loads, has a docstring, and implements existing hooks."""
    promise = "declares what it implements"
    try:
        task = bench.build_task()
        check_hooks(type(task), str(task))
    except BudwoodError as error:
        raise PromiseBroken(f"{promise}: {error}") from error
    if not ((vars(type(task)).get("__doc__") or "").strip()):
        raise PromiseBroken(f"{promise}: the class has no docstring; `budwood plugins` shows its first line.")


def examples_are_valid(bench: TaskBench) -> None:
    """Check that an example can be collated alone and reduced to a probe, and that its labels are in the outputs."""
    promise, run = "examples are collated and probed", bench.run("examples").run
    for example in [*run.examples][:4]:
        batch = collate_for(run, [example], "eval")
        last = int(batch.label_positions.max()) if len(batch.label_positions) else 0
        if len(batch.labels) != len(batch.label_positions) or len(batch.keys) != 1:
            raise PromiseBroken(f"{promise}: a batch of one example has {len(batch.keys)} keys.")
        if last >= batch.rows * batch.width:
            raise PromiseBroken(f"{promise}: a label is at {last} of {batch.rows * batch.width} outputs.")
        if len(run.task.probe(example).label_positions) != 1:
            raise PromiseBroken(f"{promise}: probe must return an example with one label.")


def trains(bench: TaskBench) -> None:
    """Check that a run changes the outputs, and that its metrics and parameters are finite."""
    expect_trained("trains", bench.run("trains"))


def varies_by_key(bench: TaskBench) -> None:
    """Check that `vary` depends on seed, epoch and key alone, and is the same in every evaluation."""
    promise, run = "vary is determined by seed, epoch and key", bench.run("vary").run
    if not run.task.varies():
        raise NotApplicable("it has no vary")

    def vary(epoch: int | str) -> list[Example]:
        chosen = [*run.examples][:8]
        return [run.task.vary(example, Generator(run.seed, epoch, example.key)) for example in chosen]

    for epoch in (0, "eval"):
        if not all(_equal(a, b) for a, b in zip(vary(epoch), vary(epoch), strict=True)):
            raise PromiseBroken(f"{promise}: two calls for epoch {epoch} differ. Draw from the generator alone.")
    if all(_equal(a, b) for a, b in zip(vary(0), vary(1), strict=True)):
        raise PromiseBroken(f"{promise}: eight examples are the same in epochs 0 and 1.")


def plans_without_data(bench: TaskBench) -> None:
    """Check that `planned_row`, if it returns a row, gives steps that run on fake tensors."""
    promise = "planned_row returns rows that the task reads"
    recipe = bench.recipe("without-data")
    if recipe_task(recipe).planned_row("water ", 0) is None:
        return
    try:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": PLANNED})})
        with synthetic(recipe, 2 * PLANNED) as (planned, _):
            run_on_fake_tensors(planned.with_train(planned.train.model_copy(update={"steps": 1})))
    except Exception as error:
        raise PromiseBroken(f"{promise}: {explain(error)}.") from error


def _equal(first: Example, second: Example) -> bool:
    pairs = [(getattr(first, field.name), getattr(second, field.name)) for field in fields(first)]
    return all(_same(a, b) for a, b in pairs)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return bool(np.array_equal(first, second)) if isinstance(first, np.ndarray) else True


def splits(bench: TaskBench) -> None:
    """Check that a step gives the same result in one micro-batch and in several."""
    promise = "one micro-batch equals several"
    whole, parts = bench.run(promise), bench.run(promise, "parts", micro_tokens=bench.micro_tokens(1))
    ones, several = whole.probe.micro_batches, parts.probe.micro_batches
    if any(len(step) != 1 for step in ones.values()) or not any(len(step) > 1 for step in several.values()):
        raise PromiseBroken(
            f"{promise}: the rows of the test do not split a step: micro-batches of {ones[0]} and {several[0]} "
            "examples. Make rows of similar lengths."
        )
    label = f"micro-batches of {ones[0]} and of {several[0]} examples"
    expect_equal(promise, whole, parts.parameters, label, bench, parts.probe)
    for name in (name for name in whole.run.metrics if name.startswith("eval_")):
        before, after = whole.run.metrics[name], parts.run.metrics[name]
        if not abs(before - after) <= 10 * EXACT * max(1.0, abs(before)):
            raise PromiseBroken(f"{promise}: metric {name} is {before:.7g} and {after:.7g}.")


def saved_is_evaluated(bench: TaskBench) -> None:
    """Check that the saved adapter, evaluated by itself, has the metrics of the run."""
    promise = "save → evaluate → same metrics"
    result = bench.run(promise)
    try:
        with threads(1):
            again = evaluate_adapter(result.adapter, bench.files.eval, device="cpu", quiet=True).adapter
    except BudwoodError as error:
        raise PromiseBroken(f"{promise}: {explain(error)}") from error
    expected = {name: value for name, value in result.run.metrics.items() if name.startswith("eval_")}
    for name, value in expected.items():
        found = again.get(name, math.inf)
        if not abs(found - value) <= EXACT * max(1.0, abs(value)):
            raise PromiseBroken(f"{promise}: {name} was {value!r} at the end of the run and is {found!r}.")


ATTACK = "pgd:epsilon=0.01,steps=2"


def attacked(bench: TaskBench) -> None:
    """Check that noise on the embeddings, chosen to raise the loss, raises it."""
    promise = "attack raises the loss"
    result = bench.run(promise)
    try:
        with threads(1):
            found = evaluate_adapter(result.adapter, bench.files.eval, device="cpu", attacks=[ATTACK], quiet=True)
    except InputError as error:
        raise NotApplicable(f"refused: {error}") from error
    except BudwoodError as error:
        raise PromiseBroken(f"{promise}: {explain(error)}") from error
    clean, under = found.adapter["eval_loss"], found.attacks[ATTACK]["eval_loss"]
    if not clean < under < math.inf:
        raise PromiseBroken(f"{promise}: --attack {ATTACK}: eval_loss is {clean:.7g} without and {under:.7g} with it.")


def verifies(bench: TaskBench) -> None:
    """Check that the golden outputs of the saved adapter replay."""
    promise = "golden outputs replay"
    result = bench.run(promise)
    try:
        with threads(1):
            report = verify(result.adapter, device="cpu")
    except BudwoodError as error:
        raise PromiseBroken(f"{promise}: {explain(error)}") from error
    if not report.exact:
        raise PromiseBroken(f"{promise}: the setting is another one: {report.recorded} and {report.current}.")


def opens_in_peft(bench: TaskBench) -> None:
    """Check that stock PEFT, on the model that transformers loads, gives the outputs of the run."""
    import transformers
    from peft import PeftModel

    promise = "stock PEFT opens the adapter with the same outputs"
    result = bench.run(promise)
    task, labels = result.run.task, list(result.run.examples.labels)
    base = getattr(transformers, task.auto_class).from_pretrained(str(bench.files.base), **task.model_kwargs(labels))
    model = PeftModel.from_pretrained(base, str(result.adapter)).get_base_model()
    with threads(1):
        logits = measure(task, model, result.run.tokenizer, result.probe.prompts, torch.float32)
    gap, bound = distance(result.logits, logits), TOLERANCE * max(1.0, float(result.logits.abs().max()))
    if not gap <= bound:
        raise PromiseBroken(f"{promise}: an output differs by {gap:.3g} (at most {bound:.1g} allowed).")


def responds(bench: TaskBench, text: str) -> None:
    """Check that its answer to a text is a mapping of JSON values, with a human-readable form of one line."""
    promise = "answers are JSON"
    result = bench.run(promise)
    if not result.run.task.responds():
        raise NotApplicable("it has no respond")
    pool = open_pool(bench, result)
    pool.load("adapter", result.adapter)
    pool.use("adapter")
    [answer] = pool.respond([text])
    if not isinstance(answer, dict):
        raise PromiseBroken(f"{promise}: an answer must be a mapping, not a {type(answer).__name__}.")
    try:
        json.dumps(answer, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PromiseBroken(f"{promise}: {error}") from error
    shown = result.run.task.show_response(answer)
    if not shown or "\n" in shown:
        raise PromiseBroken(f"{promise}: show_response must return one line, not {shown!r}.")


def open_pool(bench: TaskBench, result: Result) -> AdapterPool:
    """Return a pool on the bench's base for its task."""
    return AdapterPool(
        str(bench.files.base), task=bench.spec.task, precision="fp32", device="cpu",
        labels=list(result.run.examples.labels) or None,
        task_options=result.run.task.options.model_dump(mode="json", exclude_none=True),
    )  # fmt: skip

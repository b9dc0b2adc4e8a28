"""`budwood eval`: measure a saved adapter on data, with and without the adapter, and under attacks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from budwood.adapters.golden import comparable, current_setting, threads
from budwood.adapters.manifest import ChatRecord, HeldOutRecord
from budwood.contract.calls import attribute_errors
from budwood.contract.loading import build_task
from budwood.contract.types import Run
from budwood.data.build import build_examples
from budwood.data.examples import Examples
from budwood.data.held_out import rows_held_out
from budwood.data.recognition import recognise_rows
from budwood.data.sources import read_rows
from budwood.errors import InputError
from budwood.model.base import skeleton
from budwood.model.checkpoint import resolve
from budwood.model.limits import check_fits, default_length
from budwood.model.ops import attention
from budwood.model.task import Task
from budwood.serving.pool import read_base
from budwood.serving.verify import open_pool
from budwood.training.attacks import measure_attacked
from budwood.training.evaluation_inputs import EvaluationInputs, read_inputs
from budwood.training.objective import objective_metrics
from budwood.training.packing_check import check_packing
from budwood.training.report import Report
from budwood.training.setup import make_accelerator


@dataclass(frozen=True)
class Evaluation:
    """Metrics with the adapter and of the base alone, and the task's human-readable report ("" if it has none).

    `attacks` maps each attack's text to the adapter's metrics under it.
    """

    adapter: dict[str, float]
    base: dict[str, float]
    report: str
    attacks: dict[str, dict[str, float]]


def evaluate_adapter(
    directory: Path,
    data: Path | None = None,
    base: str | None = None,
    quantization: str | None = None,
    precision: str | None = None,
    max_length: int | None = None,
    generate: int | None = None,
    attacks: Sequence[str] = (),
    *,
    device: str = "auto",
    allow_other_base: bool = False,
    quiet: bool = False,
) -> Evaluation:
    """Evaluate an adapter, by default as its run did: the same machine and data give the same digits.

    Args:
        directory: the adapter's folder.
        data: a file in a data format that the adapter's task accepts; None: what its run evaluated on,
            the rows that it held out or its `data.eval`.
        base: folder or hub name of the base; None: the one that the adapter names.
        quantization: None: the adapter's.
        precision: "auto", "bf16", "fp16" or "fp32"; None: the adapter's.
        max_length: in tokens; longer rows are truncated and counted. None: the run's, or the recipe's default.
        generate: largest number of prompts to answer for exact match. None: as in the run, or 1000 if it is unknown.
        attacks: each as NAME:KEY=VALUE,…; the adapter is evaluated again under each of them.
        device: "cpu", "cuda" or "auto".
        allow_other_base: accept a base whose fingerprint differs from the adapter's.
        quiet: print nothing.

    Raises:
        InputError, CorruptError, ResourceError: the adapter, the data or the base cannot be used.
    """
    inputs = read_inputs(directory, data, base, quantization, max_length, generate, attacks, allow_other_base)
    return evaluate(inputs, quantization, precision, device, allow_other_base, quiet)


def evaluate(
    inputs: EvaluationInputs,
    quantization: str | None = None,
    precision: str | None = None,
    device: str = "auto",
    allow_other_base: bool = False,
    quiet: bool = False,
) -> Evaluation:
    """Evaluate what was read by `read_inputs`; see `evaluate_adapter`."""
    report = Report(quiet)
    saved, recipe, held_out, tokens = inputs.saved, inputs.recipe, inputs.held_out, inputs.tokens
    directory, manifest = saved.directory, saved.manifest
    as_run = manifest.evaluation if manifest else None
    labels = list(manifest.labels) if manifest else []
    task: Task = build_task(recipe.base.task, manifest.task_options if manifest else {})
    if inputs.attacks:
        data_format = recognise_rows(read_rows(recipe.data.train), recipe.base.task).name
        read_base(task, resolve(inputs.base, weights=False))
        modules = skeleton(inputs.base, task.auto_class)
        for attack in inputs.attacks.values():
            with attribute_errors(attack, "check"):
                attack.check(data_format, recipe.base.task, modules)
    pool = open_pool(
        saved,
        inputs.given_base,
        quantization=quantization,
        precision=precision,
        device=device,
        allow_other_base=allow_other_base,
    )
    task = pool.task_plugin
    chat = (manifest.chat if manifest else None) or ChatRecord()
    if chat.template is not None:
        pool.base.tokenizer.chat_template = chat.template
    max_length = inputs.max_length or default_length(pool.base.model)
    recipe = recipe.with_length(max_length)
    build = partial(
        build_examples, recipe.data.train, pool.base.tokenizer, task, max_length, labels or None,
        template_options=chat.options, loss_on=as_run.loss_on if as_run else "assistant", date=chat.date,
        as_chat=as_run is not None and as_run.as_chat,
        skip_bad_rows=held_out is not None and held_out.skip_bad_rows,
    )  # fmt: skip
    examples = build()
    check_fits(examples, pool.base.model, pool.base.tokenizer, inputs.base)
    report.say(examples.describe())
    if not examples.label_counts.any():
        raise InputError(
            f"{examples.path}: {' + '.join(examples.columns)} has no answers to evaluate on, and rewards belong to a "
            "recipe, not to an adapter: give rows with the column 'completion'."
        )
    rows = held_out.rows if held_out is not None else None
    if held_out is not None:
        _check_unchanged(examples, held_out, directory)
    if rows is not None:
        held = rows_held_out(examples, rows)
        report.say(held.note)
        examples = examples.select(held.indices)
    run = Run(recipe, directory, torch.device(pool.base.device), pool.base.dtype, task=task, say=report.say)
    run.base, run.model, run.tokenizer, run.examples, run.eval_examples = (
        pool.base, pool.base.model, pool.base.tokenizer, examples, examples,
    )  # fmt: skip
    run.eval_tokens = tokens
    run.accelerator = make_accelerator(run.device)
    attention.register()

    def build_changed(change: Any) -> Examples:
        if rows is None:
            return build(change=change)
        held_rows = frozenset(rows)
        changed = build(change=lambda row, index: change(row, index) if index in held_rows else row)
        return changed.select(rows_held_out(changed, rows).indices)

    golden, current = manifest.golden if manifest else None, current_setting(pool.base)
    same = golden is not None and comparable(golden, current)
    if golden is not None and not same:
        report.say(
            f"note: measured on {current.device} in {current.dtype}, quantization {current.quantization}; its run used "
            f"{golden.device}, {golden.dtype}, {golden.quantization}: the metrics may differ"
        )
    with threads(golden.threads) if golden is not None and same else nullcontext():
        check_packing(run, report)
        if as_run is not None and run.packed and not as_run.packed:
            run.packed = False
            if as_run.attention in ("sdpa", "eager"):
                pool.base.model.set_attn_implementation(as_run.attention)
        without = task.evaluate(run) if not task.head_modules(run.model) else {}
        pool.load("adapter", directory, allow_other_base=allow_other_base)
        pool.use("adapter")
        clean = {**task.evaluate(run), **objective_metrics(run, pool, "adapter", saved)}
        text = task.report
        attacked = {
            attack.name: measure_attacked(run, attack, build_changed, clean) for attack in inputs.attacks.values()
        }
    return Evaluation(clean, without, text, attacked)


def _check_unchanged(examples: Examples, held_out: HeldOutRecord, directory: Path) -> None:
    """Raise InputError if the data that an adapter's run evaluated on has changed since."""
    if examples.sha256 != held_out.sha256:
        raise InputError(
            f"{examples.path} has changed since the run of {directory}, so the rows that it evaluated on are unknown: "
            "name data to evaluate on with --data FILE."
        )

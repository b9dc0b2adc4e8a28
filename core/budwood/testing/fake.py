"""Runs optimizer steps on fake CPU tensors, with every strategy: the basis of a plan of memory and time."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from budwood.contract.discovery import PluginError
from budwood.contract.examples import Batch
from budwood.contract.types import Plan, Run, Step
from budwood.model.base import load_tokenizer, skeleton
from budwood.model.evaluation import collate_for
from budwood.model.fake import fake_base, fake_tensors
from budwood.model.ops import attention
from budwood.recipe.data import read_task_base, recipe_task
from budwood.recipe.schema import Recipe, build_composition
from budwood.training.batches import count_units
from budwood.training.on_policy import find_generator
from budwood.training.parameters import torch_groups, trainable_groups
from budwood.training.report import Report
from budwood.training.run_data import read_data
from budwood.training.setup import check_plan, make_accelerator, register_parts, register_task
from budwood.training.step import Engine
from budwood.untrusted.chat_template import today


def run_on_fake_tensors(recipe: Recipe) -> Run:
    """Run a recipe's optimizer steps with `run.planning` set, on tensors that have shapes but no values.

    Raises:
        DataDependentOutputException, DynamicOutputShapeException: from torch, if a strategy reads a value.
        BudwoodError: as `tune`.
    """
    hooks = build_composition(recipe)
    task = recipe_task(recipe)
    run = Run(
        recipe, Path(recipe.output), torch.device("cpu"), torch.float32, hooks.strategies, hooks, task,
        seed=recipe.train.seed, accelerator=make_accelerator(torch.device("cpu")), planning=True, say=lambda text: None,
    )  # fmt: skip
    read_task_base(task, recipe)
    register_task(hooks, task)
    if task.needs_tokenizer:
        run.tokenizer = load_tokenizer(recipe.base.model)
    modules = skeleton(recipe.base.model, task.auto_class)
    check_plan(Plan(recipe, hooks.strategies, recipe.train.steps, modules, task=task, tokenizer=run.tokenizer), hooks)
    read_data(run, hooks, Report(quiet=True), today(), modules)
    with fake_tensors() as mode:
        kwargs = task.model_kwargs(run.examples.labels)
        run.base = fake_base(recipe.base.model, task.auto_class, run.dtype, **kwargs)
        run.model = run.base.model
        attention.register()
        run.packed = task.packs_rows(run.model)
        if run.packed:
            run.model.set_attn_implementation(attention.IMPLEMENTATION)
        run.model = hooks.chain("prepare_model", "model", run.model, run=run)
        run.groups = trainable_groups(run, hooks)
        run.start = [p.detach().clone() for p in run.trainable]
        if run.average is not None:
            run.average.begin(run.trainable)
        engine = Engine(run, hooks)
        register_parts(hooks, engine)
        run.optimizer = hooks.call("build_optimizer", run=run, groups=torch_groups(run))
        run.scheduler = hooks.call("build_scheduler", run=run, optimizer=run.optimizer)
        run.model.train()
        planned = [example for examples in hooks.call("planned_examples", run=run) for example in examples]
        maker = find_generator(hooks)
        if maker is not None and not planned:
            raise PluginError(f"{maker} implements next_examples: a plan needs planned_examples too.")
        count = recipe.train.batch_examples or 1
        groups = [[example] for example in planned] or [
            [run.examples[int(i)] for i in np.flatnonzero(run.examples.groups == group)] for group in range(count)
        ]
        halves = [sum(half, []) for half in (groups[::2], groups[1::2]) if half]
        while run.step < (run.steps or 1):  # two micro-batches in the first step, one in the others to save time
            _step(run, engine, [_fake(collate_for(run, half, 0), mode) for half in halves[: 1 if run.step else 2]])
    return run


def _step(run: Run, engine: Engine, batches: list[Batch]) -> None:
    """Run one optimizer step on micro-batches."""
    hooks = run.hooks
    run.counts = count_units(run, hooks, batches)
    steps = []
    for index, batch in enumerate(batches):
        steps.append(Step(run, hooks.chain("prepare_batch", "batch", batch, run=run), engine, index))
    if engine.step_terms.needs_first_pass(len(steps)):
        for step in steps:
            engine.step_terms.collect(step)
        engine.step_terms.exchange()
    for step in steps:
        engine.begin(step)
        engine.step_terms.restore_random(step)
        hooks.call("backward", step=step)
    engine.finish_step()
    hooks.call("before_clip", run=run)
    torch.nn.utils.clip_grad_norm_([p for p in run.trainable if p.grad is not None], 1.0)
    hooks.call("before_optimizer_step", run=run)
    run.optimizer.step()
    hooks.call("after_optimizer_step", run=run)
    if run.average is not None:
        run.average.follow(run.step + 1)
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.logged.clear()
    run.step += 1


def _fake(batch: Batch, mode: FakeTensorMode) -> Batch:
    """Convert the tensors of a batch to fake ones with the same shape, dtype and device."""

    def convert(value: Any) -> Any:
        return mode.from_tensor(value) if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else value

    values = {field.name: convert(getattr(batch, field.name)) for field in fields(batch)}
    for name in ("inputs", "columns"):
        values[name] = {key: convert(tensor) for key, tensor in values[name].items()}
    return Batch(**values)

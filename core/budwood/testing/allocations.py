"""Measures what the tensors of real optimizer steps take, to compare a plan with."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from budwood.recipe.schema import Recipe
from budwood.training.batches import optimizer_steps
from budwood.training.loop import train_step
from budwood.training.progress import Progress
from budwood.training.report import Report
from budwood.training.setup import prepare


def measured_peak(recipe: Recipe, steps: int = 2) -> int:
    """Prepare a run, take optimizer steps, and return the most bytes that its tensors took in one.

    torch's profiler records every allocation of the CPU, scratch memory of kernels included.

    Args:
        recipe: its output folder is overwritten.
        steps: from 2: the optimizer's state exists only from the second step on.
    """
    others = tensor_bytes()  # what else is in the process
    peak = 0
    for take_step in steps_of(recipe, steps):
        before = tensor_bytes() - others
        peak = max(peak, before + highest(take_step))
    return peak


def measured_evaluation_peak(recipe: Recipe) -> int:
    """As `measured_peak`, of the task's evaluation before the first step."""
    others = tensor_bytes()
    run, _, _ = prepare(recipe, Report(quiet=True), overwrite=True)
    before = tensor_bytes() - others
    return before + highest(lambda: run.task.evaluate(run))


def highest(function: Callable[[], object]) -> int:
    """Return the most bytes that a call holds at once, in addition to what exists before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    level = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            highest = max(highest, level)
    return highest


def measured_peak_cuda(recipe: Recipe, steps: int = 2) -> tuple[int, int]:
    """As `measured_peak`, on the current CUDA device: the most bytes that torch had allocated, and reserved."""
    gc.collect()
    torch.cuda.empty_cache()
    others = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    allocated = reserved = 0
    for take_step in steps_of(recipe, steps):
        torch.cuda.empty_cache()  # what only building needed
        torch.cuda.reset_peak_memory_stats()
        take_step()
        torch.cuda.synchronize()
        allocated = max(allocated, torch.cuda.max_memory_allocated() - others[0])
        reserved = max(reserved, torch.cuda.max_memory_reserved() - others[1])
    return allocated, reserved


def steps_of(recipe: Recipe, steps: int) -> Iterator[Callable[[], object]]:
    """Prepare a run, and yield a function that takes the next of its first `steps` optimizer steps."""
    run, hooks, engine = prepare(recipe, Report(quiet=True), overwrite=True)
    progress = Progress(torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16))
    run.model.train()
    for step, counts in optimizer_steps(run, hooks, progress):
        yield partial(train_step, run, hooks, engine, progress, step, counts)
        if run.step == steps:
            break


def tensor_bytes() -> int:
    """Return the bytes of all real tensors that Python can reach."""
    gc.collect()
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, torch.Tensor)} - {FakeTensor}
    storages = {}
    for value in objects:
        if type(value) in kinds and not value.is_meta and not is_traceable_wrapper_subclass(value):  # of parts
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())

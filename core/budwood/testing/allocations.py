"""Measures what the tensors of real optimizer steps take on the CPU, to compare a plan with."""

from __future__ import annotations

import gc

import torch
from torch._subclasses.fake_tensor import FakeTensor

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
    run, hooks, engine = prepare(recipe, Report(quiet=True), overwrite=True)
    progress = Progress(torch.amp.GradScaler("cpu", enabled=False))
    run.model.train()
    peak = 0
    for step, counts in optimizer_steps(run, hooks, progress):
        before = tensor_bytes() - others
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            train_step(run, hooks, engine, progress, step, counts)
        level = highest = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                level += event.nbytes()
                highest = max(highest, level)
        peak = max(peak, before + highest)
        if run.step == steps:
            break
    return peak


def tensor_bytes() -> int:
    """Return the bytes of all real tensors that Python can reach."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor) and not isinstance(value, FakeTensor) and not value.is_meta:
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())

"""Decides before a run loads its base whether it can fit, from an estimate if that is worth its seconds."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import psutil
import torch

from budwood.contract.types import Run
from budwood.errors import BudwoodError, ResourceError
from budwood.model.machine import host_memory
from budwood.training import recompute
from budwood.training.micro_tokens import STEPS, largest_group, settle, shared_out, wanted
from budwood.training.on_policy import find_generator
from budwood.training.progress import planned_steps

if TYPE_CHECKING:
    from budwood.planning.estimate import Estimate

HALVED = "the largest micro-batch does not fit and will be halved; a smaller train.micro_tokens avoids it"
MARGIN = 4
"""A run is not planned if the device has this many times the memory that it could need at most."""


def admit(run: Run, skeleton: Any) -> None:
    """Choose the size of micro-batches if the recipe leaves it open, and refuse a run that cannot fit.

    A run whose memory is ample is not planned. Otherwise its estimate is kept in `run.planned`, the same on every
    process. On CUDA a micro-batch that exceeds the memory is halved, so a run is refused only if a single group of
    examples does not fit. On the CPU the system would end the process.

    Raises:
        ResourceError: the run does not fit; the message names the largest part, and what to change.
    """
    layers: bool | int = False
    size = run.recipe.train.micro_tokens or wanted(run, run.device.type)
    free = available(run)
    result = error = None
    needed = _at_most(run, skeleton, size)
    if MARGIN * needed >= free and run.process_index == 0:
        try:
            result = estimate_here(run, free)
        except BudwoodError as failure:  # a model or strategy that cannot be planned may still run
            error = str(failure)
    result, error = run.world.broadcast((result, error))
    if error is not None:
        size, layers = run.recipe.train.micro_tokens or wanted(run, "cpu"), True
        run.say(f"note: memory and time were not planned: {error}")
    if result is not None:
        size, layers = run.recipe.train.micro_tokens or result.micro_tokens, result.gradient_checkpointing
    if run.recipe.train.micro_tokens is None:
        settle(run, shared_out(run, size))
    if run.recipe.train.gradient_checkpointing == "auto":
        recompute.settle(run, layers)
    if result is not None:
        _decide(run, result)
        run.spare_memory = result.device.memory - result.needed
    elif error is None:
        run.spare_memory = free - int(needed)


def available(run: Run) -> int:
    """Return the bytes of memory that are free for each process, the same number on every process."""
    if run.device.type != "cuda":
        return min(run.world.gather(host_memory() // run.world.local_size))
    return min(run.world.gather(torch.cuda.mem_get_info(run.device)[0]))


def estimate_here(run: Run, free: int) -> Estimate:
    """Estimate a run with its data on this machine, in another process.

    Args:
        free: bytes of memory beside what this process has.

    Raises:
        BudwoodError: see `estimate_in_process`.
    """
    from budwood.planning.devices import find_device
    from budwood.planning.options import CONTEXT
    from budwood.planning.process import estimate_in_process

    cuda = run.device.type == "cuda"
    device = find_device("auto" if cuda else "cpu")
    own = CONTEXT if cuda else psutil.Process().memory_info().rss  # no longer among what is available
    if run.world.size > run.world.local_size:
        device = replace(device, link=None)  # the slowest link is that between machines
    return estimate_in_process(run.recipe, replace(device, memory=free + own), keep=True, processes=run.processes)


def _decide(run: Run, result: Estimate) -> None:
    """Keep and report an estimate; refuse the run if it does not fit. Processes shard a base that would not fit else.

    Raises:
        ResourceError: see `admit`.
    """
    from budwood.planning.estimate import gib, refusal

    device = result.device
    run.planned = result.as_dict()
    run.sharded = result.exchange is not None and result.exchange.parallel == "shard"
    each = f" in each of {run.processes} processes{' with a sharded base' * run.sharded}" if run.processes > 1 else ""
    span = "" if result.seconds is None else f", {result.seconds[0]:,.0f} to {result.seconds[1]:,.0f} s of training"
    layers = f"; {result.recomputed} of {result.layers} layers recompute" if result.recomputed else ""
    run.say(
        f"plan: {gib(result.needed)} of {gib(device.memory)} memory{each}{span}; peak in {result.where}; "
        f"micro-batches of at most {run.micro_tokens:,} tokens{layers} ({result.planned_in:.0f} s, kept for the next "
        "run)"
    )
    if result.offloaded and run.device.type == "cuda":
        _check_host(result, host_memory() + psutil.Process().memory_info().rss)
    if result.fits:
        return
    if run.sharded or not fits_halved(run, result):
        raise ResourceError(refusal(result, run.recipe))
    run.say(f"note: {HALVED}")


def _check_host(result: Estimate, memory: int) -> None:
    """Refuse a run whose layer inputs exceed the host's memory.

    Raises:
        ResourceError: they do.
    """
    from budwood.planning.estimate import gib

    if result.host > memory:
        raise ResourceError(
            f"train.activation_offloading: the run needs {gib(result.host)} of the host's memory, "
            f"{gib(result.offloaded)} of it for inputs of layers, and {gib(memory)} are free: lower "
            "train.micro_tokens, or leave it out."
        )


def fits_halved(run: Run, result: Estimate) -> bool:
    """Whether a run that does not fit can run on CUDA, where micro-batches are halved down to a group of examples."""
    from budwood.planning.estimate import GRADIENTS, KEPT, TEMPORARY

    if run.device.type != "cuda":
        return False
    work = result.parts.get(KEPT, 0) + result.parts.get(TEMPORARY, 0)
    fixed = result.needed - work - result.parts.get(GRADIENTS, 0)
    largest = largest_group(run.examples.lengths, run.examples.groups)
    return fixed + work * min(largest / max(result.largest_micro, 1), 1.0) <= result.device.memory


def _at_most(run: Run, skeleton: Any, micro_tokens: int) -> int:
    """Return a bound on the memory of a usual run, from its sizes alone.

    Weights; every layer's activations in the largest micro-batch; and one layer's in an evaluation.
    """
    config = skeleton.config.get_text_config()
    width = int(getattr(config, "hidden_size", 0) or 0)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    if not width or not layers or not isinstance(inner, int):
        return math.inf  # type: ignore[return-value]  # planned whatever the memory is
    weights = sum(parameter.numel() for parameter in skeleton.parameters())
    of_layer = run.dtype.itemsize * (40 * width + 10 * inner)
    evaluated = micro_tokens if run.eval_examples is not None else 0
    return weights * (run.dtype.itemsize + 1) + of_layer * (layers * _largest_micro(run, micro_tokens) + evaluated)


def _largest_micro(run: Run, micro_tokens: int) -> int:
    """Return a bound on the tokens of a micro-batch with padding: its size, but no more than an optimizer step has."""
    lengths = run.examples.lengths
    size = max(micro_tokens, largest_group(lengths, run.examples.groups))
    if find_generator(run.hooks) is not None:
        return size
    steps = [len(indices) * int(lengths[indices].max()) for _, indices in islice(planned_steps(run), STEPS)]
    return min(size, max(steps, default=size))

"""Decides before a run loads its base whether it can fit, from an estimate if that is worth its seconds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import torch

from budwood.contract.types import Run
from budwood.errors import BudwoodError, ResourceError
from budwood.model.machine import host_memory

MARGIN = 4
"""A run is not planned if the device has this many times the memory that it could need at most."""


def admit(run: Run, skeleton: Any) -> None:
    """Estimate a run whose memory is not ample, keep the estimate in `run.planned`, and refuse what cannot fit.

    On CUDA a micro-batch that exceeds the memory is halved, so a run is refused only if a single group of examples
    does not fit. On the CPU the system would end the process.

    Raises:
        ResourceError: the run does not fit; the message names the largest part, and what to change.
    """
    cuda = run.device.type == "cuda"
    available = torch.cuda.mem_get_info(run.device)[0] if cuda else host_memory()
    if MARGIN * _at_most(run, skeleton) < available:
        return
    from budwood.planning.devices import CONTEXT, find_device
    from budwood.planning.estimate import GRADIENTS, KEPT, TEMPORARY, gib, refusal
    from budwood.planning.process import estimate_in_process

    device = find_device("auto" if cuda else "cpu")
    own = CONTEXT if cuda else psutil.Process().memory_info().rss  # no longer among what is available
    device = replace(device, memory=available + own)
    try:
        result = estimate_in_process(run.recipe, device, keep=True)
    except BudwoodError as error:  # a model or strategy that cannot be planned may still run
        run.say(f"note: memory and time were not planned: {error}")
        return
    run.planned = result.as_dict()
    span = "" if result.seconds is None else f", {result.seconds[0]:,.0f} to {result.seconds[1]:,.0f} s of training"
    run.say(
        f"plan: {gib(result.needed)} of {gib(device.memory)} memory{span}; peak in {result.where} "
        f"({result.planned_in:.0f} s, kept for the next run)"
    )
    if result.fits:
        return
    if cuda:
        work = result.parts.get(KEPT, 0) + result.parts.get(TEMPORARY, 0)
        fixed = result.needed - work - result.parts.get(GRADIENTS, 0)
        sizes = np.bincount(run.examples.groups, weights=run.examples.lengths)
        if fixed + work * min(float(sizes.max()) / max(result.largest_micro, 1), 1.0) <= device.memory:
            run.say(
                "note: the largest micro-batch does not fit and will be halved; a smaller train.micro_tokens avoids it"
            )
            return
    raise ResourceError(refusal(result, run.recipe))


def _at_most(run: Run, skeleton: Any) -> int:
    """Return a bound on the memory of a usual run, from its sizes alone: weights, and every layer's activations."""
    config = skeleton.config.get_text_config()
    width = int(getattr(config, "hidden_size", 0) or 0)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    if not width or not layers or not isinstance(inner, int):
        return math.inf  # type: ignore[return-value]  # planned whatever the memory is
    sizes = np.bincount(run.examples.groups, weights=run.examples.lengths) if len(run.examples) else np.zeros(1)
    tokens = max(run.micro_tokens, int(sizes.max()))
    weights = sum(parameter.numel() for parameter in skeleton.parameters())
    return weights * (run.dtype.itemsize + 1) + 4 * tokens * layers * (40 * width + 10 * inner)

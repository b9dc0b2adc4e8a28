"""Models beside the one that is tuned: a second one, frozen, such as a teacher; or the run's own base, adapter off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from budwood.adapters.use import use_adapters
from budwood.contract.strategy import RUN_ADAPTER
from budwood.contract.types import Run
from budwood.errors import InputError
from budwood.model.base import Base, load_base
from budwood.model.fake import fake_base
from budwood.model.ops import attention
from budwood.training.setup import check_packing


def load_frozen(run: Run, model: str, quantization: str | None = None) -> Base:
    """Load a second model for the run's task, data and device; call it from `prepare_model`.

    It computes in the run's dtype, every parameter is frozen, and it stays in evaluation mode. `run.task.outputs` runs
    it on the run's batches. It never runs code of its own: a recipe's `trust_remote_code` is for the base. Where it
    does not take packed rows, the run's rows are padded from here on. In planning it is of fake tensors, unquantised.

    Args:
        run: past its base.
        model: a folder or a hub name.
        quantization: name of a quantiser; None: what the checkpoint has, or none.

    Raises:
        InputError: no such model, or one without a trained head for the task.
        ResourceError, CorruptError: as `load_base`.
        PluginError: Budwood's way through the model gives other logits than the model's own.
    """
    recipe = run.recipe.base
    if run.planning:
        base = fake_base(model, run.task.auto_class, run.dtype, **run.task.model_kwargs(run.examples.labels))
        base.model.set_attn_implementation(attention.IMPLEMENTATION)
        return base
    base = load_base(
        model, quantization, run.task.auto_class, run.dtype, run.device, False,
        recipe.double_quantization, run.task.model_kwargs(run.examples.labels), run.seed,
    )  # fmt: skip
    if base.new:
        raise InputError(f"model '{model}' holds no weights for {base.new[0]}: give one that was trained for the task.")
    beside = replace(run, base=base, model=base.model, say=lambda text: run.say(f"{model}: {text}"))
    check_packing(beside, beside)
    run.packed = run.packed and beside.packed
    return base


@contextmanager
def adapter_off(run: Run) -> Iterator[None]:
    """Let `run.model` answer as its base inside the context: adapter off, evaluation mode, no gradients.

    Raises:
        InputError: no strategy of the run owns an adapter; declare `requires = ("adapter",)`.
    """
    owner = next((strategy for strategy in run.strategies if "adapter" in strategy.slots), None)
    if owner is None:
        raise InputError("no strategy of the recipe owns an adapter that could be off: add one such as lora.")
    training = run.model.training
    # Without its cache, in which casts made without a gradient would stay for the forward that has one.
    cast = torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32, cache_enabled=False)
    run.model.eval()
    use_adapters(owner, run.model)
    try:
        with torch.no_grad(), cast:
            yield
    finally:
        use_adapters(owner, run.model, [RUN_ADAPTER])
        run.model.train(training)

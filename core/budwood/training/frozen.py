"""A second, frozen model in addition to the tuned one, such as a teacher."""

from __future__ import annotations

from dataclasses import replace

from budwood.contract.types import Run
from budwood.errors import InputError
from budwood.model.base import Base, load_base
from budwood.model.fake import fake_base
from budwood.model.ops import attention
from budwood.training.packing_check import check_packing


def load_frozen(run: Run, model: str, quantization: str | None = None) -> Base:
    """Load a second model for the run's task, data and device; call from `prepare_model`.

    The model computes in the run's dtype and stays frozen and in evaluation mode. `run.task.outputs` runs it on the
    run's batches. Its repository's code never runs: a recipe's `trust_remote_code` covers only the base. If it does not
    support packed rows, the run's rows are padded from then on. During planning it has fake tensors.

    Args:
        run: a run whose base is loaded.
        model: a folder or a hub name.
        quantization: name of a quantiser; None: as in the checkpoint.

    Raises:
        InputError: there is no such model, or it has no trained head for the task.
        ResourceError, CorruptError: as `load_base`.
        PluginError: Budwood's forward pass gives other logits than the model's own.
    """
    recipe = run.recipe.base
    if run.planning:
        base = fake_base(
            model,
            run.task.auto_class,
            run.dtype,
            needs_tokenizer=run.task.needs_tokenizer,
            quantization=quantization,
            double_quantization=recipe.double_quantization,
            **run.task.model_kwargs(run.examples.labels),
        )
        base.model.set_attn_implementation(attention.IMPLEMENTATION)
        return base
    base = load_base(
        model, quantization, run.task.auto_class, run.dtype, run.device, False,
        recipe.double_quantization, run.task.model_kwargs(run.examples.labels), run.seed, run.task.needs_tokenizer,
    )  # fmt: skip
    if base.new:
        raise InputError(f"model '{model}' has no weights for {base.new[0]}: choose one that was trained for the task.")
    frozen_run = replace(run, base=base, model=base.model, say=lambda text: run.say(f"{model}: {text}"))
    check_packing(frozen_run, frozen_run)
    run.packed = run.packed and frozen_run.packed
    return base

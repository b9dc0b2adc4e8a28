"""Statistics of the frozen linears' inputs and gradients over a sample of the run's training examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from budwood import Batch, Generator, InputError, Run, autocast, batches_of

AT_ONCE = 2 << 30
"""Bytes of statistics in memory at once: if all linears need more, the sample is run several times."""
CHUNK = 256
"""Labels whose logits are in memory at once."""

Observe = Callable[[str, Tensor, Batch], None]
"""Called with a linear's path, its input [rows, width, in] and the batch."""


def sample(run: Run, name: str, count: int) -> list[int]:
    """Return the indices of `count` training examples, or of all if there are fewer, drawn with the run's seed."""
    generator = Generator(run.seed, name, "sample").torch_generator
    return sorted(torch.randperm(len(run.examples), generator=generator)[:count].tolist())


def passes(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield groups of paths whose statistics, of these sizes in bytes, fit in memory together."""
    group: list[str] = []
    total = 0
    for path, size in sizes.items():
        if group and total + size > AT_ONCE:
            yield group
            group, total = [], 0
        group.append(path)
        total += size
    if group:
        yield group


def _one_by_one(run: Run, indices: Sequence[int]) -> Iterator[Batch]:
    """Yield a batch of each example alone: sums in another order end in other bits, on which singular vectors depend.

    So the start is the same whatever `train.micro_tokens` is.
    """
    for index in indices:
        yield from batches_of(run, [index])


@contextmanager
def _evaluating(run: Run, model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with autocast(run):
            yield
    finally:
        model.train(training)


@torch.no_grad()
def over_inputs(
    run: Run, model: nn.Module, layers: Mapping[str, Any], indices: Sequence[int], observe: Observe
) -> None:
    """Run the examples through the base, and call `observe` with the input of each layer."""
    batch: Any = None

    def hook(path: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def watch(module: Any, inputs: tuple[Any, ...]) -> None:
            with torch.autocast(run.device.type, enabled=False):
                observe(path, inputs[0].detach(), batch)

        return watch

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        with _evaluating(run, model):
            for batch in _one_by_one(run, indices):
                run.task.outputs(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def rows_of(x: Tensor, batch: Batch, labels_only: bool = False) -> Tensor:
    """Return the input [n, in] fp32 at a batch's tokens, without padding, or only at the scored positions.

    An expert's input holds the tokens that it was given, in an order of its own: then all of them are returned.
    """
    flat = x.flatten(0, -2)
    if len(flat) != len(batch.example_of_position):
        return flat.float()
    chosen = batch.label_positions.unique() if labels_only else (batch.example_of_position >= 0).nonzero().squeeze(1)
    return flat[chosen].float()


class _Watch(torch.autograd.Function):
    """The identity on a linear's output, whose backward adds the gradient of the linear's weight to a sum.

    It saves the input, so that gradient checkpointing recomputes it. The anchor makes the output need a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, anchor: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.total = total
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,), g = ctx.saved_tensors, gradients[0].flatten(0, -2).float()
        with torch.autocast(x.device.type, enabled=False):
            ctx.total.addmm_(g.t(), x.flatten(0, -2).float())
        return None, gradients[0], torch.zeros((), device=x.device), None


def weight_gradients(run: Run, model: Any, layers: Mapping[str, Any], indices: Sequence[int]) -> dict[str, Tensor]:
    """Return the gradient [out, in] fp32 of the task's mean loss over the examples, for the weight of each linear.

    It is the sum over positions of the output's gradient times the input, so that the weights stay frozen, in whatever
    form. The adapter's layers are on the model, without effect.
    """
    anchor = torch.zeros((), device=run.device, requires_grad=True)
    totals = {
        path: torch.zeros(layer.out_features, layer.in_features, device=run.device) for path, layer in layers.items()
    }
    weight = sum(float(run.examples[i].weights.sum(dtype="float64")) for i in indices)
    if not weight:
        raise InputError("lora-ga: the sampled training examples have no labels: raise lora-ga.examples.")
    scale = 4096.0 if run.dtype == torch.float16 else 1.0  # small gradients would be 0 in fp16

    def hook(path: str) -> Callable[[Any, tuple[Any, ...], Tensor], Tensor]:
        return lambda module, inputs, y: _Watch.apply(inputs[0], y, anchor, totals[path])  # type: ignore[no-any-return]

    handles = [layer.register_forward_hook(hook(path)) for path, layer in layers.items()]
    try:
        with _evaluating(run, model), _checkpointing(run, model):
            for batch in _one_by_one(run, indices):
                _differentiate(run, model, batch, anchor, scale / weight)
    finally:
        for handle in handles:
            handle.remove()
    return {path: total / scale for path, total in totals.items()}


def _differentiate(run: Run, model: Any, batch: Batch, anchor: Tensor, factor: float) -> None:
    """Run a batch forward and backward; the logits exist for one chunk of labels at a time."""
    outputs = run.task.outputs(model, batch)
    hidden = outputs.hidden.flatten(0, -2)[batch.label_positions]
    if not len(hidden):
        return
    copy = hidden.detach().requires_grad_()
    total = torch.zeros_like(copy)
    for chunk in torch.arange(len(copy), device=copy.device).split(CHUNK):
        logits = outputs.head(copy[chunk]).float()
        loss = (run.task.loss(logits, batch.labels[chunk]) * batch.task_weights[chunk]).sum() * factor
        total += torch.autograd.grad(loss, copy)[0]
    torch.autograd.grad(hidden, anchor, total)


def _checkpointing(run: Run, model: Any) -> Any:
    """Return a context with gradient checkpointing, if the recipe has it; core turns it on later."""
    if not run.recipe.train.gradient_checkpointing:
        return nullcontext()

    @contextmanager
    def on() -> Iterator[None]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()  # transformers' layers checkpoint in training only
        try:
            yield
        finally:
            model.gradient_checkpointing_disable()

    return on()


def square_bytes(layers: Mapping[str, Any], sides: str) -> dict[str, int]:
    """Return the bytes of an fp32 matrix for each layer: [in, in] or [out, in]."""
    return {
        path: 4 * layer.in_features * (layer.in_features if sides == "in" else layer.out_features)
        for path, layer in layers.items()
    }

"""The observer in the kit's runs: a strategy that changes nothing and records what the checks need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from budwood.adapters.golden import measure
from budwood.contract.examples import Batch, Example
from budwood.contract.strategy import Strategy, hookimpl
from budwood.contract.types import Run
from budwood.errors import InputError

PROMPTS = 3


class InjectedError(Exception):
    """Raised by the probe in the middle of a step."""


class Probe(Strategy):
    """Observes a run for the conformance kit; listed first, so that it sees the model before any change.

    Attributes:
        prompts: examples on which logits are compared.
        base_logits: [prompts, vocabulary or classes] of the unmodified base.
        start_logits: the same just before the first step.
        micro_batches: examples in each micro-batch, by the number of completed steps.
        calls: forward passes in the first micro-batch of a step, likewise.
        strays: "step 1: name" of every gradient on a parameter that is in no group.
        largest: largest absolute gradient of each trained parameter over the run, by name; None without a gradient.
        smallest: smallest absolute gradient of each of its elements since its shape last changed, without those that
            are 0; infinite if there is no other.
        snapshot: state of the model's modules just before the step in which the probe fails.
        failed: whether it has failed.
    """

    last: ClassVar[Probe | None] = None
    """The probe of the latest run, including failed ones."""

    fail_at: ClassVar[int] = 0
    """Number of the forward pass of step 2 that raises; 0: none. Not an option, which a resume could not change."""

    def __init__(self, options: Any = None, name: str = "", distribution: str = "") -> None:
        super().__init__(options, name, distribution)
        self.prompts: list[Example] = []
        self.base_logits = self.start_logits = torch.empty(0)
        self.base_tensors: dict[str, tuple[Tensor, Tensor]] = {}
        self.micro_batches: dict[int, list[int]] = {}
        self.calls: dict[int, int] = {}
        self.strays: list[str] = []
        self.largest: dict[str, float | None] = {}
        self.smallest: dict[str, Tensor] = {}
        self.snapshot: dict[str, Any] = {}
        self.failed = False
        self.run: Run | None = None

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        self.run, Probe.last = run, self
        if run.planning:
            return model
        for index in range(min(PROMPTS, len(run.examples))):
            example = run.examples[index]
            self.prompts.append(run.task.probe(replace(example, label_positions=example.label_positions[-1:])))
        self.base_logits = measure(run.task, model, run.tokenizer, self.prompts, run.dtype)
        self.base_tensors = {name: (tensor, tensor.clone()) for name, tensor in stored(model).items()}
        return model

    @hookimpl
    def prepare_batch(self, run: Run, batch: Batch) -> Batch:
        if run.planning:
            return batch
        if not self.micro_batches:
            self.start_logits = measure(run.task, run.model, run.tokenizer, self.prompts, run.dtype)
            _last_norm(run.model).register_forward_pre_hook(lambda *_: self._forward())
        if run.step not in self.micro_batches:
            self.micro_batches[run.step], self.calls[run.step] = [], 0
            if self.fail_at and run.step == 1:
                self.snapshot = state_of(run.model)
        self.micro_batches[run.step].append(len(batch.keys))
        return batch

    def _forward(self) -> None:
        run = self.run
        if run is None or not run.model.training or len(self.micro_batches[run.step]) > 1:
            return
        self.calls[run.step] += 1
        if run.step == 1 and self.calls[run.step] == self.fail_at:
            self.failed = True
            raise InjectedError("raised by the conformance kit in the middle of a step")

    @hookimpl
    def before_clip(self, run: Run) -> None:
        if run.planning:
            return
        named = {id(p): f"{group.name}: {name}" for group in run.groups for name, p in group.parameters.items()}
        for name, parameter in run.model.named_parameters():
            if id(parameter) not in named and parameter.grad is not None:
                size = float(parameter.grad.abs().max()) if parameter.numel() else 0.0
                self.strays.append(f"step {run.step + 1}: {name}, largest gradient {size:.3g}")
        for parameter in run.trainable:
            name, gradient = named[id(parameter)], parameter.grad
            self.largest.setdefault(name, None)
            if gradient is not None and gradient.numel():
                sizes = gradient.abs()
                self.largest[name] = max(self.largest[name] or 0.0, float(sizes.max()))
                sizes = sizes.masked_fill(sizes == 0, float("inf"))
                before = self.smallest.get(name, sizes)
                self.smallest[name] = torch.minimum(before, sizes) if before.shape == sizes.shape else sizes

    def changed_base(self) -> list[str]:
        """Return the tensors of the base that have changed, each with the largest difference."""
        changed = []
        for name, (live, before) in self.base_tensors.items():
            if live.shape != before.shape or not same_bytes(live, before):
                changed.append(f"{name} by {distance(live, before):.3g}")
        return changed


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors of a model, including the constants of a quantiser, sharing its memory."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are bitwise identical."""
    first, second = first.detach().cpu().contiguous(), second.detach().cpu().contiguous()
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def distance(first: Tensor, second: Tensor) -> float:
    """Return the largest absolute difference; infinite if shapes differ."""
    if first.shape != second.shape:
        return float("inf")
    if not first.numel():
        return 0.0
    return float((first.detach().double().cpu() - second.detach().double().cpu()).abs().max())


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return modules, their hooks, training modes and requires_grad flags, which a step must not change."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    state: dict[str, Any] = {}
    for path, module in model.named_modules():
        label = path or "the model"
        state[f"module {label}"] = id(module)
        state[f"training mode of {label}"] = module.training
        for kind in kinds:
            state[f"{kind.strip('_').replace('_', ' ')} of {label}"] = tuple(getattr(module, kind))
    for name, parameter in model.named_parameters():
        state[f"requires_grad of {name}"] = parameter.requires_grad
    return state


def _last_norm(model: nn.Module) -> nn.Module:
    """Return the last norm of the model's body, which runs once per forward pass."""
    body = getattr(model, getattr(model, "base_model_prefix", "") or "-", model)
    norms = [module for path, module in body.named_modules() if "norm" in path.split(".")[-1].lower()]
    if not norms:
        raise InputError("the conformance kit finds no norm in the model that prepare_model returned")
    return norms[-1]


def named_parameters(run: Run) -> dict[str, Tensor]:
    """Return copies of the trained parameters, by group and name."""
    return {f"{g.name}: {name}": p.detach().clone() for g in run.groups for name, p in g.parameters.items()}


def farthest(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> tuple[str, float]:
    """Return the name of the tensor that differs most between two runs, and the difference.

    The difference of a tensor that only one of them has is infinite.
    """
    names: Sequence[str] = [*first, *(name for name in second if name not in first)]
    gaps = {n: distance(first[n], second[n]) if n in first and n in second else float("inf") for n in names}
    worst = max(gaps, key=lambda name: gaps[name])
    return worst, gaps[worst]

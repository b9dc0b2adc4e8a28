"""One micro-step: forward, loss terms, backward; and what a step offers to strategies that perturb or compare.

The head runs only where there is a label, a chunk of positions at a time: its gradient with respect to the decoder's
output is gathered chunk by chunk, and one backward pass then goes through the decoder. So the full logits never exist.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from budwood.contract.registry import Composition, PluginError
from budwood.contract.strategy import hookimpl
from budwood.contract.types import LossTerm, Outputs, Run, Step
from budwood.model.tasks import CHUNK, autocast


class Engine:
    """Core's implementation of `backward`, and of `Step.forward`, `replay` and `noise_gradient`."""

    def __init__(self, run: Run, hooks: Composition) -> None:
        self.run, self.hooks = run, hooks
        self.loss_scale: Tensor | float = 1.0
        self.sums: dict[str, Tensor] = {}
        """Clean sum of each loss term over the optimizer step's micro-steps on this process, by name."""
        self.terms: dict[str, tuple[str, float]] = {}
        """Unit and weight of each loss term, by name."""

    @hookimpl
    def backward(self, step: Step) -> None:
        """Forward, all loss terms times `step.main_weight`, backward; the terms' clean values are logged."""
        noise = None
        if step.track_noise:
            noise = self._zero_noise(step)
        gradient = self._run(step, noise, step.main_weight, main=True)
        if step.track_noise:
            step.noise_grad = gradient

    def noisy_forward(self, step: Step, noise: Tensor | None) -> Outputs:
        """See `Step.forward`."""
        with _replaying(step, noise), autocast(self.run):
            outputs: Outputs = self.hooks.call("forward", step=step)
        return outputs

    def replay(self, step: Step, noise: Tensor | None, weight: float) -> None:
        """See `Step.replay`."""
        with _replaying(step, noise):
            self._run(step, None, weight, main=False)

    def noise_gradient(self, step: Step, noise: Tensor) -> Tensor:
        """See `Step.noise_gradient`."""
        leaf = noise.detach().requires_grad_()
        with _replaying(step, None):
            gradient = self._run(step, leaf, 1.0, main=False, parameters=False)
        assert gradient is not None
        return gradient

    def _zero_noise(self, step: Step) -> Tensor:
        width = self.run.model.get_input_embeddings().weight.shape[-1]
        return torch.zeros(*step.batch.input_ids.shape, width, device=self.run.device, requires_grad=True)

    def _run(
        self, step: Step, leaf: Tensor | None, weight: float, main: bool, parameters: bool = True
    ) -> Tensor | None:
        """Forward, terms, backward. Returns the gradient of the unscaled loss with respect to `leaf`, if given."""
        outer = step.noise
        if leaf is not None:
            step.noise = leaf if outer is None else outer + leaf
        try:
            with autocast(self.run):
                outputs: Outputs = self.hooks.call("forward", step=step)
                grad_hidden = self._head(step, outputs, weight, main, parameters)
                extra = self._other_terms(step, outputs, weight, main)
        finally:
            step.noise = outer
        tensors, gradients = [], []
        if outputs.hidden.requires_grad and grad_hidden is not None:
            tensors, gradients = [outputs.hidden], [grad_hidden]
        if extra is not None and extra.requires_grad:
            tensors, gradients = [*tensors, extra], [*gradients, torch.ones_like(extra)]
        if not tensors:
            return None if leaf is None else torch.zeros_like(leaf)
        if parameters:
            torch.autograd.backward(tensors, gradients)
            return None if leaf is None or leaf.grad is None else leaf.grad / self.loss_scale
        assert leaf is not None
        (gradient,) = torch.autograd.grad(tensors, [leaf], gradients)
        return gradient / self.loss_scale

    def _head(self, step: Step, outputs: Outputs, weight: float, main: bool, parameters: bool) -> Tensor | None:
        """Run the head and the token terms in chunks; returns the gradient with respect to `outputs.hidden`."""
        hidden = outputs.hidden
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        grad = torch.zeros_like(flat) if hidden.requires_grad else None
        positions = torch.arange(len(step.batch.labels), device=flat.device)
        for chunk in positions.split(CHUNK):
            where = step.batch.label_positions[chunk]
            rows = flat[where].requires_grad_(grad is not None)
            logits = outputs.head(rows)
            terms = _flatten(self.hooks.call("token_terms", step=step, logits=logits, positions=chunk))
            _check_terms(terms, "token_terms", {"label": (len(chunk),)})
            loss = self._loss(terms, weight, main)
            if loss is None or not loss.requires_grad:
                continue
            if parameters:
                loss.backward()
                found = rows.grad
            else:
                (found,) = torch.autograd.grad(loss, [rows])
            if grad is not None and found is not None:
                grad.index_add_(0, where, found)
        return None if grad is None else grad.view_as(hidden)

    def _other_terms(self, step: Step, outputs: Outputs, weight: float, main: bool) -> Tensor | None:
        terms = _flatten(self.hooks.call("loss_terms", step=step, outputs=outputs))
        _check_terms(terms, "loss_terms", {"example": (len(step.batch.example_ids),), "step": ()})
        once = main and step.micro_step == 0 and self.run.process_index == 0
        per_example = self._loss([t for t in terms if t.unit != "step"], weight, main)
        per_step = self._loss([t for t in terms if t.unit == "step"], 1.0, main) if once else None
        found = [loss for loss in (per_example, per_step) if loss is not None]
        return sum(found[1:], found[0]) if found else None

    def _loss(self, terms: list[LossTerm], weight: float, main: bool) -> Tensor | None:
        """Weighted sum of the terms, each divided by its unit's count in the optimizer step, times the loss scale."""
        total = None
        for term in terms:
            count = 1 if term.unit == "step" else self.run.counts[term.unit]
            if main:
                previous = self.sums.get(term.name)
                clean = term.values.detach().float().sum()
                self.sums[term.name] = clean if previous is None else previous + clean
                self.terms[term.name] = (term.unit, term.weight)
            loss = term.values.float().sum() * (term.weight * weight / count)
            total = loss if total is None else total + loss
        return None if total is None else total * self.loss_scale

    def finish_step(self) -> dict[str, Tensor]:
        """Mean of each loss term over the optimizer step and all processes, and their weighted sum "loss"; resets."""
        values: dict[str, Tensor] = {}
        if self.run.processes > 1:
            names: list[Any] = [None] * self.run.processes
            torch.distributed.all_gather_object(names, self.terms)
            self.terms = {name: how for known in names for name, how in known.items()}
            for name in sorted(self.terms):
                self.sums.setdefault(name, torch.zeros((), device=self.run.device))
                torch.distributed.all_reduce(self.sums[name])
        loss = torch.zeros((), device=self.run.device)
        for name, total in self.sums.items():
            unit, weight = self.terms[name]
            values[name] = total / (1 if unit == "step" else self.run.counts[unit])
            loss = loss + weight * values[name]
        self.sums = {}
        return {"loss": loss, **values}


@contextmanager
def _replaying(step: Step, noise: Tensor | None) -> Any:
    outer = (step.noise, step.replaying)
    step.noise, step.replaying = (noise if noise is not None else outer[0]), True
    try:
        yield
    finally:
        step.noise, step.replaying = outer


def _flatten(results: Iterable[Any]) -> list[LossTerm]:
    """Terms from hook results, each a LossTerm or a list of them, names unique."""
    terms: list[LossTerm] = []
    for result in results:
        terms += [result] if isinstance(result, LossTerm) else result
    names = [term.name for term in terms]
    for name in names:
        if names.count(name) > 1:
            raise PluginError(f"two loss terms are called '{name}': rename one.")
    return terms


def _check_terms(terms: list[LossTerm], hook: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a term whose unit the hook does not take, or whose values have not the unit's shape.

    Raises:
        PluginError: it names the term.
    """
    for term in terms:
        if tuple(term.values.shape) != shapes.get(term.unit):
            wanted = " or ".join(f"{list(shape)} of unit '{unit}'" for unit, shape in shapes.items())
            found = f"{list(term.values.shape)} of unit '{term.unit}'"
            raise PluginError(f"loss term '{term.name}' of {hook}: values must be {wanted}, not {found}.")

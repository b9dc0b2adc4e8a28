"""One micro-step: forward, loss terms, backward; and what a step offers to strategies that perturb or compare.

The head runs only where there is a label, a chunk of positions at a time: its gradient with respect to the decoder's
output is gathered chunk by chunk, and one backward pass then goes through the decoder. So the full logits never exist.
So it is with a second forward that terms compare with the first (`Step.forward`): its backward, too, runs once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from budwood.contract.discovery import PluginError
from budwood.contract.registry import Composition
from budwood.contract.strategy import Strategy, hookimpl
from budwood.contract.types import LossTerm, Outputs, Run, Step, Terms
from budwood.errors import BudwoodError, describe, is_out_of_memory
from budwood.model.tasks import CHUNK, autocast


@dataclass
class _Pass:
    """What one forward, its terms and its backward gather.

    `compared` are the outputs of `Step.forward` inside it: (as the decoder gave them, the detached copy that the terms
    see). The copy's gradient gathers over the chunks.
    """

    loss: Tensor | None = None
    compared: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Engine:
    """Core's implementation of `backward`, and of `Step.forward`, `replay` and `noise_gradient`."""

    def __init__(self, run: Run, hooks: Composition) -> None:
        self.run, self.hooks = run, hooks
        self.loss_scale: Tensor | float = 1.0
        self.sums: dict[str, Tensor] = {}
        """Sum of each loss term in core's own passes over the optimizer step's micro-steps on this process, by name."""
        self.terms: dict[str, tuple[str, float]] = {}
        """Unit and weight of each loss term, by name."""
        self.owners: dict[str, tuple[Any, str]] = {}
        """The plugin and the hook that each loss term comes from, by name."""
        self._pass: _Pass | None = None

    @hookimpl
    def backward(self, step: Step) -> None:
        """Forward, all loss terms times `step.main_weight`, backward; the terms' values are logged."""
        noise = step.zero_noise().requires_grad_() if step.track_noise else None
        step.noise_grad = self._run(step, step.main_weight, noise, main=True)

    def noisy_forward(self, step: Step, noise: Tensor | None) -> Outputs:
        """See `Step.forward`."""
        with self.hooks.part("Step.forward"), _replaying(step, noise), autocast(self.run):
            outputs: Outputs = self.hooks.call("forward", step=step)
        if self._pass is None or not outputs.hidden.requires_grad:
            return outputs
        copy = outputs.hidden.detach().requires_grad_()
        self._pass.compared.append((outputs.hidden, copy))
        return Outputs(copy, outputs.head)

    def replay(self, step: Step, noise: Tensor | None, weight: float, gradient: bool) -> Tensor | None:
        """See `Step.replay`."""
        if not gradient:
            with self.hooks.part("Step.replay"), _replaying(step, noise):
                return self._run(step, weight)
        given = step.zero_noise() if noise is None else noise
        with self.hooks.part("Step.replay"), _replaying(step, None):
            return self._run(step, weight, given.detach().requires_grad_())

    def noise_gradient(self, step: Step, noise: Tensor, terms: Terms | None) -> Tensor:
        """See `Step.noise_gradient`."""
        with self.hooks.part("Step.noise_gradient"), _replaying(step, None), _frozen(self.run):
            gradient = self._run(step, 1.0, noise.detach().requires_grad_(), terms=terms)
        assert gradient is not None
        return gradient

    def _run(
        self, step: Step, weight: float, leaf: Tensor | None = None, main: bool = False, terms: Terms | None = None
    ) -> Tensor | None:
        """One pass. Returns the gradient of the unscaled loss with respect to `leaf`, which is added to the noise."""
        outer, outer_noise = self._pass, step.noise
        self._pass = current = _Pass()
        if leaf is not None:
            step.noise = leaf if outer_noise is None else outer_noise + leaf
        try:
            with autocast(self.run):
                outputs: Outputs = self.hooks.call("forward", step=step)
                grad_hidden = self._head(step, outputs, weight, main, terms)
                extra = None if terms else self._other_terms(step, outputs, weight, main)
        finally:
            step.noise, self._pass = outer_noise, outer
        step.loss = current.loss
        tensors, gradients = [], []
        if grad_hidden is not None:
            tensors, gradients = [outputs.hidden], [grad_hidden]
        if extra is not None and extra.requires_grad:
            tensors, gradients = [*tensors, extra], [*gradients, torch.ones_like(extra)]
        no_cast = torch.autocast(self.run.device.type, enabled=False)
        with no_cast, self._naming(step):  # a pass inside another's forward stands in autocast
            if tensors:
                torch.autograd.backward(tensors, gradients)
            # Behind the pass's own outputs, since a term that needs no head may send its gradient to a copy there.
            found = [(hidden, copy.grad) for hidden, copy in current.compared if copy.grad is not None]
            if found:
                torch.autograd.backward([hidden for hidden, _ in found], [gradient for _, gradient in found])
        if leaf is None:
            return None
        return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad / self.loss_scale

    def _head(self, step: Step, outputs: Outputs, weight: float, main: bool, terms: Terms | None) -> Tensor | None:
        """Run the head and the token terms in chunks; returns the gradient with respect to `outputs.hidden`."""
        hidden = outputs.hidden
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        grad = torch.zeros_like(flat) if hidden.requires_grad else None
        positions = torch.arange(len(step.batch.labels), device=flat.device)
        for chunk in positions.split(CHUNK):
            where = step.batch.label_positions[chunk]
            rows = flat[where].requires_grad_(grad is not None)
            logits = outputs.head(rows)
            if terms is None:
                given = self._terms(step, "token_terms", {"label": (len(chunk),)}, logits=logits, positions=chunk)
            else:
                given = [LossTerm("terms", terms(logits, chunk))]
            loss = self._loss(given, weight, main)
            if loss is None or not loss.requires_grad:
                continue
            with self._naming(step):
                loss.backward()
            if grad is not None and rows.grad is not None:
                grad.index_add_(0, where, rows.grad)
        return None if grad is None else grad.view_as(hidden)

    def _other_terms(self, step: Step, outputs: Outputs, weight: float, main: bool) -> Tensor | None:
        shapes = {"example": (len(step.batch.example_ids),), "step": ()}
        terms = self._terms(step, "loss_terms", shapes, outputs=outputs)
        once = main and step.micro_step == 0 and self.run.process_index == 0
        per_example = self._loss([t for t in terms if t.unit != "step"], weight, main)
        per_step = self._loss([t for t in terms if t.unit == "step"], 1.0, main) if once else None
        found = [loss for loss in (per_example, per_step) if loss is not None]
        return sum(found[1:], found[0]) if found else None

    def _terms(self, step: Step, hook: str, shapes: dict[str, tuple[int, ...]], **arguments: Any) -> list[LossTerm]:
        """Ask for the loss terms of `hook`; `shapes` are those of the values by the units that it takes.

        Raises:
            PluginError: a unit that the hook does not take, values of another shape, or a name that another term has.
        """
        terms: list[LossTerm] = []
        for plugin, result in self.hooks.collect(hook, step=step, **arguments):
            for term in [result] if isinstance(result, LossTerm) else result:
                if tuple(term.values.shape) != shapes.get(term.unit):
                    wanted = " or ".join(f"{list(shape)} of unit '{unit}'" for unit, shape in shapes.items())
                    found = f"{list(term.values.shape)} of unit '{term.unit}'"
                    raise PluginError(
                        f"{plugin}: loss term '{term.name}' of {hook}: values must be {wanted}, not {found}."
                    )
                owner, origin = self.owners.setdefault(term.name, (plugin, hook))
                if owner is not plugin or origin != hook or any(other.name == term.name for other in terms):
                    raise PluginError(f"{owner} and {plugin}: two loss terms are called '{term.name}': rename one.")
                terms.append(term)
        return terms

    @contextmanager
    def _naming(self, step: Step) -> Iterator[None]:
        """Name the loss terms in an error of autograd, which knows none; where only the task has some, it is core's."""
        try:
            yield
        except Exception as error:
            tells = isinstance(error, BudwoodError | OSError) or is_out_of_memory(error)
            own = any(isinstance(plugin, Strategy) for plugin, _ in self.owners.values())
            if tells or not own or self.hooks.culprit(error) is not None:
                raise
            named = ", ".join(f"'{name}' of {plugin}" for name, (plugin, _) in self.owners.items())
            raise PluginError(
                f"step {step.run.step + 1}: the backward of the loss terms {named} fails: {describe(error)}. "
                "--debug shows the traceback."
            ) from error

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
            loss = term.values.float().sum() * (term.weight / count)
            if term.unit != "step" and self._pass is not None:
                plain, before = loss.detach(), self._pass.loss
                self._pass.loss = plain if before is None else before + plain
            total = loss * weight if total is None else total + loss * weight
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
        self.sums, self.terms = {}, {}
        return {"loss": loss, **values}


@contextmanager
def _replaying(step: Step, noise: Tensor | None) -> Iterator[None]:
    """Put `noise`, and no other, on the step."""
    outer = (step.noise, step.replaying)
    step.noise, step.replaying = noise, True
    try:
        yield
    finally:
        step.noise, step.replaying = outer


@contextmanager
def _frozen(run: Run) -> Iterator[None]:
    """Let nothing train inside the context, so that the noise alone has a gradient and no layer keeps its input."""
    parameters = run.trainable
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)

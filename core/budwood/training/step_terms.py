"""Losses across the examples of an optimizer step, however it is split into micro-batches and over processes.

Each micro-batch's values are gathered without a graph, the loss is differentiated with respect to them once, and every
pass of a micro-batch then goes back with these coefficients (Gao et al., 2021, "Scaling deep contrastive learning batch
size under memory limited setup", section 3.2). A single micro-batch that nobody perturbs needs no pass of its own.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from budwood.contract.discovery import PluginError
from budwood.contract.registry import Composition
from budwood.contract.strategy import Strategy
from budwood.contract.types import LossTerm, Outputs, Run, Step
from budwood.model.evaluation import at_least_fp32

if TYPE_CHECKING:
    from budwood.training.step import Engine

Values = dict[str, Tensor]


class StepTerms:
    """The `step_terms` of a composition, and their coefficients in the current optimizer step.

    Attributes:
        active: whether a strategy has any.
    """

    def __init__(self, run: Run, hooks: Composition, engine: Engine) -> None:
        self.run, self.hooks, self.engine = run, hooks, engine
        calls = hooks.calls("step_terms")
        self.active = bool(calls)
        givers = {call.plugin for call in hooks.calls("step_values")}
        for call in calls:
            if call.plugin not in givers:
                raise PluginError(f"{call.plugin} implements step_terms without step_values: it would have no values.")
        wraps = [c for name in ("backward", "forward") for c in hooks.calls(name) if c.wraps]
        self._perturbed = any(isinstance(call.plugin, Strategy) for call in wraps)
        self._coefficients: dict[int, dict[str, Values]] | None = None
        """By micro-step and strategy; None until they are known."""
        self._found: list[dict[str, Values]] = []
        self._random: dict[int, list[Tensor]] = {}

    def forget(self) -> None:
        """Begin an optimizer step."""
        self._coefficients, self._found, self._random = None, [], {}

    def gathers(self, micro_batches: int) -> bool:
        """Whether the coefficients need passes of their own, if this process has so many micro-batches."""
        return self.active and (self.run.processes > 1 or micro_batches > 1 or self._perturbed)

    def look(self, step: Step) -> None:
        """Take a micro-batch's values, from a pass without a graph."""
        self._random[step.micro_step] = _random_state(self.run)
        self._found.append(self.engine.look(step, partial(self._values, step)))

    def exchange(self) -> None:
        """Find the coefficients of every micro-batch, once each process has taken the values of all of its own."""
        everyone: list[Any] = [self._found]
        if self.run.processes > 1:
            mine = [{name: {k: v.cpu() for k, v in each[name].items()} for name in each} for each in self._found]
            everyone = [None] * self.run.processes
            torch.distributed.all_gather_object(everyone, mine)
        coefficients = self._differentiate([each for process in everyone for each in process])
        first = sum(len(process) for process in everyone[: self.run.process_index])
        self._coefficients = {index: coefficients[first + index] for index in range(len(self._found))}
        self._found = []

    def restore_random(self, step: Step) -> None:
        """Let a micro-batch's passes draw the dropout that its values were gathered with."""
        if step.micro_step in self._random:
            _set_random_state(self.run, self._random.pop(step.micro_step))

    def surrogate(self, step: Step, outputs: Outputs, log_probs: Tensor | None, weight: float) -> Tensor | None:
        """A scalar whose gradient is that of the step's loss through this micro-batch, times weight and loss scale."""
        if not self.active:
            return None
        values = self._values(step, outputs, log_probs)
        if self._coefficients is None:
            (found,) = self._differentiate([values])
            self._coefficients = {step.micro_step: found}
        total = None
        for name, given in self._coefficients[step.micro_step].items():
            for key, coefficient in given.items():
                if values[name][key].shape != coefficient.shape:
                    raise PluginError(f"strategy '{name}': step_values: '{key}' changes its shape from pass to pass.")
                part = (at_least_fp32(values[name][key]) * coefficient).sum()
                total = part if total is None else total + part
        if total is None:
            return None
        self.engine.add_to_pass(total)
        return total * weight * self.engine.loss_scale

    def _values(self, step: Step, outputs: Outputs, log_probs: Tensor | None) -> dict[str, Values]:
        asked = self.hooks.collect("step_values", step=step, outputs=outputs, log_probs=log_probs)
        return {plugin.name: values for plugin, values in asked}

    def _differentiate(self, micro_batches: list[dict[str, Values]]) -> list[dict[str, Values]]:
        """Gradient of every strategy's step terms with respect to the values of each micro-batch; logs the terms."""
        device = self.run.device
        coefficients: list[dict[str, Values]] = [{} for _ in micro_batches]
        for name in dict.fromkeys(name for each in micro_batches for name in each):
            holders = [i for i, each in enumerate(micro_batches) if name in each]
            keys = micro_batches[holders[0]][name].keys()
            whole: Values = {}
            for key in keys:
                parts = [micro_batches[i][name][key].detach().to(device) for i in holders]
                whole[key] = torch.cat(parts)
                if whole[key].is_floating_point():
                    whole[key] = at_least_fp32(whole[key]).requires_grad_()
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                plugin, result = self.hooks.ask("step_terms", name, run=self.run, values=whole)
                terms = [result] if isinstance(result, LossTerm) else list(result or ())
                for index, term in enumerate(terms):
                    self._check(plugin, term, terms[:index])
                losses = [term.values * term.weight for term in terms]
                if losses:
                    torch.autograd.backward(losses)
            for key, value in whole.items():
                if value.grad is not None:
                    sizes = [len(micro_batches[i][name][key]) for i in holders]
                    for i, part in zip(holders, value.grad.split(sizes), strict=True):
                        coefficients[i].setdefault(name, {})[key] = part
        return coefficients

    def _check(self, plugin: Any, term: LossTerm, others: list[LossTerm]) -> None:
        if term.unit != "step" or term.values.ndim != 0:
            raise PluginError(
                f"{plugin}: loss term '{term.name}' of step_terms must be a scalar of unit 'step', not "
                f"{list(term.values.shape)} of unit '{term.unit}'."
            )
        if not term.values.requires_grad:
            raise PluginError(f"{plugin}: loss term '{term.name}' of step_terms does not depend on its values.")
        self.engine.own(plugin, "step_terms", term)
        if any(other.name == term.name for other in others):
            raise PluginError(f"{plugin}: two loss terms of step_terms are called '{term.name}': rename one.")
        first = self.run.process_index == 0
        self.engine.add(term, term.values.detach() if first else torch.zeros_like(term.values))


def _random_state(run: Run) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(run.device)] if run.device.type == "cuda" else states


def _set_random_state(run: Run, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if run.device.type == "cuda":
        torch.cuda.set_rng_state(states[1], run.device)

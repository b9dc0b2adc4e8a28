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
        self.active = bool(hooks.calls("step_terms"))
        wraps = [c for name in ("backward", "forward") for c in hooks.calls(name) if c.wraps]
        self._perturbed = any(isinstance(call.plugin, Strategy) for call in wraps)
        self._coefficients: dict[int, dict[str, Values]] | None = None
        """By micro-step and strategy; None until they are known."""
        self._random: dict[int, list[Tensor]] = {}

    def forget(self) -> None:
        """Begin an optimizer step."""
        self._coefficients, self._random = None, {}

    def gather(self, steps: list[Step]) -> None:
        """Find the coefficients of every micro-batch from passes without a graph, if passes of their own are needed."""
        if not self.active or not (self.run.processes > 1 or len(steps) > 1 or self._perturbed):
            return
        found: list[dict[str, Values]] = []
        for step in steps:
            self._random[step.micro_step] = _random_state(self.run)
            found.append(self.engine.look(step, partial(self._values, step)))
        everyone: list[Any] = [found]
        if self.run.processes > 1:
            mine = [{name: {k: v.cpu() for k, v in values.items()} for name, values in each.items()} for each in found]
            everyone = [None] * self.run.processes
            torch.distributed.all_gather_object(everyone, mine)
        flat = [each for process in everyone for each in process]
        coefficients = self._differentiate(flat)
        first = sum(len(process) for process in everyone[: self.run.process_index])
        self._coefficients = {s.micro_step: coefficients[first + i] for i, s in enumerate(steps)}

    def restore_random(self, step: Step) -> None:
        """Let a micro-batch's passes draw the dropout that its values were gathered with."""
        if step.micro_step in self._random:
            _set_random_state(self.run, self._random.pop(step.micro_step))

    def surrogate(self, step: Step, outputs: Outputs, log_probs: Tensor | None, weight: float) -> Tensor | None:
        """A scalar whose gradient is that of the step's loss through this micro-batch, times `weight`, unscaled."""
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
                part = (values[name][key] * coefficient.to(values[name][key])).sum()
                total = part if total is None else total + part
        if total is None:
            return None
        self.engine.add_to_pass(total)
        return total * weight

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
                    whole[key].requires_grad_()
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                plugin, result = self.hooks.ask("step_terms", name, run=self.run, values=whole)
                terms = [result] if isinstance(result, LossTerm) else list(result or ())
                for term in terms:
                    self._check(plugin, term)
                losses = [term.values * term.weight for term in terms]
                if losses:
                    torch.autograd.backward(losses)
            for key, value in whole.items():
                if value.grad is not None:
                    sizes = [len(micro_batches[i][name][key]) for i in holders]
                    for i, part in zip(holders, value.grad.split(sizes), strict=True):
                        coefficients[i].setdefault(name, {})[key] = part
        return coefficients

    def _check(self, plugin: Any, term: LossTerm) -> None:
        if term.unit != "step" or term.values.ndim != 0:
            raise PluginError(
                f"{plugin}: loss term '{term.name}' of step_terms must be a scalar of unit 'step', not "
                f"{list(term.values.shape)} of unit '{term.unit}'."
            )
        if not term.values.requires_grad:
            raise PluginError(f"{plugin}: loss term '{term.name}' of step_terms does not depend on its values.")
        self.engine.own(plugin, "step_terms", term)
        first = self.run.process_index == 0
        self.engine.add(term, term.values.detach() if first else torch.zeros_like(term.values))


def _random_state(run: Run) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(run.device)] if run.device.type == "cuda" else states


def _set_random_state(run: Run, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if run.device.type == "cuda":
        torch.cuda.set_rng_state(states[1], run.device)

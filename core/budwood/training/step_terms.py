"""Losses across all examples of an optimizer step, independent of its split into micro-batches and processes.

A first pass collects each micro-batch's values without a graph. The loss is differentiated with respect to them once,
and every later pass of a micro-batch backpropagates these coefficients (Gao et al., 2021, "Scaling deep contrastive
learning batch size under memory limited setup", section 3.2). A single unperturbed micro-batch needs no first pass.
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
from budwood.training.label_scores import LogProbs, temperature_of

if TYPE_CHECKING:
    from budwood.training.step import Engine

Values = dict[str, Tensor]
LOG_PROBS = "reference log-probabilities"
"""Key of `Step.cache`."""


class StepTerms:
    """The `step_terms` of a composition, and their coefficients in the current optimizer step.

    Attributes:
        active: whether a strategy implements `step_terms`.
    """

    def __init__(self, run: Run, hooks: Composition, engine: Engine) -> None:
        self.run, self.hooks, self.engine = run, hooks, engine
        calls = hooks.calls("step_terms")
        self.active = bool(calls)
        self._valued = {call.plugin for call in hooks.calls("step_values")}
        for call in calls:
            if call.plugin not in self._valued:
                raise PluginError(f"{call.plugin} implements step_terms without step_values: it would have no values.")
        self._names = {call.plugin: call.name for call in hooks.calls("step_values")}
        wraps = [c for name in ("backward", "forward") for c in hooks.calls(name) if c.wraps]
        self._perturbed = any(isinstance(call.plugin, Strategy) for call in wraps)
        self._coefficients: dict[int, dict[str, Values]] | None = None
        """Per micro-step and strategy; None until they are computed."""
        self._collected: list[dict[str, Values]] = []
        self._random: dict[int, list[Tensor]] = {}
        self._references: dict[int, Tensor] = {}

    def reset(self) -> None:
        """Start a new optimizer step."""
        self._coefficients, self._collected, self._random, self._references = None, [], {}, {}

    def needs_first_pass(self, micro_batches: int) -> bool:
        """Whether the coefficients need a separate first pass, for this number of micro-batches on this process."""
        return self.active and (self.run.processes > 1 or micro_batches > 1 or self._perturbed)

    def collect(self, step: Step) -> None:
        """Collect a micro-batch's values from a pass without a graph, and keep the reference's log-probabilities."""
        self._random[step.micro_step] = _random_state(self.run)
        self._collected.append(self.engine.evaluate_without_graph(step, partial(self._values, step)))
        if LOG_PROBS in step.cache:
            self._references[step.micro_step] = step.cache[LOG_PROBS]

    def restore_reference(self, step: Step) -> None:
        """Give the step the log-probabilities that its first pass computed: the reference has not changed since."""
        if step.micro_step in self._references:
            step.cache[LOG_PROBS] = self._references.pop(step.micro_step)

    def has_reference(self, plugin: Any, step: Step) -> bool:
        """Whether the first pass has computed the log-probabilities that a strategy reads of the reference."""
        return LOG_PROBS in step.cache and plugin in self._valued

    def exchange(self) -> None:
        """Compute the coefficients of every micro-batch, after each process has collected the values of its own."""
        gathered = [self._collected]
        if self.run.processes > 1:
            own = [{name: {k: v.cpu() for k, v in each[name].items()} for name in each} for each in self._collected]
            gathered = self.run.world.gather(own)
        coefficients = self._differentiate([each for process in gathered for each in process])
        first = sum(len(process) for process in gathered[: self.run.process_index])
        self._coefficients = {index: coefficients[first + index] for index in range(len(self._collected))}
        self._collected = []

    def restore_random(self, step: Step) -> None:
        """Restore the random state of the micro-batch's first pass, so that later passes draw the same dropout."""
        if step.micro_step in self._random:
            _set_random_state(self.run, self._random.pop(step.micro_step))

    def surrogate(self, step: Step, outputs: Outputs, log_probs: LogProbs | None, weight: float) -> Tensor | None:
        """Return a scalar with the gradient of the step's loss in this micro-batch, times weight and loss scale."""
        if not self.active:
            return None
        values = self._values(step, outputs, log_probs)
        if self._coefficients is None:
            (coefficients,) = self._differentiate([values])
            self._coefficients = {step.micro_step: coefficients}
        total = None
        for name, by_key in self._coefficients[step.micro_step].items():
            for key, coefficient in by_key.items():
                if values[name][key].shape != coefficient.shape:
                    raise PluginError(f"strategy '{name}': step_values: the shape of '{key}' differs between passes.")
                part = (at_least_fp32(values[name][key]) * coefficient).sum()
                total = part if total is None else total + part
        if total is None:
            return None
        self.engine.add_to_pass(total)
        return total * weight * self.engine.loss_scale

    def _values(self, step: Step, outputs: Outputs, log_probs: LogProbs | None) -> dict[str, Values]:
        own = {"log_probs": lambda plugin: None if log_probs is None else log_probs[temperature_of(plugin)]}
        results = self.hooks.collect("step_values", own, step=step, outputs=outputs)
        return {self._names[plugin]: values for plugin, values in results}

    def _differentiate(self, micro_batches: list[dict[str, Values]]) -> list[dict[str, Values]]:
        """Differentiate each strategy's step terms with respect to each micro-batch's values; logs the terms."""
        device = self.run.device
        coefficients: list[dict[str, Values]] = [{} for _ in micro_batches]
        for name in dict.fromkeys(name for each in micro_batches for name in each):
            holders = [i for i, each in enumerate(micro_batches) if name in each]
            keys = micro_batches[holders[0]][name].keys()
            joined: Values = {}
            for key in keys:
                parts = [micro_batches[i][name][key].detach().to(device) for i in holders]
                joined[key] = torch.cat(parts)
                if joined[key].is_floating_point():
                    joined[key] = at_least_fp32(joined[key]).requires_grad_()
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                plugin, result = self.hooks.ask("step_terms", name, run=self.run, values=joined)
                terms = [result] if isinstance(result, LossTerm) else list(result or ())
                for index, term in enumerate(terms):
                    self._check(plugin, term, terms[:index])
                losses = [term.values * term.weight for term in terms]
                if losses:
                    torch.autograd.backward(losses)
            for key, value in joined.items():
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
        self.engine.register_owner(plugin, "step_terms", term)
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

"""One micro-step: forward, loss terms and backward, plus the extra passes that `Step` offers to strategies.

The head runs only at label positions, one chunk at a time. The gradient with respect to the decoder's output is
accumulated chunk by chunk, and a single backward pass then runs through the decoder, so the full logits never exist.
The same chunks provide the log-probabilities for loss terms that depend on them (`label_scores`). A second forward pass
that loss terms compare with the first (`Step.forward`) works the same way: its backward also runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from budwood.contract.discovery import PluginError
from budwood.contract.registry import Composition
from budwood.contract.strategy import Strategy, hookimpl
from budwood.contract.types import UNITS, LossTerm, Outputs, Reference, Run, Step, Terms, Which
from budwood.errors import BudwoodError, describe, is_out_of_memory
from budwood.model.evaluation import at_least_fp32, autocast, head_rows
from budwood.model.halves.labels import labels_alone
from budwood.training.label_scores import LabelScores, LogProbs, chunks, depends, temperature_of
from budwood.training.reference import CACHED, is_off, log_probs_of, read_reference
from budwood.training.step_terms import LOG_PROBS, StepTerms, is_beside


@dataclass
class _Pass:
    """State of one forward pass, its loss terms and its backward pass.

    `compared` holds the outputs of `Step.forward` calls inside the pass, as pairs of the decoder's output and the
    detached copy that the loss terms use. The copy's gradient accumulates over the chunks.
    """

    loss: Tensor | None = None
    compared: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class _Root(torch.autograd.Function):
    """The root of a backward pass that begins with the gradient of the decoder's output.

    `torch.autograd.backward` would hold that gradient, and the output, until the pass ends: two hidden states of all
    positions. The box gives its gradient away.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, box: list[Tensor]) -> Tensor:
        ctx.box = box
        return hidden.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.box.pop(), None


class Engine:
    """Core's implementation of the `backward` hook and of the methods of `Step`.

    Attributes:
        scores_sequences: whether a strategy's loss terms need the labels' log-probabilities.
        step_terms: losses across the examples of an optimizer step.
        sums: per loss term, its sum over this process's micro-steps of the optimizer step, from core's main pass only.
        terms: unit and weight per loss term.
        owners: plugin and hook that return each loss term.
    """

    def __init__(self, run: Run, hooks: Composition) -> None:
        self.run, self.hooks = run, hooks
        self.loss_scale: Tensor | float = 1.0
        self.sums: dict[str, Tensor] = {}
        self.terms: dict[str, tuple[str, float]] = {}
        self.owners: dict[str, tuple[Any, str]] = {}
        self.step_terms = StepTerms(run, hooks, self)
        receivers = [
            call.plugin
            for hook in ("sequence_terms", "step_values")
            for call in hooks.calls(hook)
            if (hook == "step_values" and not is_beside(call.plugin)) or isinstance(call.plugin, Strategy)
        ]
        strategies = any(isinstance(call.plugin, Strategy) for call in hooks.calls("sequence_terms"))
        self.scores_sequences = strategies or (self.step_terms.scored and run.task.has_log_probs())
        if receivers and run.task.loss_is_log_prob():
            receivers.append(run.task)  # whose loss is then one of log-probabilities too
        self.temperatures = sorted({temperature_of(plugin) for plugin in receivers})
        self._pass: _Pass | None = None
        self._frozen = False
        self._head_trains: bool | None = None

    def begin(self, step: Step) -> None:
        """Compute the references that strategies declare, before a forward pass of the micro-step holds activations."""
        for strategy in self.run.strategies:
            cached = strategy.caches_reference and CACHED in step.batch.columns
            if strategy.uses_reference and not cached and not self.step_terms.has_reference(strategy, step):
                self.reference(step, strategy.uses_reference)

    @hookimpl
    def backward(self, step: Step) -> None:
        """Run forward and backward on all loss terms times `step.main_weight`; the terms' values are logged."""
        noise = step.zero_noise().requires_grad_() if step.track_noise else None
        step.noise_grad = self._run(step, step.main_weight, noise, main=True)

    def noisy_forward(self, step: Step, noise: Tensor | None) -> Outputs:
        """See `Step.forward`."""
        with self.hooks.part("Step.forward"), _replaying(step, noise, compared=True), autocast(self.run):
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
        leaf = step.zero_noise() if noise is None else noise
        with self.hooks.part("Step.replay"), _replaying(step, None):
            return self._run(step, weight, leaf.detach().requires_grad_())

    def noise_gradient(self, step: Step, noise: Tensor, terms: Terms | None) -> Tensor:
        """See `Step.noise_gradient`."""
        with self.hooks.part("Step.noise_gradient"), _replaying(step, None), self._freezing():
            gradient = self._run(step, 1.0, noise.detach().requires_grad_(), terms=terms)
        assert gradient is not None
        return gradient

    def reference(self, step: Step, which: Which) -> Reference:
        """See `Step.reference`."""
        key = f"reference {'base' if is_off(self.run, which) else which}"
        if key not in step.cache:
            with self.hooks.part("Step.reference"):
                step.cache[key] = read_reference(self.run, step.batch, which)
        reference: Reference = step.cache[key]
        return reference

    def reference_log_probs(self, step: Step) -> Tensor:
        """See `Step.reference_log_probs`."""
        if CACHED in step.batch.columns:
            return step.batch.columns[CACHED]
        if LOG_PROBS not in step.cache:
            step.cache[LOG_PROBS] = log_probs_of(self.run, self.reference(step, "start"))
        log_probs: Tensor = step.cache[LOG_PROBS]
        return log_probs

    def evaluate_without_graph(self, step: Step, function: Callable[[Outputs, LogProbs | None], Any]) -> Any:
        """Run a forward pass without a graph and return `function` of its outputs and the labels' log-probabilities."""
        with torch.no_grad(), autocast(self.run):
            outputs: Outputs = self.hooks.call("forward", step=step)
            if not self.scores_sequences:
                return function(outputs, None)
            size = self._chunk_rows()
            scores = LabelScores(self.run.task, step.batch, self.temperatures, size)
            for chunk, rows in chunks(step.batch, outputs.hidden.flatten(0, -2), size):
                scores.add(outputs.head(rows), chunk, rows, keep=False)
            return function(outputs, scores.values())

    def _run(
        self, step: Step, weight: float, leaf: Tensor | None = None, main: bool = False, terms: Terms | None = None
    ) -> Tensor | None:
        """Run one pass with `leaf` added to the noise; returns the unscaled loss's gradient with respect to `leaf`."""
        outer, outer_noise = self._pass, step.noise
        self._pass = current = _Pass()
        if leaf is not None:
            step.noise = leaf if outer_noise is None else outer_noise + leaf
        try:
            with autocast(self.run):
                with labels_alone(not self._others_read()):
                    outputs: Outputs = self.hooks.call("forward", step=step)
                grad_hidden = self._head(step, outputs, weight, main, terms)
                extra = None if terms else self._other_terms(step, outputs, weight, main)
        finally:
            step.noise, self._pass = outer_noise, outer
        step.loss = current.loss
        roots = [] if grad_hidden is None else [_Root.apply(outputs.hidden, [grad_hidden])]
        if extra is not None and extra.requires_grad:
            roots.append(extra)
        del outputs, grad_hidden, extra
        no_cast = torch.autocast(self.run.device.type, enabled=False)
        with no_cast, self._naming(step):  # a pass inside another pass's forward runs under autocast
            if roots:
                torch.autograd.backward(roots)
            # This backward comes second: the first may add to a copy's gradient, for a term that needs no head.
            roots = [_Root.apply(hidden, [copy.grad]) for hidden, copy in current.compared if copy.grad is not None]
            current.compared.clear()
            if roots:
                torch.autograd.backward(roots)
        if leaf is None:
            return None
        return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad / self.loss_scale

    def _others_read(self) -> bool:
        """Whether a hook receives the outputs, of which the head reads the label positions alone."""
        takes = any(self.hooks.receives(hook, "outputs") for hook in ("loss_terms", "step_values"))
        return takes or any(call.wraps for call in self.hooks.calls("forward"))

    def _chunk_rows(self) -> int:
        """The number of labels of which the head computes the logits at once."""
        users = len(self.hooks.calls("token_terms")) + (len(self.temperatures) if self.scores_sequences else 0)
        return head_rows(self.run, max(users, 1))

    def _head(self, step: Step, outputs: Outputs, weight: float, main: bool, terms: Terms | None) -> Tensor | None:
        """Run the head and its loss terms in chunks; returns the gradient with respect to `outputs.hidden`."""
        hidden = outputs.hidden
        flat = hidden.detach().flatten(0, -2)
        grad = torch.zeros_like(flat) if hidden.requires_grad else None
        scores, size = None, self._chunk_rows()
        if self.scores_sequences and terms is None:
            twice = self._trains_head(step, outputs, flat)
            scores = LabelScores(self.run.task, step.batch, self.temperatures, size, twice)
        for chunk, rows in chunks(step.batch, flat, size):
            rows.requires_grad_(grad is not None)
            logits = outputs.head(rows)
            if terms is None:
                chunk_terms = self._terms(step, "token_terms", {"label": (len(chunk),)}, logits=logits, positions=chunk)
            else:
                chunk_terms = [LossTerm("terms", terms(logits, chunk))]
            loss = self._loss(step, chunk_terms, weight, main, chunk)
            has_graph = loss is not None and loss.requires_grad
            if scores is not None:
                scores.add(logits, chunk, rows, keep=has_graph)
            if loss is not None and has_graph:
                with self._naming(step):
                    loss.backward()
                if grad is not None and rows.grad is not None:
                    grad.index_add_(0, step.batch.label_positions[chunk], rows.grad)
        if scores is not None:
            self._sequences(step, outputs, flat, grad, scores, weight, main)
        return None if grad is None else grad.view_as(hidden)

    def _sequences(
        self, step: Step, outputs: Outputs, flat: Tensor, grad: Tensor | None, scores: LabelScores,
        weight: float, main: bool,
    ) -> None:  # fmt: skip
        """Compute the terms of log-probabilities and of the optimizer step; adds their gradient to `grad`."""
        log_probs = {temperature: values.requires_grad_() for temperature, values in scores.values().items()}
        copy = flat.view_as(outputs.hidden).detach().requires_grad_(grad is not None)
        own = {"log_probs": lambda plugin: log_probs[temperature_of(plugin)]}
        terms = self._terms(step, "sequence_terms", self._shapes(step, "label"), own)
        self._check_reach(terms, log_probs)
        loss = self._loss(step, terms, weight, main)
        surrogate = self.step_terms.surrogate(step, Outputs(copy, outputs.head), log_probs, weight, beside=False)
        parts = [part for part in (loss, surrogate) if part is not None and part.requires_grad]
        if not parts:
            return
        with self._naming(step), torch.autocast(self.run.device.type, enabled=False):
            torch.autograd.backward(parts)
        if grad is not None and copy.grad is not None:
            grad += copy.grad.flatten(0, -2)
        coefficients = {t: values.grad for t, values in log_probs.items() if values.grad is not None}
        if coefficients:
            scores.backward(outputs.head, flat, grad, coefficients)

    def _other_terms(self, step: Step, outputs: Outputs, weight: float, main: bool) -> Tensor | None:
        terms = self._terms(step, "loss_terms", {**self._shapes(step), "step": ()}, outputs=outputs)
        first = main and step.micro_step == 0 and self.run.process_index == 0  # terms per step count once
        replayed = self._loss(step, [t for t in terms if t.unit != "step"], weight, main)
        per_step = self._loss(step, [t for t in terms if t.unit == "step"], 1.0, main) if first else None
        losses = [loss for loss in (replayed, per_step) if loss is not None]
        for beside in (True, False) if not self.scores_sequences else (True,):
            surrogate = self.step_terms.surrogate(step, outputs, None, weight, beside)
            losses += [surrogate] if surrogate is not None else []
        return sum(losses[1:], losses[0]) if losses else None

    def _trains_head(self, step: Step, outputs: Outputs, flat: Tensor) -> bool:
        """Whether the head has trainable parameters, which need a gradient beside that of the rows."""
        if self._frozen or not len(step.batch.labels):
            return False
        if self._head_trains is None:
            self._head_trains = bool(outputs.head(flat[step.batch.label_positions[:1]]).requires_grad)
        return self._head_trains

    def _shapes(self, step: Step, *more: str) -> dict[str, tuple[int, ...]]:
        """Shape of a term's values, per unit."""
        shapes = {"example": (len(step.batch.keys),), "group": (len(step.batch.groups),)}
        return {**shapes, **{unit: (len(step.batch.labels),) for unit in more}}

    def _terms(
        self, step: Step, hook: str, shapes: dict[str, tuple[int, ...]],
        per_plugin: dict[str, Callable[[Any], Any]] | None = None, **arguments: Any,
    ) -> list[LossTerm]:  # fmt: skip
        """Collect the loss terms of `hook`; `shapes` maps each unit that the hook accepts to the shape of its values.

        Raises:
            PluginError: a unit that the hook does not accept, values of the wrong shape, or a duplicate name.
        """
        terms: list[LossTerm] = []
        for plugin, result in self.hooks.collect(hook, per_plugin, step=step, **arguments):
            for term in [result] if isinstance(result, LossTerm) else result:
                counted = term.unit not in UNITS and term.unit in self.run.counts
                if not counted and tuple(term.values.shape) != shapes.get(term.unit):
                    expected = " or ".join(f"{list(shape)} of unit '{unit}'" for unit, shape in shapes.items())
                    actual = f"{list(term.values.shape)} of unit '{term.unit}'"
                    raise PluginError(
                        f"{plugin}: loss term '{term.name}' of {hook}: values must be {expected}, not {actual}."
                    )
                self.register_owner(plugin, hook, term)
                if any(other.name == term.name for other in terms):
                    raise PluginError(f"{plugin} and {plugin}: two loss terms are called '{term.name}': rename one.")
                terms.append(term)
        return terms

    def register_owner(self, plugin: Any, hook: str, term: LossTerm) -> None:
        """Record the plugin and hook of a loss term.

        Raises:
            PluginError: a term of another plugin or hook, or another logged value, has the same name.
        """
        if term.name not in self.owners:
            self.hooks.claim(term.name, plugin, hook)
        owner, origin = self.owners.setdefault(term.name, (plugin, hook))
        both = {origin, hook} == {"token_terms", "sequence_terms"}  # a task uses whichever is cheaper
        if owner is not plugin or (origin != hook and not both):
            raise PluginError(f"{owner} and {plugin}: two loss terms are called '{term.name}': rename one.")

    def _check_reach(self, terms: list[LossTerm], log_probs: LogProbs) -> None:
        """Reject a strategy's term without a graph, unless it is only logged: its gradient would silently be zero."""
        for term in (term for term in terms if term.weight):
            plugin, _ = self.owners[term.name]
            values = log_probs[temperature_of(plugin)]
            if len(values) and not depends(term.values, values):
                raise PluginError(
                    f"{plugin}: loss term '{term.name}' of sequence_terms has no graph to the log-probabilities: it "
                    "would train nothing. Compute it from `log_probs` without detaching them."
                )

    @contextmanager
    def _naming(self, step: Step) -> Iterator[None]:
        """Add the names of the loss terms to an autograd error; with only the task's terms it is core's own error."""
        try:
            yield
        except Exception as error:
            clear = isinstance(error, BudwoodError | OSError) or is_out_of_memory(error)
            from_strategy = any(isinstance(plugin, Strategy) for plugin, _ in self.owners.values())
            if clear or not from_strategy or self.hooks.culprit(error) is not None:
                raise
            terms = ", ".join(f"'{name}' of {plugin}" for name, (plugin, _) in self.owners.items())
            raise PluginError(
                f"step {step.run.step + 1}: the backward pass of the loss terms {terms} failed: {describe(error)}. "
                "--debug shows the traceback."
            ) from error

    def _loss(
        self, step: Step, terms: list[LossTerm], weight: float, main: bool, chunk: Tensor | None = None
    ) -> Tensor | None:
        """Weighted sum of the terms, each divided by its unit's count in the optimizer step, times the loss scale.

        Args:
            chunk: indices of the labels that values of unit "label" refer to; None: all labels.
        """
        total = None
        for term in terms:
            values = at_least_fp32(term.values)
            if term.unit == "label":
                values = values * (step.batch.weights if chunk is None else step.batch.weights[chunk])
            if main:
                self.add(term, values.detach().sum())
            loss = values.sum() * (term.weight / self.count(term.unit))
            if term.unit != "step":
                self.add_to_pass(loss)
            total = loss * weight if total is None else total + loss * weight
        return None if total is None else total * self.loss_scale

    def count(self, unit: str) -> float:
        """Count of a unit in the optimizer step; 1 instead of 0, so that an empty term is zero."""
        return 1.0 if unit == "step" else self.run.counts[unit] or 1.0

    def add(self, term: LossTerm, value: Tensor) -> None:
        """Add a term's sum over a micro-batch to its sum over the optimizer step."""
        total = self.sums.get(term.name)
        self.sums[term.name] = value if total is None else total + value
        self.terms[term.name] = (term.unit, term.weight)

    def add_to_pass(self, loss: Tensor) -> None:
        """Add to the value of `Step.loss` after the pass."""
        if self._pass is not None:
            total = self._pass.loss
            self._pass.loss = loss.detach() if total is None else total + loss.detach()

    def finish_step(self) -> dict[str, Tensor]:
        """Return each loss term's mean over the optimizer step and all processes, and their weighted sum "loss"."""
        values: dict[str, Tensor] = {}
        if self.run.processes > 1:
            terms = self.run.world.gather(self.terms)
            self.terms = {name: unit_and_weight for each in terms for name, unit_and_weight in each.items()}
            for name in sorted(self.terms):
                self.sums.setdefault(name, torch.zeros((), device=self.run.device))
            self.run.world.sum([self.sums[name] for name in sorted(self.terms)])
        loss = torch.zeros((), device=self.run.device)
        for name, total in self.sums.items():
            unit, weight = self.terms[name]
            values[name] = total / self.count(unit)
            loss = loss + weight * values[name]
        self.reset_step()
        return {"loss": loss, **values}

    def reset_step(self) -> None:
        """Clear the state of the current optimizer step."""
        self.sums, self.terms = {}, {}
        self.step_terms.reset()

    @contextmanager
    def _freezing(self) -> Iterator[None]:
        """Freeze all parameters inside the context: only the noise has a gradient, and no layer keeps its input."""
        parameters = self.run.trainable
        for parameter in parameters:
            parameter.requires_grad_(False)
        self._frozen = True
        try:
            yield
        finally:
            self._frozen = False
            for parameter in parameters:
                parameter.requires_grad_(True)


@contextmanager
def _replaying(step: Step, noise: Tensor | None, compared: bool = False) -> Iterator[None]:
    """Replace the step's noise with `noise` inside the context."""
    outer = (step.noise, step.replaying, step.compared)
    step.noise, step.replaying, step.compared = noise, True, compared
    try:
        yield
    finally:
        step.noise, step.replaying, step.compared = outer

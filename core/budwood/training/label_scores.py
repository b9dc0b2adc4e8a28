"""The labels' log-probabilities of one pass, and their backward pass to the decoder's output.

With a frozen head, a label's log-probability depends only on its own row of the output. The single chunked pass of the
head then computes this gradient, [L, d] for all labels, which is scaled later by the loss terms' coefficients. A
trainable head runs a second time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from budwood.contract.discovery import PluginError
from budwood.contract.examples import Batch
from budwood.model.task import Task

LogProbs = dict[float, Tensor]
"""Log-probabilities [L] of a micro-batch's labels by temperature."""


class LabelScores:
    """Log-probabilities of a micro-batch's labels, filled one chunk at a time.

    Attributes:
        temperatures: those at which strategies need the log-probabilities.
        rows: of a chunk.
        twice: run the head a second time for the backward pass, because it has trainable parameters.
    """

    def __init__(self, task: Task, batch: Batch, temperatures: Sequence[float], rows: int, twice: bool = False) -> None:
        self.task, self.batch, self.temperatures = task, batch, tuple(temperatures)
        self.rows, self.twice = rows, twice
        self._values: dict[float, list[Tensor]] = {temperature: [] for temperature in temperatures}
        self._gradients: dict[float, list[Tensor]] = {temperature: [] for temperature in temperatures}

    def add(self, logits: Tensor, chunk: Tensor, rows: Tensor, keep: bool) -> None:
        """Add a chunk's log-probabilities, and their gradient with respect to `rows` if `rows` requires one.

        Args:
            keep: retain the chunk's graph for another backward pass.

        Raises:
            PluginError: the task's `log_probs` does not return one value per label.
        """
        for temperature in self.temperatures:
            values = self._log_probs(logits, chunk, temperature)
            if values.shape != chunk.shape:
                raise PluginError(
                    f"{self.task}: log_probs returned {list(values.shape)}; it must return one value for each of "
                    f"{len(chunk)} labels."
                )
            self._values[temperature].append(values.detach())
            if not self.twice and rows.requires_grad and values.requires_grad:
                # Without the loss scale, which is part of the coefficients: a sum over labels would overflow fp16.
                retain = keep or temperature != self.temperatures[-1]
                (gradient,) = torch.autograd.grad(values.sum(), rows, retain_graph=retain)
                self._gradients[temperature].append(gradient)

    def _log_probs(self, logits: Tensor, chunk: Tensor, temperature: float) -> Tensor:
        """Call the task; only a temperature other than 1 is passed, so that a task may do without that argument."""
        extra = {} if temperature == 1 else {"temperature": temperature}
        return self.task.log_probs(logits, self.batch.labels[chunk], **extra)

    def values(self) -> LogProbs:
        """Return the log-probabilities by temperature, without a graph."""
        return {temperature: torch.cat(values) for temperature, values in self._values.items()}

    def backward(
        self, head: Callable[[Tensor], Tensor], flat: Tensor, grad: Tensor | None, coefficients: LogProbs
    ) -> None:
        """Add the gradient of Σ coefficients · log p to `grad` [rows · width, d] and to the head's parameters.

        Args:
            flat: the decoder's output [rows · width, d].
            coefficients: [L] by temperature.
        """
        positions = self.batch.label_positions
        if self.twice:
            for chunk, rows in chunks(self.batch, flat, self.rows):
                rows.requires_grad_(grad is not None)
                logits = head(rows)
                parts = [(self._log_probs(logits, chunk, t) * c[chunk]).sum() for t, c in coefficients.items()]
                torch.autograd.backward(parts)
                if grad is not None and rows.grad is not None:
                    grad.index_add_(0, positions[chunk], rows.grad)
        elif grad is not None:
            for temperature, all_factors in coefficients.items():
                gradients = self._gradients[temperature]  # none if nothing below the head trains
                chunked = zip(gradients, all_factors.split(self.rows), positions.split(self.rows), strict=True)
                for gradient, factors, target in chunked if gradients else ():
                    grad.index_add_(0, target, (gradient * factors[:, None]).to(grad.dtype))


def temperature_of(plugin: Any) -> float:
    """Return the temperature of the log-probabilities that a plugin receives; a task's is 1.

    Raises:
        PluginError: it is not a positive, finite number.
    """
    temperature = getattr(plugin, "log_prob_temperature", 1.0)
    if not isinstance(temperature, int | float) or not math.isfinite(temperature) or temperature <= 0:
        raise PluginError(f"{plugin}: log_prob_temperature must be positive and finite, not {temperature!r}.")
    return float(temperature)


def chunks(batch: Batch, flat: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, one chunk at a time, label indices [n] and the rows [n, d] of the output at these labels' positions.

    Args:
        rows: n, of all chunks but the last.
    """
    for chunk in torch.arange(len(batch.labels), device=flat.device).split(rows):
        yield chunk, flat[batch.label_positions[chunk]]


def depends(values: Tensor, leaf: Tensor) -> bool:
    """Whether the graph of `values` contains `leaf`."""
    pending, visited = [values.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if getattr(node, "variable", None) is leaf:
            return True
        pending += [following for following, _ in node.next_functions]
    return values is leaf

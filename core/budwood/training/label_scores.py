"""The labels' log-probabilities of one pass, and their backward pass to the decoder's output.

With a frozen head, a label's log-probability depends only on its own row of the output. The single chunked pass of the
head then computes this gradient, [L, d] for all labels, which is scaled later by the loss terms' coefficients. A
trainable head runs a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from budwood.contract.discovery import PluginError
from budwood.contract.examples import Batch
from budwood.model.evaluation import CHUNK
from budwood.model.task import Task


class LabelScores:
    """Log-probabilities of a micro-batch's labels, filled one chunk at a time.

    Attributes:
        twice: run the head a second time for the backward pass, because it has trainable parameters.
    """

    def __init__(self, task: Task, batch: Batch, twice: bool) -> None:
        self.task, self.batch, self.twice = task, batch, twice
        self._values: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def add(self, logits: Tensor, chunk: Tensor, rows: Tensor, keep: bool) -> None:
        """Add a chunk's log-probabilities, and their gradient with respect to `rows` if `rows` requires one.

        Args:
            keep: retain the chunk's graph for another backward pass.

        Raises:
            PluginError: the task's `log_probs` does not return one value per label.
        """
        values = self.task.log_probs(logits, self.batch.labels[chunk])
        if values.shape != chunk.shape:
            raise PluginError(
                f"{self.task}: log_probs returned {list(values.shape)}; it must return one value for each of "
                f"{len(chunk)} labels."
            )
        self._values.append(values.detach())
        if not self.twice and rows.requires_grad and values.requires_grad:
            # Without the loss scale, which is part of the coefficients: a scaled sum over labels would overflow fp16.
            (gradient,) = torch.autograd.grad(values.sum(), rows, retain_graph=keep)
            self._gradients.append(gradient)

    def values(self) -> Tensor:
        """Return the log-probabilities [L], without a graph."""
        return torch.cat(self._values)

    def backward(
        self, head: Callable[[Tensor], Tensor], flat: Tensor, grad: Tensor | None, coefficients: Tensor
    ) -> None:
        """Add to `grad` [rows · width, d], and to the head's parameters, the gradient of Σ coefficients · log p.

        Args:
            flat: the decoder's output [rows · width, d].
            coefficients: [L].
        """
        positions = self.batch.label_positions
        if self.twice:
            for chunk, rows in chunks(self.batch, flat):
                rows.requires_grad_(grad is not None)
                (self.task.log_probs(head(rows), self.batch.labels[chunk]) * coefficients[chunk]).sum().backward()
                if grad is not None and rows.grad is not None:
                    grad.index_add_(0, positions[chunk], rows.grad)
        elif grad is not None and self._gradients:
            for gradient, factors, target in zip(
                self._gradients, coefficients.split(CHUNK), positions.split(CHUNK), strict=True
            ):
                grad.index_add_(0, target, (gradient * factors[:, None]).to(grad.dtype))


def chunks(batch: Batch, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, one chunk at a time, label indices [n] and the rows [n, d] of the output at these labels' positions."""
    for chunk in torch.arange(len(batch.labels), device=flat.device).split(CHUNK):
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

"""The labels' log-probabilities of one pass, and the way back from their gradients to the decoder's output.

A label's log-probability depends on its own row of the output alone, if the head is frozen: its gradient there, [L, d]
for all labels, comes with the one chunked pass of the head, and is scaled once the terms have their coefficients. A
head that trains is passed a second time.
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
    """Log-probabilities of a micro-batch's labels, filled a chunk at a time.

    Attributes:
        twice: the head trains, so that rows alone do not give its gradient.
    """

    def __init__(self, task: Task, batch: Batch, twice: bool) -> None:
        self.task, self.batch, self.twice = task, batch, twice
        self._values: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def add(self, logits: Tensor, chunk: Tensor, rows: Tensor, keep: bool) -> None:
        """Add a chunk's log-probabilities, and their gradient with respect to `rows` if these take one.

        Args:
            keep: the chunk's graph is needed again.

        Raises:
            PluginError: the task's `log_probs` gives another number of values than there are labels.
        """
        values = self.task.log_probs(logits, self.batch.labels[chunk])
        if values.shape != chunk.shape:
            raise PluginError(
                f"{self.task}: log_probs returned {list(values.shape)}; it must give one value for each of "
                f"{len(chunk)} labels."
            )
        self._values.append(values.detach())
        if not self.twice and rows.requires_grad and values.requires_grad:
            # Not times the loss scale, which the coefficients carry: a sum over labels would overflow fp16.
            (gradient,) = torch.autograd.grad(values.sum(), rows, retain_graph=keep)
            self._gradients.append(gradient)

    def values(self) -> Tensor:
        """Log-probabilities [L], without a graph."""
        return torch.cat(self._values)

    def backward(
        self, head: Callable[[Tensor], Tensor], flat: Tensor, grad: Tensor | None, coefficients: Tensor
    ) -> None:
        """Add to `grad` [rows · width, d], and to the head's parameters, the gradient of Σ coefficients · log p.

        Args:
            flat: the decoder's output [rows · width, d].
            coefficients: [L].
        """
        where = self.batch.label_positions
        if self.twice:
            for chunk, rows in chunks(self.batch, flat):
                rows.requires_grad_(grad is not None)
                (self.task.log_probs(head(rows), self.batch.labels[chunk]) * coefficients[chunk]).sum().backward()
                if grad is not None and rows.grad is not None:
                    grad.index_add_(0, where[chunk], rows.grad)
        elif grad is not None and self._gradients:
            for gradient, factors, at in zip(
                self._gradients, coefficients.split(CHUNK), where.split(CHUNK), strict=True
            ):
                grad.index_add_(0, at, (gradient * factors[:, None]).to(grad.dtype))


def chunks(batch: Batch, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels' positions [n] and the rows [n, d] of the output that they are for, a chunk at a time."""
    for chunk in torch.arange(len(batch.labels), device=flat.device).split(CHUNK):
        yield chunk, flat[batch.label_positions[chunk]]


def depends(values: Tensor, leaf: Tensor) -> bool:
    """Whether the graph of `values` has `leaf` in it."""
    ahead, seen = [values.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", None) is leaf:
            return True
        ahead += [following for following, _ in node.next_functions]
    return values is leaf

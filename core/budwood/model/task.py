"""What every task provides: examples from items, batches, the model's outputs, the loss, probes and metrics.

A task is registered as a plugin under the strategies, so that they can wrap its `forward` and `evaluate`. Others come
the same way, through the entry point group `budwood.tasks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from budwood.contract.examples import Batch, Example
from budwood.contract.strategy import Plugin, hookimpl
from budwood.contract.types import Generator, LossTerm, Outputs, Run, Step
from budwood.data.build import Encoded
from budwood.data.encoder import Encoder
from budwood.data.formats import Dropped
from budwood.data.packing import collate_rows
from budwood.errors import InputError
from budwood.model.evaluation import EvalTotals
from budwood.model.ops.cross_entropy import cross_entropy


class Task(Plugin):
    """What every task provides. A subclass sets the class attributes and implements `encode` and `outputs`."""

    group = "budwood.tasks"
    must_declare = ("name", "auto_class")
    must_implement = ("encode", "outputs")
    name: ClassVar[str]
    auto_class: ClassVar[str]
    """Name of one of transformers' auto classes."""
    needs_tokenizer: ClassVar[bool] = True
    """False: the base needs no tokenizer, and `run.tokenizer` is None."""
    best_metric: ClassVar[str] = "eval_loss"
    """Metric by which the best adapter is chosen."""
    lower_is_better: ClassVar[bool] = True
    """Direction of `best_metric`."""
    gathers_predictions: ClassVar[bool] = False
    """Whether an evaluation keeps a (label, prediction) pair of every label, for `metrics`."""

    report: str = ""
    """Text of the last evaluation, for people."""

    # Examples and batches.

    def encode(self, items: Sequence[Any], where: Sequence[str], encoder: Encoder) -> Sequence[Encoded | Dropped]:
        """Turn items of a data format into examples.

        Args:
            items: what the format's `item` returned, a chunk of the file.
            where: each item's place, which leads messages.
            encoder: tokenizer, `max_length`, and `classes`, which gives a class's name its index.

        Returns:
            For each item an `Encoded` with its examples, or a `Dropped` with the reason. `key` and `row` are set by
            core; `group` counts from 0 within the item.
        """
        raise NotImplementedError

    def length(self, example: Example) -> int:
        """Size of an example as `micro_tokens` counts it: of a text its tokens, else its largest input's first axis."""
        return max(len(value) if value.ndim else 1 for value in example.inputs.values())

    def vary(self, example: Example, generator: Generator) -> Example:
        """Return the example as one epoch sees it: masked or augmented anew.

        Args:
            generator: keyed by seed, epoch and example; in an evaluation by the example alone.
        """
        return example

    def varies(self) -> bool:
        """Whether the task implements `vary`."""
        return type(self).vary is not Task.vary

    def collate(self, examples: Sequence[Example], model: nn.Module, tokenizer: Any, packed: bool) -> Batch:
        """Make a micro-batch; by default every input is stacked, and an example's labels are for its own row.

        Args:
            examples: at least one.
            model: the model that the batch is for.
            tokenizer: of the base; None for a task that needs none.
            packed: whether the model takes several examples in one row.
        """
        return collate_rows(examples, [self.length(example) for example in examples])

    # The model.

    def model_kwargs(self, labels: list[str]) -> dict[str, Any]:
        """Changes to the base's configuration that the classes call for."""
        return {}

    def head_modules(self, model: nn.Module) -> list[str]:
        """Names of head modules that start untrained, so that they train and are saved with the adapter."""
        return []

    def pads_rows(self, model: nn.Module) -> bool:
        """Whether rows are padded, since the model pools each row by itself."""
        return True

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run `model` on `batch` up to its head."""
        raise NotImplementedError

    def own_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [L, …] at the labels by the model's own, untouched forward, for a batch of one example."""
        return self.logits(self.outputs(model, batch), batch)

    def logits(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Logits [L, …] at all labels of a batch, through the head."""
        return outputs.head(outputs.hidden.flatten(0, 1)[batch.label_positions])

    def show(self, example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
        """An example in words, for `budwood data`: pieces of text, and whether each has a loss."""
        inputs = ", ".join(f"{name} {list(value.shape)}" for name, value in example.inputs.items())
        return [(inputs, False), (f" → {example.labels.tolist()}", bool(len(example.labels)))]

    def check_inputs(self, model: nn.Module, example: Example) -> str:
        """Say what keeps `model` from taking an example of a file; empty if it can."""
        return ""

    # Loss and noise.

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss [n] of each label, in fp32 or more; by default the cross-entropy."""
        return cross_entropy(logits, labels)

    def log_probs(self, logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probability [n] of each label under softmax(logits / temperature), in fp32 or more.

        Raises:
            InputError: the task has no log-probabilities, so that objectives on them cannot run.
        """
        raise InputError(f"task '{self.name}' has no log-probabilities: an objective that needs them cannot run on it.")

    def has_log_probs(self) -> bool:
        """Whether the task implements `log_probs`."""
        return type(self).log_probs is not Task.log_probs

    def loss_is_log_prob(self) -> bool:
        """Whether `loss` is the negative of `log_probs`, so that one pass of the head serves both."""
        return False

    def noise_module(self, model: nn.Module) -> nn.Module:
        """The module to whose output noise is added: the input embeddings."""
        return model.get_input_embeddings()  # type: ignore[operator]

    def noise_like(self, model: nn.Module, batch: Batch) -> Tensor:
        """Zeros fp32 in the shape of `noise_module`'s output for the batch: [rows, width, d] for text."""
        weight: Any = self.noise_module(model).weight
        return torch.zeros(batch.rows, batch.width, weight.shape[-1], device=batch.label_positions.device)

    def noise_owner(self, batch: Batch) -> Tensor:
        """[rows · width] int64, the example of each position of the noise; -1: none may go there."""
        return batch.example_of_position

    def special_positions(self, run: Run, batch: Batch) -> Tensor | None:
        """[rows · width] bool, positions of special tokens; None if the task has no such thing."""
        return None

    def labelled_positions(self, batch: Batch) -> Tensor | None:
        """[rows · width] bool, positions whose inputs are themselves labels; None if the task has no such thing."""
        return None

    # Probes: by what a model is known.

    def probe(self, example: Example, limit: int | None = None) -> Example:
        """Cut an example to what the model is asked, scored where its answer begins.

        Golden outputs are the logits after probes, and exact match is measured on what is generated after them.

        Args:
            limit: keep at most so many positions, if the task can cut them.
        """
        return replace(
            example, label_positions=example.label_positions[:1], labels=example.labels[:1], weights=example.weights[:1]
        )

    def altered(self, model: nn.Module, example: Example) -> Example | None:
        """The example with other inputs of the same sizes, on which another's outputs must not depend; None: unknown.

        A packed row is checked with it in 16 bit, where rounding hides small differences.
        """
        return None

    # Evaluation.

    def label_metrics(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Further values [n] of each label by name; their weighted means are metrics."""
        return {}

    def predict(self, logits: Tensor) -> Tensor:
        """What the model says for each row [n, …] of logits: the largest."""
        return logits.argmax(-1)

    def metrics(self, run: Run, totals: EvalTotals) -> dict[str, float]:
        """Metrics of an evaluation beside the means of `loss` and `label_metrics`."""
        return {}

    # Hooks.

    @hookimpl
    def forward(self, step: Step) -> Outputs:
        """Run the model of the run; `step.noise` is added to the output of `noise_module`."""
        with self.noisy(step.run.model, step.noise):
            return self.outputs(step.run.model, step.batch)

    @hookimpl
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> LossTerm | None:
        """The loss of each label, times `run.task_weight`; a task that replaces this applies it too."""
        if step.scores_sequences and self.loss_is_log_prob():
            return None  # `sequence_terms` gives it
        values = self.loss(logits, step.batch.labels[positions])
        return LossTerm(self.name.replace("-", "_"), values, weight=step.run.task_weight)

    @hookimpl
    def sequence_terms(self, step: Step, log_probs: Tensor) -> LossTerm | None:
        """The task's loss, where it is that of the log-probabilities which a strategy asks for."""
        if not self.loss_is_log_prob():
            return None
        return LossTerm(self.name.replace("-", "_"), -log_probs, weight=step.run.task_weight)

    @hookimpl
    def evaluate(self, run: Run) -> dict[str, float]:
        """Loss and the task's metrics over `run.eval_examples`, shared among the processes."""
        return self.measure(run)

    def measure(self, run: Run, noise: Callable[[Batch], Tensor | None] | None = None) -> dict[str, float]:
        """The metrics of `evaluate`, with `noise(batch)` on the output of `noise_module`."""
        totals = EvalTotals.of(self, run, noise)
        means = {f"eval_{name}": value for name, value in totals.means.items()}
        return {**means, **self.metrics(run, totals)}

    @contextmanager
    def noisy(self, model: nn.Module, noise: Tensor | None) -> Iterator[None]:
        """Add `noise` to the output of `noise_module` inside the context.

        Raises:
            InputError: the model did not call that module, so that the noise had no effect.
        """
        if noise is None:
            yield
            return
        called = []

        def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            called.append(True)
            return output + noise.to(output.dtype)

        handle = self.noise_module(model).register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()
        if not called:
            raise InputError(f"{type(model).__name__} does not call its input embeddings: noise cannot be put on them.")

"""The base class of tasks: examples from items, batches, model outputs, loss, probes and metrics.

A task is registered as a plugin below the strategies, so that they can wrap its `forward` and `evaluate`. Plugins
register further tasks in the entry point group `budwood.tasks`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from budwood.contract.examples import DESIRABLE, Batch, Example
from budwood.contract.strategy import Options, Plugin, hookimpl
from budwood.contract.types import Generator, LossTerm, Outputs, Run, Step
from budwood.data.chunk import Encoded
from budwood.data.encoder import Encoder
from budwood.data.formats import Dropped
from budwood.data.packing import collate_rows
from budwood.errors import InputError
from budwood.model.evaluation import EvalTotals
from budwood.model.ops.cross_entropy import cross_entropy

NORMS = 8192
"""Embeddings whose norms are computed at a time."""
DESIRABLE_LABEL = "desirable_label"
"""Unit of the task's own loss on preference data: the sum of the weights of the desirable answers' labels."""


class Task(Plugin):
    """Base class of tasks. A subclass sets the class attributes and implements `encode` and `outputs`."""

    group = "budwood.tasks"
    must_declare = ("name", "auto_class")
    must_implement = ("encode", "outputs")
    name: ClassVar[str]
    auto_class: ClassVar[str]
    """Name of the transformers auto class that loads the model."""
    Options: ClassVar[type[BaseModel]] = Options
    """Options, which a recipe sets in `base.task_options`; they are saved with the adapter."""
    training_options: ClassVar[tuple[str, ...]] = ()
    """Options that only training and evaluation use, so that adapters that differ in them can share a base."""
    peft_task_type: ClassVar[str | None] = None
    """PEFT's name of the task, such as "FEATURE_EXTRACTION", if it has one."""
    needs_tokenizer: ClassVar[bool] = True
    """False: no tokenizer is loaded, and `run.tokenizer` is None."""
    unused_modules: ClassVar[tuple[str, ...]] = ()
    """Components of the names of what need not train if a checkpoint lacks it: a pooler that the task does not run, or
    a mask token, which starts as zeros."""
    trains_on: ClassVar[tuple[str, ...]] = ()
    """As `Strategy.trains_on`, for a task that reads data of a kind without an objective."""
    best_metric: ClassVar[str] = "eval_loss"
    """Metric that selects the best adapter."""
    lower_is_better: ClassVar[bool] = True
    """Direction of `best_metric`."""
    answers: ClassVar[Literal["texts", "images"]] = "texts"
    """What `respond` answers: texts, or images, given by their paths."""
    gathers_predictions: ClassVar[bool] = False
    """Whether an evaluation collects a (label, prediction) pair for every label, for `metrics`."""

    report: str = ""
    """Human-readable report of the last evaluation."""

    def __init__(self, options: Any = None) -> None:
        """Store validated `options`."""
        self.options: Any = self.Options() if options is None else options

    def read_base(self, folder: Path) -> None:
        """Read what the task needs from the base's folder, and complete `options`; called before anything is encoded.

        Completed options are saved with the adapter, so that they hold for it on any copy of the base.

        Raises:
            InputError: the task cannot use this base.
        """

    # Examples and batches.

    def encode(self, items: Sequence[Any], where: Sequence[str], encoder: Encoder) -> Sequence[Encoded | Dropped]:
        """Turn items of a data format into examples, independently of other chunks: another process may do it.

        Args:
            items: a chunk of the file, as returned by the format's `item`.
            where: location of each item, with which messages begin.
            encoder: tokenizer, `max_length`, and `classes`, which maps class names to indices.

        Returns:
            For each item, an `Encoded` with its examples or a `Dropped` with the reason. Core sets `key` and `row`;
            `group` counts from 0 within the item.
        """
        raise NotImplementedError

    def planned_row(self, text: str, number: int) -> dict[str, Any] | None:
        """Return row `number` of data that stands in for data that is not there, for `budwood plan --tokens`.

        Args:
            text: as long as an example may be. Every value that contains it counts as an example of that length.
            number: from 0; for classes, of which there are at least two.

        Returns:
            A row of one of the data formats of the task; None: the task can only be planned with data.
        """
        return None

    def length(self, example: Example) -> int:
        """Return the size of an example, as counted by `micro_tokens`; by default the longest first axis of an input.

        For text, it is the number of tokens.
        """
        return max(len(value) if value.ndim else 1 for value in example.inputs.values())

    def vary(self, example: Example, generator: Generator) -> Example:
        """Return the example as used in one epoch, for instance with a new mask or augmentation.

        Args:
            generator: keyed by seed, epoch and example; in evaluations, the epoch is "eval".
        """
        return example

    def varies(self) -> bool:
        """Return whether the task implements `vary`."""
        return type(self).vary is not Task.vary

    def collate(self, examples: Sequence[Example], model: nn.Module, tokenizer: Any, packed: bool) -> Batch:
        """Collate a micro-batch; by default every input is stacked, and an example's labels refer to its row.

        Args:
            examples: at least one.
            model: the model that the batch is for.
            tokenizer: the base's tokenizer; None for a task that does not need one.
            packed: whether the model accepts several examples in one row.
        """
        return collate_rows(examples, [self.length(example) for example in examples])

    # The model.

    def model_kwargs(self, labels: list[str]) -> dict[str, Any]:
        """Return changes to the base's configuration that the classes require."""
        return {}

    def head_modules(self, model: nn.Module) -> list[str]:
        """Return the names of untrained head modules, which are trained and saved with the adapter."""
        return []

    def pools_examples(self, model: nn.Module) -> bool:
        """Return whether the model pools each example to one output, to which its labels refer."""
        return True

    def packs_rows(self, model: nn.Module) -> bool:
        """Return whether `collate` and `outputs` support several examples per row; core checks that it is exact."""
        return not self.pools_examples(model)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run `model` on `batch` up to its head."""
        raise NotImplementedError

    def own_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits [L, …] at the labels by the model's unmodified forward, for a batch of one example."""
        return self.logits(self.outputs(model, batch), batch)

    def logits(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return logits [L, …] at all labels of a batch, by applying the head."""
        return outputs.head(outputs.hidden.flatten(0, 1)[batch.label_positions])

    def show(self, example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
        """Return a human-readable example for `budwood data`: pieces of text, and whether each has a loss."""
        inputs = ", ".join(f"{name} {list(value.shape)}" for name, value in example.inputs.items())
        return [(inputs, False), (f" → {example.labels.tolist()}", bool(len(example.labels)))]

    def sheet(self, examples: Sequence[Example], titles: Sequence[str]) -> bytes | None:
        """Return a picture (PNG) of examples as training sees them, for `budwood data --sheet`; None: there is none.

        Args:
            titles: a line for each example.
        """
        return None

    def reads_otherwise(self, folder: Path) -> str:
        """Return how a model in another folder reads inputs differently from the base; empty: it does not.

        For tasks without a tokenizer: the folder is that of a teacher, which gets the base's batches.
        """
        return ""

    def check_inputs(self, model: nn.Module, example: Example) -> str:
        """Return the reason why `model` cannot process an example; empty if it can."""
        return ""

    # Loss and noise.

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss [n] of each label, in fp32 or wider; by default the cross-entropy."""
        return cross_entropy(logits, labels)

    def log_probs(self, logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        """Return the log-probability [n] of each label under softmax(logits / temperature), in fp32 or wider.

        Raises:
            InputError: the task has no log-probabilities.
        """
        raise InputError(f"task '{self.name}' has no log-probabilities: an objective that needs them cannot run on it.")

    def has_log_probs(self) -> bool:
        """Return whether the task implements `log_probs`."""
        return type(self).log_probs is not Task.log_probs

    def loss_is_log_prob(self) -> bool:
        """Return whether `loss` is the negative of `log_probs`, so that one pass of the head computes both."""
        return False

    def noise_module(self, model: nn.Module) -> nn.Module:
        """Return the module to whose output noise is added: the input embeddings."""
        return model.get_input_embeddings()  # type: ignore[operator]

    def noise_like(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return fp32 zeros with the shape of `noise_module`'s output for the batch: [rows, width, d] for text.

        Where examples are rows, its second dimension has room for `batch.lengths`.
        """
        device = batch.label_positions.device
        return torch.zeros(batch.rows, batch.width, self.embedding_width(model), device=device)

    def embedding_norms(self, run: Run) -> Tensor:
        """Return norms [n] fp32 of embeddings as `noise_module` outputs them: their median is the scale of noise.

        By default of the whole table; through the module, since some models multiply its rows.
        """
        module: Any = self.noise_module(run.model)
        ids = torch.arange(len(module.weight), device=module.weight.device)[None]
        with torch.no_grad():
            return torch.cat([module(part).float().norm(dim=-1)[0] for part in ids.split(NORMS, dim=1)])

    def embedding_width(self, model: nn.Module) -> int:
        """Return d, the last dimension of `noise_module`'s output."""
        weight: Any = self.noise_module(model).weight
        return int(weight.shape[-1])

    def noise_owner(self, batch: Batch) -> Tensor:
        """Return [rows · width] int64, the example of each position of the noise; -1: no noise is allowed there."""
        return batch.example_of_position

    def special_positions(self, run: Run, batch: Batch) -> Tensor | None:
        """Return [rows · width] bool, positions of special tokens; None if the task has no special tokens."""
        return None

    def labelled_positions(self, batch: Batch) -> Tensor | None:
        """Return [rows · width] bool, positions whose inputs are also labels; None if inputs cannot be labels."""
        return None

    def has_labelled_positions(self) -> bool:
        """Return whether the task implements `labelled_positions`."""
        return type(self).labelled_positions is not Task.labelled_positions

    # Probes, inputs that characterise a model by its outputs.

    def probe(self, example: Example, limit: int | None = None) -> Example:
        """Reduce an example to its prompt, with a label where the answer begins.

        Golden outputs are the logits at the end of probes. Exact match compares text generated from probes.

        Args:
            limit: maximum number of positions to keep, if the task can truncate inputs.
        """
        return replace(
            example, label_positions=example.label_positions[:1], labels=example.labels[:1], weights=example.weights[:1]
        )

    def altered(self, model: nn.Module, example: Example) -> Example | None:
        """Return the example with other inputs of the same sizes; None if the task cannot.

        The check of packed rows in 16 bit, where rounding hides small differences, uses it: the outputs of the other
        examples in a row must not change.
        """
        return None

    # Evaluation.

    def label_metrics(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return further values [n] of each label by name; their weighted means are metrics."""
        return {}

    def predict(self, logits: Tensor) -> Tensor:
        """Return the prediction for each row [n, …] of logits, by default the index of the largest."""
        return logits.argmax(-1)

    def metrics(self, run: Run, totals: EvalTotals) -> dict[str, float]:
        """Return the metrics of an evaluation other than the means of `loss` and `label_metrics`."""
        return {}

    # Use.

    def responds(self) -> bool:
        """Return whether the task implements `respond`."""
        return type(self).respond is not Task.respond

    def respond(
        self, model: nn.Module, tokenizer: Any, texts: Sequence[str], labels: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return the model's answer to each text, a mapping of JSON values: a label, a vector, filled masks.

        `budwood generate` shows them. A task whose model generates text needs none.

        Args:
            texts: texts, or paths of images; see `answers`.
            model: in evaluation mode, with the adapter in use; gradients are disabled.
            labels: names of the classes.

        Raises:
            InputError: the task does not answer texts, or a text cannot be used.
        """
        raise InputError(f"task '{self.name}' answers no texts: measure it with `budwood eval`.")

    def show_response(self, response: Any) -> str:
        """Return an answer of `respond` in human-readable form."""
        return json.dumps(response, ensure_ascii=False)

    def model_files(self, model: nn.Module, max_length: int | None) -> dict[str, bytes]:
        """Return further files of a merged model's folder, by path, that others need in order to use it as the task.

        Args:
            max_length: tokens at which the adapter's run truncated; None: unknown.
        """
        return {}

    # Hooks.

    @hookimpl
    def forward(self, step: Step) -> Outputs:
        """Run the model, with `step.noise` added to the output of `noise_module`."""
        with self.noisy(step.run.model, step.noise):
            return self.outputs(step.run.model, step.batch)

    @hookimpl
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> LossTerm | None:
        """Return the loss of each label with weight `run.task_weight`, which overriding tasks must apply too."""
        if step.scores_sequences and self.loss_is_log_prob():
            return None  # `sequence_terms` returns it
        return self.own_term(step, self.loss(logits, step.batch.labels[positions]), positions)

    @hookimpl
    def sequence_terms(self, step: Step, log_probs: Tensor) -> LossTerm | None:
        """Return the task's loss from log-probabilities that a strategy requested, if `loss_is_log_prob`."""
        if not self.loss_is_log_prob():
            return None
        return self.own_term(step, -log_probs)

    def own_term(
        self, step: Step, values: Tensor, positions: Tensor | None = None, name: str = "", weight: float | None = None
    ) -> LossTerm:
        """Return a term of the task's own loss: of all labels, but in preference data of desirable answers only.

        Args:
            values: of all labels, or of those at `positions`.
            name: the term's name; by default the task's.
            weight: by default `run.task_weight`.
        """
        name, weight = name or self.name.replace("-", "_"), step.run.task_weight if weight is None else weight
        if DESIRABLE not in step.batch.columns:
            return LossTerm(name, values, weight=weight)
        weights = step.batch.task_weights if positions is None else step.batch.task_weights[positions]
        return LossTerm(name, values * weights, DESIRABLE_LABEL, weight)

    @hookimpl
    def batch_counts(self, run: Run, batch: Batch) -> dict[str, float]:
        """Count the labels of desirable answers, if the batch is preference data."""
        if DESIRABLE not in batch.columns:
            return {}
        if run.planning:  # values are unknown
            return {DESIRABLE_LABEL: batch.total_weight}
        return {DESIRABLE_LABEL: float(batch.task_weights.sum(dtype=torch.float64))}

    @hookimpl
    def evaluate(self, run: Run) -> dict[str, float]:
        """Return the loss and the task's metrics over `run.eval_examples`, distributed over the processes."""
        return self.measure(run)

    def measure(self, run: Run, noise: Callable[[Batch], Tensor | None] | None = None) -> dict[str, float]:
        """Return the metrics of `evaluate`, with `noise(batch)` added to the output of `noise_module`.

        Without labels, as of prompts that have no answers, there are none.
        """
        totals = EvalTotals.of(self, run, noise)
        if not totals.weight:
            return {}
        means = {f"eval_{name}": value for name, value in totals.means.items()}
        return {**means, **self.metrics(run, totals)}

    @contextmanager
    def noisy(self, model: nn.Module, noise: Tensor | None) -> Iterator[None]:
        """Add `noise` to the output of `noise_module` inside the context.

        Raises:
            InputError: the model did not call that module, so the noise had no effect.
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
            raise InputError(f"{type(model).__name__} does not call its input embeddings: noise cannot be added.")

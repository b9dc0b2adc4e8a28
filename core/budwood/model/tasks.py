"""Tasks: the model's class, the base loss term, how rows are pooled, and the metrics.

A task is registered as a plugin under the strategies, so that they can wrap its `forward` and `evaluate`. Others come
the same way, through the entry point group `budwood.tasks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from budwood.contract.strategy import Plugin, hookimpl
from budwood.contract.types import Batch, LossTerm, Outputs, Run, Step
from budwood.data.packing import collate, split_micro
from budwood.errors import InputError, ResourceError, is_out_of_memory
from budwood.model.generate import generate
from budwood.model.ops.attention import packed_mask
from budwood.model.ops.cross_entropy import cross_entropy
from budwood.model.streaming import release_memory

T = TypeVar("T")

CHUNK = 256
"""Label positions whose logits exist at once."""


class Task(Plugin):
    """What every task brings. A subclass sets the class attributes and implements `head_modules` and `metrics`."""

    group = "budwood.tasks"
    must_declare = ("name", "auto_class")
    name: ClassVar[str]
    auto_class: ClassVar[str]
    """Name of transformers' auto class."""
    best_metric: ClassVar[str] = "eval_loss"
    """Metric by which the best adapter is chosen."""
    lower_is_better: ClassVar[bool] = True
    """Whether a lower value of it is better."""

    report: str = ""
    """Text of the last evaluation, for people."""

    def model_kwargs(self, labels: list[str]) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained` that the data's labels give."""
        return {}

    def head_modules(self, model: nn.Module) -> list[str]:
        """Names of head modules that start untrained, so that they train and are saved with the adapter."""
        return []

    def pool(self, model: nn.Module) -> Literal["tokens", "last", "row"]:
        """Where labels stand: at tokens, at each example's last token, or at a row that the model pools itself."""
        return "tokens"

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run `model` on `batch` up to its head."""
        raise NotImplementedError

    def metrics(self, run: Run, logits: Logits) -> dict[str, float]:
        """Metrics beyond the loss from the sums that `evaluate` gathered."""
        raise NotImplementedError

    @hookimpl
    def forward(self, step: Step) -> Outputs:
        """Run the model of the run; `step.noise` is added to the embeddings' output."""
        with noisy_embeddings(step.run.model, step.noise):
            return self.outputs(step.run.model, step.batch)

    @hookimpl
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> LossTerm:
        """Cross-entropy of each label, in fp32, times `run.task_weight`; a task that replaces this applies it too."""
        values = cross_entropy(logits, step.batch.labels[positions])
        return LossTerm(self.name.replace("-", "_"), values, weight=step.run.task_weight)

    @hookimpl
    def evaluate(self, run: Run) -> dict[str, float]:
        """Loss and the task's metrics over `run.eval_examples`, shared among the processes."""
        return self.measure(run)

    def measure(self, run: Run, noise: Callable[[Batch], Tensor | None] | None = None) -> dict[str, float]:
        """The metrics of `evaluate`, with `noise(batch)` [R, T, d] on the embeddings' output."""

        def gather(batch: Batch) -> Logits:
            found = Logits()
            with noisy_embeddings(run.model, None if noise is None else noise(batch)):
                outputs = self.outputs(run.model, batch)
            flat = outputs.hidden.reshape(-1, outputs.hidden.shape[-1])
            for chunk in torch.arange(len(batch.labels), device=flat.device).split(CHUNK):
                logits = outputs.head(flat[batch.label_positions[chunk]]).float()
                found.add(logits, batch.labels[chunk])
            return found

        gathered = Logits()
        for found in over_eval_batches(run, gather):
            gathered.sums += found.sums
            gathered.pairs += found.pairs
        gathered.reduce(run)
        return {"eval_loss": gathered.loss, **self.metrics(run, gathered)}


class Logits:
    """Sums over the labels of an evaluation: loss, hits, and the (label, prediction) pairs of small label sets."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)  # loss, hits, labels
        self.pairs: list[tuple[int, int]] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add logits [n, classes] fp32 and labels [n]."""
        predicted = logits.argmax(-1)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        hits = (predicted == labels).sum()
        self.sums += torch.tensor([float(loss), float(hits), len(labels)], dtype=torch.float64)
        if logits.shape[-1] <= 4096:
            self.pairs += list(zip(labels.tolist(), predicted.tolist(), strict=True))

    def reduce(self, run: Run) -> None:
        """Sum over processes."""
        if run.processes > 1:
            torch.distributed.all_reduce(self.sums)
            gathered: list[Any] = [None] * run.processes
            torch.distributed.all_gather_object(gathered, self.pairs)
            self.pairs = [pair for pairs in gathered for pair in pairs]

    @property
    def loss(self) -> float:
        """Mean loss of a label, in nats."""
        return float(self.sums[0] / self.sums[2].clamp(min=1))

    @property
    def accuracy(self) -> float:
        """Share of labels whose largest logit is right."""
        return float(self.sums[1] / self.sums[2].clamp(min=1))


class CausalLM(Task):
    """Next-token prediction, with a loss on completions."""

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run the decoder alone; the head is the model's own forward on rows of its output."""
        hidden = decoder_of(model)(**_inputs(batch)).last_hidden_state
        return Outputs(hidden, lambda rows: own_head(model, rows))

    def metrics(self, run: Run, logits: Logits) -> dict[str, float]:
        """Perplexity, token accuracy; exact match of what is generated, for prompts with short completions."""
        found = {
            "eval_perplexity": math.exp(min(logits.loss, 700.0)),
            "eval_token_accuracy": logits.accuracy,
        }
        match = exact_match(run)
        return found if match is None else {**found, "eval_exact_match": match}


class SequenceClassification(Task):
    """One class for a text; the labels are learned from the data and kept in the adapter."""

    name = "sequence-classification"
    auto_class = "AutoModelForSequenceClassification"

    def model_kwargs(self, labels: list[str]) -> dict[str, Any]:
        """Number and names of the classes."""
        names = dict(enumerate(labels))
        return {"num_labels": len(labels), "id2label": names, "label2id": {v: k for k, v in names.items()}}

    def head_modules(self, model: nn.Module) -> list[str]:
        """The classification head, `score` or `classifier`."""
        return [name for name in ("score", "classifier") if hasattr(model, name)]

    def pool(self, model: nn.Module) -> Literal["tokens", "last", "row"]:
        """A decoder's head reads each example's last token; other models pool their rows themselves."""
        return "last" if hasattr(model, "score") else "row"

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run the decoder and take its head, or run the whole model where that pools."""
        if self.pool(model) == "last":
            hidden = model.get_submodule(model.base_model_prefix)(**_inputs(batch)).last_hidden_state  # type: ignore
            return Outputs(hidden, model.score)  # type: ignore[arg-type]
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return Outputs(logits[:, None], lambda rows: rows)

    def metrics(self, run: Run, logits: Logits) -> dict[str, float]:
        """Accuracy and macro F1; the classification report goes to `report`."""
        from sklearn.metrics import classification_report, f1_score

        truth, predicted = np.array(logits.pairs).T
        names = run.examples.labels if run.examples is not None else run.eval_examples.labels
        self.report = classification_report(
            truth, predicted, labels=range(len(names)), target_names=names, zero_division=0
        )
        macro = f1_score(truth, predicted, average="macro", zero_division=0)
        return {"eval_accuracy": logits.accuracy, "eval_macro_f1": float(macro)}


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a causal language model below its head."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    return decoder if decoder is not None and decoder is not model else model.base_model  # type: ignore[return-value]


def own_head(model: nn.Module, rows: Tensor) -> Tensor:
    """Logits [n, V] of rows [n, d] of the decoder's output, by the model's own forward.

    The decoder is replaced, for the call, by one that returns the rows. So whatever the model does after its decoder
    (soft-capping, logit scales, a bias) is done, without Budwood knowing of it.
    """
    decoder = decoder_of(model)
    out = _DecoderOutput(last_hidden_state=rows[None])
    decoder.forward = lambda *args, **kwargs: out
    try:
        logits: Tensor = model(inputs_embeds=rows[None], use_cache=False).logits
        return logits.flatten(0, 1)  # a view; the gradient of an index would fill a tensor of zeros first
    finally:
        del decoder.forward


class _DecoderOutput(SimpleNamespace):
    """Stands for transformers' model output: by attribute and, as some heads do, by index. All else in it is None, such
    as the cache, which versions name differently."""

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


@contextmanager
def noisy_embeddings(model: nn.Module, noise: Tensor | None) -> Iterator[None]:
    """Add `noise` [R, T, d] to the output of the model's input embeddings inside the context.

    Raises:
        InputError: the model did not call its input embeddings, so that the noise went nowhere.
    """
    if noise is None:
        yield
        return
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    called = []

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        called.append(True)
        return output + noise.to(output.dtype)

    handle = embeddings.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
    if not called:
        raise InputError(f"{type(model).__name__} does not call its input embeddings: noise cannot be put on them.")


def _inputs(batch: Batch) -> dict[str, Any]:
    given: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if batch.attention_mask is not None:
        return {**given, "attention_mask": batch.attention_mask}
    return {**given, "attention_mask": packed_mask(batch.input_ids.device), "segments": batch.segments}


def over_eval_batches(run: Run, work: Callable[[Batch], T]) -> Iterator[T]:
    """`work` of each batch of `run.eval_examples`, this process's share, without gradients and in eval mode.

    Where memory runs out, the batch is split and done again, and later batches are as small; so `work` must leave
    nothing behind but what it returns.

    Raises:
        ResourceError: memory does not even hold one example.
    """
    examples = run.eval_examples
    rows = split_micro(range(len(examples)), examples.lengths, run.eval_tokens, run.packed)
    rows = rows[run.process_index :: run.processes]
    was_training = run.model.training
    run.model.eval()
    try:
        while rows:
            done = _attempt(run, rows[0], work)
            if done is not None:
                rows.pop(0)
                yield done[0]
                continue
            release_memory()
            sizes = examples.lengths[rows[0]]
            if len(rows[0]) == 1:
                raise ResourceError(does_not_fit(run.recipe, examples, rows[0][0]))
            run.eval_tokens = int(sizes.sum() if run.packed else sizes.max() * len(sizes)) // 2
            run.say(f"out of memory: from here on an evaluation takes at most {run.eval_tokens:,} tokens at once")
            rows = [part for row in rows for part in split_micro(row, examples.lengths, run.eval_tokens, run.packed)]
    finally:
        run.model.train(was_training)


def _attempt(run: Run, row: list[int], work: Callable[[Batch], T]) -> tuple[T] | None:
    """None where memory runs out; the error, and all that it holds on to, is gone by then."""
    try:
        with torch.no_grad(), autocast(run):
            return (work(collate_for(run, [run.eval_examples[i] for i in row]).to(run.device)),)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def does_not_fit(recipe: Any, examples: Any, index: int) -> str:
    """Say that the memory does not hold the example alone, and what would change that."""
    base, train = recipe.base, recipe.train
    remedies = ["lower data.max_length"]
    if not train.gradient_checkpointing:
        remedies.append("turn on train.gradient_checkpointing")
    if base.quantization == "none":
        remedies.append("set base.quantization to nf4")
    if train.precision == "fp32":
        remedies.append("set train.precision to bf16")
    tokens, where = int(examples.lengths[index]), examples.rows.location(examples[index].id)
    return (
        f"out of memory: one example of {tokens:,} tokens ({where}) does not fit by itself, so a smaller "
        f"train.micro_tokens cannot help: {', '.join(remedies)}, or take a smaller base"
    )


def batches_of(run: Run, indices: Iterable[int]) -> Iterator[Batch]:
    """Batches of `run.examples` on the device, as training would split these examples; in an order of their own."""
    for row in split_micro(list(indices), run.examples.lengths, run.micro_tokens, run.packed):
        yield collate_for(run, [run.examples[i] for i in row]).to(run.device)


def collate_for(run: Run, examples: list[Any]) -> Batch:
    """Collate examples as the run's model takes them."""
    pad = run.tokenizer.pad_token_id
    pad = pad if pad is not None else (run.tokenizer.eos_token_id or 0)
    return collate(examples, run.packed, pad, run.task.pool(run.model))


def autocast(run: Run) -> torch.autocast:
    """Autocast to the run's compute dtype; none in fp32."""
    return torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype != torch.float32)


def exact_match(run: Run) -> float | None:
    """Share of evaluation prompts whose greedy answer is the completion; None where there is nothing to compare.

    At most `train.eval_generate` prompts, evenly spread, answered by this process; none where the mean completion is
    longer than 64 tokens, where equality to the letter says nothing.
    """
    examples, limit = run.eval_examples, run.recipe.train.eval_generate
    if limit == 0 or examples.form != "prompt-completion":
        return None
    chosen = np.unique(np.linspace(0, len(examples) - 1, min(limit, len(examples))).astype(int))
    lengths = [int(examples[i].supervised.sum()) for i in chosen]
    if np.mean(lengths) > 64:
        return None
    prompts = [examples.prompt_ids(int(i)) for i in chosen]
    with torch.no_grad(), autocast(run):
        ends = [examples.stop_ids] * len(prompts)
        answers = generate(run.model, run.tokenizer, prompts, max_new_tokens=max(lengths) + 4, stop_ids=ends)
    references = [examples.reference(int(i)) for i in chosen]
    return float(np.mean([a.text.strip() == r.strip() for a, r in zip(answers, references, strict=True)]))

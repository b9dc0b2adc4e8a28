"""Batches of a run's examples, and the weighted sums of an evaluation over them."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from budwood.contract.examples import Batch, Example
from budwood.contract.types import Generator, Run
from budwood.data.packing import split_micro
from budwood.errors import ResourceError, is_out_of_memory
from budwood.model.device import gpu_memory
from budwood.model.halves.layer import evaluating
from budwood.model.recompute import layers_of
from budwood.model.streaming import release_memory

T = TypeVar("T")
U = TypeVar("U")

CHUNK = 256
"""Least number of label positions whose logits are in memory at the same time; on a CPU, where more gain nothing, all
that are."""
LOGITS = 1 << 28
"""Most logits in memory at the same time: 2,048 positions of 128k classes."""
BYTES = 256
"""Bytes of a GPU's memory for each of them: in 16 bit, with its gradient, it takes 4."""


def head_rows(run: Run, users: int = 1) -> int:
    """Return the number of label positions whose logits are in memory at the same time.

    On a GPU, each chunk costs the host some thirty launches, so chunks are as large as a share of its memory allows.

    Args:
        users: number of terms that are computed from them, each with copies of its own.
    """
    memory = gpu_memory(run.device)
    classes = int(getattr(run.model.config.get_text_config(), "vocab_size", 0) or 0) if memory else 0
    if not classes:
        return CHUNK
    return max(CHUNK, min(LOGITS, memory // BYTES) // users // classes // CHUNK * CHUNK)


class EvalTotals:
    """Weighted sums over the labels of an evaluation.

    Attributes:
        pairs: the (label, prediction) pairs if the task gathers them.
        sizes: the number of labels of each example, whose pairs are adjacent; if the task gathers them.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weight = 0.0
        self.pairs: list[tuple[Any, Any]] = []
        self.sizes: list[int] = []
        self._unread: list[tuple[list[str], Tensor, tuple[Tensor, Tensor] | None]] = []
        self._unread_sizes: list[Tensor] = []

    @classmethod
    def of(cls, task: Any, run: Run, noise: Callable[[Batch], Tensor | None] | None = None) -> EvalTotals:
        """Sum the task's loss and label metrics over `run.eval_examples` and all processes."""

        def gather(batch: Batch) -> EvalTotals:
            totals = cls()
            if not len(batch.labels):
                if run.sharded:  # as many passes as on the other processes
                    task.outputs(run.model, batch)
                return totals
            if task.gathers_predictions:  # counted without torch.bincount, which waits for the device
                sizes = torch.zeros(len(batch.keys), dtype=torch.int64, device=batch.labels.device)
                ones = torch.ones_like(batch.example_of_label)
                totals._unread_sizes.append(sizes.index_add_(0, batch.example_of_label, ones))
            weights = batch.task_weights
            for chunk, logits in label_logits(task, run, batch, None if noise is None else noise(batch)):
                totals.add(task, logits, batch.labels[chunk], weights[chunk])
            return totals

        parts = list(over_eval_batches(run, gather))
        cls._read(parts)
        total = cls()
        for part in parts:
            total.merge(part)
        parts = from_all_processes(run, total)
        total = parts[0]
        for part in parts[1:]:
            total.merge(part)
        return total

    def add(self, task: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Add labels [n] with their logits [n, …] and weights [n]; `read` makes them part of the sums."""
        values = {"loss": task.loss(logits, labels), **task.label_metrics(logits, labels)}
        weights = weights.double()
        sums = torch.stack([weights.sum(), *((value.double() * weights).sum() for value in values.values())])
        pairs = (labels, task.predict(logits)) if task.gathers_predictions else None
        self._unread.append((list(values), sums, pairs))

    def read(self) -> None:
        """Read what was added from the device."""
        self._read([self])

    @staticmethod
    def _read(parts: Sequence[EvalTotals]) -> None:
        """Read what was added to several totals, at once: a device that is asked for each idles in between."""
        sums = _values([sums for part in parts for _, sums, _ in part._unread])
        pairs = [pair for part in parts for _, _, pair in part._unread if pair is not None]
        columns = [_values(column) for column in zip(*pairs, strict=True)]
        sizes = _values([sizes for part in parts for sizes in part._unread_sizes])
        for part in parts:
            for names, _, pair in part._unread:
                part.weight += next(sums)
                for name in names:
                    part.sums[name] = part.sums.get(name, 0.0) + next(sums)
                if pair is not None:
                    part.pairs += zip(*(islice(column, len(pair[0])) for column in columns), strict=True)
            part.sizes += islice(sizes, sum(map(len, part._unread_sizes)))
            part._unread, part._unread_sizes = [], []

    def merge(self, other: EvalTotals) -> None:
        """Add the sums and pairs of `other`."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.weight += other.weight
        self.pairs += other.pairs
        self.sizes += other.sizes

    @property
    def means(self) -> dict[str, float]:
        """Weighted mean of each value over the labels."""
        return {name: value / self.weight if self.weight else 0.0 for name, value in self.sums.items()}


def _values(tensors: Sequence[Tensor]) -> Iterator[Any]:
    """Iterate over the values of tensors [n], read from the device at once."""
    return iter(torch.cat(list(tensors)).tolist() if tensors else [])


def label_logits(task: Any, run: Run, batch: Batch, noise: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks [n] of a batch's labels with their logits [n, …] in fp32 or wider, with `noise` in the inputs."""
    with task.noisy(run.model, noise):
        outputs = task.outputs(run.model, batch)
    flat = outputs.hidden.reshape(-1, outputs.hidden.shape[-1])
    for chunk in torch.arange(len(batch.labels), device=flat.device).split(head_rows(run, 2)):  # 2: they become fp32
        yield chunk, at_least_fp32(outputs.head(flat[batch.label_positions[chunk]]))


def from_all_processes(run: Run, value: T) -> list[T]:
    """Return each process's value, in the order of the processes."""
    return run.world.gather(value)


def eval_results(run: Run, work: Callable[[Batch], T]) -> list[T]:
    """Return `work(batch)` of the batches of `run.eval_examples` on all processes; see `over_eval_batches`.

    Args:
        work: returns values on the host; it runs in evaluation mode, without gradients, under autocast.
    """
    return [result for share in from_all_processes(run, list(over_eval_batches(run, work))) for result in share]


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32, or in its own dtype if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def over_eval_batches(run: Run, work: Callable[[Batch], T]) -> Iterator[T]:
    """Yield `work(batch)` for this process's batches of `run.eval_examples`, in eval mode without gradients.

    A thread collates the next batch meanwhile. If memory runs out, the batch is split and repeated, and later batches
    are limited to the same size. `work` may therefore have no effect other than its return value.

    Raises:
        ResourceError: a single example does not fit in memory.
    """
    examples = run.eval_examples
    assert examples is not None
    whole = split_micro(range(len(examples)), examples.lengths, run.eval_tokens, run.packed, examples.groups)
    rows = list(run.world.share(whole))
    others = extra_passes(run, len(rows))
    was_training, layers = run.model.training, layers_of(run.model)
    run.model.eval()

    def make(row: list[int]) -> Batch:
        batch = collate_for(run, [examples[i] for i in row], "eval")
        return batch.pinned() if run.device.type == "cuda" else batch

    try:
        while rows:
            with closing(made_ahead(make, list(rows))) as batches:
                for made in batches:
                    done = _attempt(run, made, work, layers)
                    if done is None:
                        break
                    rows.pop(0)
                    yield done[0]
            if not rows:
                break
            release_memory()
            sizes = examples.lengths[rows[0]]
            if len(set(examples.groups[rows[0]].tolist())) == 1:
                raise ResourceError(does_not_fit(run.recipe, examples, rows[0]))
            run.eval_tokens = int(sizes.sum() if run.packed else sizes.max() * len(sizes)) // 2
            run.say(f"out of memory: from now on, evaluation batches have at most {run.eval_tokens:,} tokens")
            options = (examples.lengths, run.eval_tokens, run.packed, examples.groups)
            rows = [part for row in rows for part in split_micro(sorted(row), *options)]
        for made in made_ahead(make, whole[:1] * others):
            _attempt(run, made, work, layers)
    finally:
        run.model.train(was_training)


def extra_passes(run: Run, count: int) -> int:
    """Return how many passes beyond its own `count` this process makes, so that all make as many on a sharded base.

    Ask before the first of its own: another process may wait inside a pass.
    """
    return max(run.world.gather(count)) - count if run.sharded else 0


def _attempt(run: Run, made: Future[Batch], work: Callable[[Batch], T], layers: Sequence[nn.Module]) -> tuple[T] | None:
    """Return `work` of a batch; None if memory runs out, after the error and all that it references are released."""
    try:
        with torch.no_grad(), autocast(run), evaluating(layers):
            return (work(made.result().to(run.device)),)
    except Exception as error:
        if not is_out_of_memory(error) or run.sharded:
            raise
        return None


def does_not_fit(recipe: Any, examples: Any, indices: list[int]) -> str:
    """Return the message for a group of examples that alone does not fit in memory, with the remedies."""
    base, train = recipe.base, recipe.train
    remedies = ["lower data.max_length"]
    if not train.gradient_checkpointing:
        remedies.append("turn on train.gradient_checkpointing")
    if base.quantization == "none":
        remedies.append("set base.quantization to nf4")
    if train.precision == "fp32":
        remedies.append("set train.precision to bf16")
    tokens, where = int(examples.lengths[indices].sum()), examples.location(indices[0])
    subject = f"one example of {tokens:,} tokens ({where})"
    if len(indices) > 1:
        subject = f"one group of {len(indices)} examples and {tokens:,} tokens ({where})"
    return (
        f"out of memory: {subject} does not fit by itself, so a smaller train.micro_tokens cannot help: "
        f"{', '.join(remedies)}, or use a smaller base"
    )


def batches_of(run: Run, indices: Iterable[int]) -> Iterator[Batch]:
    """Yield batches of `run.examples` on the device, split as in training; their order is unspecified."""
    examples = run.examples
    for row in split_micro(list(indices), examples.lengths, run.micro_tokens, run.packed, examples.groups):
        yield collate_for(run, [examples[i] for i in row], "eval").to(run.device)


def made_ahead(make: Callable[[T], U], items: Iterable[T]) -> abc.Generator[Future[U], None, None]:
    """Yield `make(item)` of each item; a thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="collate") as pool:
        upcoming: Future[U] | None = None
        for item in items:
            ready, upcoming = upcoming, pool.submit(make, item)
            if ready is not None:
                yield ready
        if upcoming is not None:
            yield upcoming


def collate_for(run: Run, examples: Iterable[Example], epoch: int | str) -> Batch:
    """Collate a batch for the run's task and model; `epoch` is "eval" in evaluations. See `Task.vary`."""
    task = run.task
    if task.varies():
        examples = [task.vary(example, Generator(run.seed, epoch, example.key)) for example in examples]
    return task.collate(list(examples), run.model, run.tokenizer, run.packed)


def autocast(run: Run, cache: bool = True) -> torch.autocast:
    """Return autocast to the run's compute dtype, disabled unless that is 16-bit; `cache` keeps parameters' casts."""
    narrow = run.dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(run.device.type, run.dtype if narrow else None, narrow, cache)

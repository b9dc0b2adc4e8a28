"""Rehearses a run on fake tensors: its base, its strategies, and `train_step` itself, with every operation traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)

from budwood.contract.discovery import PluginError
from budwood.contract.examples import Batch, Example
from budwood.contract.registry import Composition
from budwood.contract.types import Run
from budwood.data.examples import Examples
from budwood.data.packing import split_micro
from budwood.errors import BudwoodError, InputError, first_line
from budwood.model.device import planned_host
from budwood.model.embeddings import resize_base
from budwood.model.evaluation import autocast, collate_for, label_logits
from budwood.model.fake import fake_base, fake_tensors
from budwood.model.halves.layer import evaluating
from budwood.model.ops import attention
from budwood.model.quantizers import is_quantized, quantizer_of
from budwood.model.quantizers.experts import quantized_experts
from budwood.model.recompute import layers_of, recompute_layers
from budwood.planning.sharding import Gathering, layer_bytes
from budwood.planning.trace import CUDA_BLOCK, Trace
from budwood.recipe.data import embeddings_wanted, recipe_task
from budwood.recipe.schema import Recipe, build_composition
from budwood.training.batches import StepBatches, count_units
from budwood.training.loop import train_step
from budwood.training.micro_tokens import shared_out, wanted
from budwood.training.on_policy import find_generator
from budwood.training.packing_check import rows_to_try
from budwood.training.progress import Progress, planned_steps
from budwood.training.report import Report
from budwood.training.run_data import read_data
from budwood.training.setup import adapt_model, build_engine, build_optimizer, make_accelerator, plan_run
from budwood.training.sharding import check_shardable
from budwood.training.step import Engine
from budwood.untrusted.chat_template import today

QUANTIZED, BASE, ADAPTERS = "base, quantised", "base, not quantised", "adapters and their initial values"
GRADIENTS, OPTIMIZER, STRATEGIES = "gradients", "optimizer", "strategies"
"""Parts of the memory that exist when a step starts, or that it leaves behind."""

STEPS = 200
"""Optimizer steps of the first epoch whose micro-batches are looked at."""


@dataclass(frozen=True)
class Micro:
    """A micro-batch by its sizes: the indices of its examples, real tokens, positions with padding, and labels."""

    members: tuple[int, ...]
    tokens: int
    cells: int
    labels: int


@dataclass
class Rehearsal:
    """A prepared run on fake tensors.

    Attributes:
        examples: what the micro-batches are made of: the data, or a strategy's planned examples.
        steps: micro-batches of the run's first optimizer steps.
        recomputed: layers that recompute their activations; all of them if the recipe leaves it open.
        processes: of the planned run; the rehearsal is one of them.
        gathering: what it holds of a sharded base, and gathers, if it is `active`.
        can_shard: whether the base can be sharded with these strategies.
    """

    run: Run
    engine: Engine
    progress: Progress
    trace: Trace
    mode: FakeTensorMode
    examples: Sequence[Example]
    gathering: Gathering
    processes: int = 1
    can_shard: bool = False
    steps: list[list[Micro]] = field(default_factory=list)
    recomputed: int = 0

    def __post_init__(self) -> None:
        self.recomputed = sum(bool(layer.gradient_checkpointing) for layer in layers_of(self.run.model))
        self.lengths, self.label_counts = sizes_of(self.run, self.examples)
        self.split(self.run.micro_tokens)

    @property
    def groups(self) -> np.ndarray | None:
        """The group of each example; None: each is a group."""
        return self.run.examples.groups if self.examples is self.run.examples else None

    def split(self, micro_tokens: int) -> None:
        """Split the steps into micro-batches of at most so many tokens."""
        self.run.micro_tokens = self.run.eval_tokens = micro_tokens
        self.steps = _steps(self)

    def wanted(self, kind: str) -> int:
        """Return the size of micro-batches to take if the memory is ample; see `training.micro_tokens`."""
        return shared_out(self.run, wanted(self.run, kind), self.processes)

    def own(self, count: int) -> int:
        """Return how many of an optimizer step's micro-batches the process with the most of them has."""
        return -(-count // self.processes)

    def recompute(self, count: int) -> None:
        """Let the first `count` layers recompute their activations."""
        recompute_layers(self.run.model, count, self.run.recipe.train.activation_offloading)
        self.recomputed = count

    def micro(self, members: Sequence[int]) -> Micro:
        """Return the micro-batch of the examples with these indices."""
        return micro_of(self.run, self.lengths, self.label_counts, members)

    def evaluate(self, examples: Sequence[Example], micro: Micro) -> int:
        """Run a batch of an evaluation on fake tensors; returns the position in the trace at which it starts."""
        run = self.run
        batch = self._collate(examples, [micro], "eval")[0]
        self.trace.operations.clear()
        self.trace.in_pass = True
        self.gathering.begin()
        start = self.trace.mark()
        run.model.eval()
        with _naming(run), torch.no_grad(), autocast(run), evaluating(layers_of(run.model)):
            for chunk, logits in label_logits(run.task, run, batch, None):
                run.task.loss(logits, batch.labels[chunk])
        return start

    def _collate(self, examples: Sequence[Example], micros: Sequence[Micro], epoch: int | str) -> list[Batch]:
        """Return the fake batches of micro-batches, and tell the trace how much attention they need."""
        with unset_fake_temporarily():
            real = [collate_for(self.run, [examples[i] for i in micro.members], epoch) for micro in micros]
        self.trace.attention_pairs = sum(length * length for batch in real for length in batch.lengths) // 2
        return [_fake(batch, self.mode) for batch in real]

    def take_step(self, micros: Sequence[Micro], later: bool = False) -> int:
        """Take one optimizer step on fake tensors; returns the position in the trace at which it starts.

        Args:
            later: an earlier micro-batch of the same step has left its gradients.

        Raises:
            PluginError: a strategy reads values, which fake tensors do not have.
        """
        run, trace = self.run, self.trace
        batches = self._collate(self.examples, micros, 0)
        if later:
            for parameter in run.trainable:
                parameter.grad = torch.zeros_like(parameter)
            trace.part_of(GRADIENTS, (p.grad for p in run.trainable if p.grad is not None))
        trace.operations.clear()
        trace.in_pass = True
        self.gathering.begin()
        start = trace.mark()
        step = StepBatches(run.examples, np.zeros(0, dtype=np.int64), 0, run.micro_tokens, batches)
        run.model.train()
        with _naming(run):
            train_step(run, run.hooks, self.engine, self.progress, step, count_units(run, run.hooks, batches))
        return start


@contextmanager
def rehearse(recipe: Recipe, dtype: torch.dtype, cuda: bool = False, processes: int = 1) -> Iterator[Rehearsal]:
    """Prepare a run on fake CPU tensors inside the context, as `tune` prepares it.

    Args:
        dtype: compute dtype.
        cuda: trace the memory as CUDA's kernels and allocator take it.
        processes: of the run; one of them is rehearsed.

    Raises:
        BudwoodError: as `tune`.
        PluginError: a strategy reads values.
    """
    hooks = build_composition(recipe)
    task = recipe_task(recipe)
    cpu = torch.device("cpu")
    run = Run(
        recipe, Path(recipe.output), cpu, dtype, hooks.strategies, hooks, task, seed=recipe.train.seed,
        accelerator=make_accelerator(cpu), planning=True, say=lambda text: None,
    )  # fmt: skip
    plan = plan_run(run, hooks)
    can_shard = processes > 1 and _can_shard(run, hooks, plan.model)
    read_data(run, hooks, Report(quiet=True), today(), plan.model)
    recipe = run.recipe
    trace = Trace(hooks.current, CUDA_BLOCK if cuda else 1, on_cpu=not cuda)
    with ExitStack() as stack, fake_tensors() as mode, trace, planned_host(trace.hosting), _naming(run):
        mode.allow_non_fake_inputs = True  # tensors of a continued adapter, and constants that strategies keep
        run.base = fake_base(
            recipe.base.model, task.auto_class, dtype, recipe.base.trust_remote_code, task.needs_tokenizer,
            recipe.base.quantization, recipe.base.double_quantization, task.unused_modules,
            **task.model_kwargs(run.examples.labels),
        )  # fmt: skip
        if recipe.base.resize_embeddings:
            resize_base(run.base, embeddings_wanted(recipe, run.tokenizer))
        if owner := hooks.implements("load_base"):
            run.base.notes.append(f"{owner[0]} loads the base itself; the plan counts it as the recipe describes it")
        run.model = run.base.model
        gathering = Gathering(run.model, layer_bytes(run.model), trace, processes)
        attention.register()
        attention.forget_layouts()
        stack.callback(attention.forget_layouts)
        _plan_packing(run, mode)
        adapt_model(run, hooks)
        engine = build_engine(run, hooks)
        build_optimizer(run, hooks)
        engine.finish_step = _then(engine.finish_step, trace, gathering)  # type: ignore[method-assign]
        run.optimizer.register_step_pre_hook(lambda *_: _claim(trace, GRADIENTS, (p.grad for p in run.trainable)))
        run.optimizer.register_step_post_hook(lambda *_: _claim(trace, OPTIMIZER, _states(run)))
        _register(run, trace)
        progress = Progress(torch.amp.GradScaler("cpu", enabled=False))
        yield Rehearsal(run, engine, progress, trace, mode, _examples(run), gathering, processes, can_shard)


def _can_shard(run: Run, hooks: Composition, skeleton: Any) -> bool:
    """Return whether the base can be sharded; if the recipe says that it is, one that cannot is refused, as by tune."""
    try:
        check_shardable(run, hooks, skeleton)
    except InputError:
        if run.recipe.train.parallel == "shard":
            raise
        return False
    return True


def _then(
    finish: Callable[[], dict[str, Tensor]], trace: Trace, gathering: Gathering
) -> Callable[[], dict[str, Tensor]]:
    """Return `finish`, the first thing after the micro-batches of a step, such that the trace knows it."""

    def call() -> dict[str, Tensor]:
        trace.in_pass = False
        gathering.begin()
        return finish()

    return call


def _register(run: Run, trace: Trace) -> None:
    """Say to which part of the memory every tensor belongs that exists before the first step."""
    trace.name_modules(run.model)
    trace.part_of(ADAPTERS, [*run.trainable, *run.start])
    for module in run.model.modules():
        if is_quantized(module):
            quantizer: Any = quantizer_of(module)
            tensors = [quantizer.weight(module), *quantizer.constants(module)]
            trace.part_of(QUANTIZED, tensors)
    trace.part_of(QUANTIZED, [tensor for module in quantized_experts(run.model) for tensor in module.stored])
    trace.part_of(BASE, [*run.model.parameters(), *run.model.buffers()])
    trace.rest_is(STRATEGIES)


def _claim(trace: Trace, part: str, tensors: Any) -> None:
    trace.part_of(part, (tensor for tensor in tensors if isinstance(tensor, Tensor)))


def _states(run: Run) -> Iterator[Any]:
    for state in run.optimizer.state.values():
        yield from state.values()


def _examples(run: Run) -> Sequence[Example]:
    """Return the examples of the micro-batches: the data's, or those that a strategy plans.

    Raises:
        PluginError: a strategy generates examples, but plans none.
    """
    with unset_fake_temporarily():
        planned = [example for examples in run.hooks.call("planned_examples", run=run) for example in examples]
    maker = find_generator(run.hooks)
    if maker is not None and not planned:
        raise PluginError(f"{maker} implements next_examples: a plan needs planned_examples too.")
    return planned or run.examples


def sizes_of(run: Run, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Return the length and the number of labels of each example."""
    if isinstance(examples, Examples):
        return examples.lengths, examples.label_counts
    lengths = np.array([run.task.length(example) for example in examples], dtype=np.int64)
    return lengths, np.array([len(example.labels) for example in examples], dtype=np.int64)


def micro_of(run: Run, lengths: np.ndarray, label_counts: np.ndarray, members: Sequence[int]) -> Micro:
    """Return the micro-batch of the examples with these indices, of which all sizes are given."""
    chosen = lengths[list(members)]
    tokens = int(chosen.sum())
    cells = tokens if run.packed else len(members) * int(chosen.max())
    return Micro(tuple(members), tokens, cells, int(label_counts[list(members)].sum()))


def _steps(rehearsal: Rehearsal) -> list[list[Micro]]:
    """Split the first optimizer steps into micro-batches, as the run does."""
    run, lengths = rehearsal.run, rehearsal.lengths
    drawn = [np.arange(len(rehearsal.examples))]
    if rehearsal.examples is run.examples:
        drawn = [indices for _, indices in islice(planned_steps(run), STEPS)]
    splits = (
        split_micro(indices, lengths, run.micro_tokens, run.packed, rehearsal.groups, rehearsal.processes)
        for indices in drawn
    )
    return [[rehearsal.micro(members) for members in split] for split in splits]


def _plan_packing(run: Run, mode: FakeTensorMode) -> None:
    """Find out whether the model takes packed rows; whether it keeps their examples apart is seen on real values."""
    if not run.task.packs_rows(run.model):
        run.packed = False
        return
    run.model.set_attn_implementation(attention.IMPLEMENTATION)
    with unset_fake_temporarily():
        rows = rows_to_try(run, [0, -1], [run.examples[0], run.examples[-1]])
        batches = [collate_for(run, row, "eval") for row in rows]
    try:
        with torch.no_grad(), autocast(run):
            for batch in batches:
                run.task.outputs(run.model, _fake(batch, mode))
    except BudwoodError:
        raise
    except Exception as error:  # a model class may raise any exception
        run.base.notes.append(f"rows are padded: {type(run.model).__name__} takes no packed rows ({first_line(error)})")
        run.packed = False
        run.model.set_attn_implementation("sdpa" if getattr(run.model, "_supports_sdpa", False) else "eager")


@contextmanager
def _naming(run: Run) -> Iterator[None]:
    """Turn torch's errors about values of fake tensors into one line that names the strategy."""
    try:
        yield
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        reads = any(isinstance(link, DataDependentOutputException | DynamicOutputShapeException) for link in chain)
        if not reads:
            raise
        owner = next((found for link in chain if (found := run.hooks.culprit(link)) is not None), None)
        name = str(owner) if owner is not None else f"{type(run.model).__name__} or {run.task}"
        raise PluginError(
            f"{name} reads the values of tensors, which a plan does not have ({first_line(chain[-1])}): if "
            "`run.planning` is set, it must take the largest case instead."
        ) from error


def _fake(batch: Batch, mode: FakeTensorMode) -> Batch:
    """Convert the tensors of a batch to fake ones with the same shape, dtype and device."""

    def convert(value: Any) -> Any:
        return mode.from_tensor(value) if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else value

    values = {part.name: convert(getattr(batch, part.name)) for part in fields(batch)}
    for name in ("inputs", "columns"):
        values[name] = {key: convert(tensor) for key, tensor in values[name].items()}
    return Batch(**values)

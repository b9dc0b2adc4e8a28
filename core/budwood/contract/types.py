"""The objects that hooks receive and return: Run, Step, LossTerm and their parts; examples.py has Example and Batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from budwood.contract.average import Average, Update
from budwood.contract.examples import Batch
from budwood.contract.samples import Prompts, Sample, Sampler
from budwood.parallel.processes import Processes

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from budwood.adapters.store import SavedAdapter
    from budwood.contract.registry import Composition
    from budwood.contract.strategy import Strategy
    from budwood.data.examples import Examples
    from budwood.model.base import Base
    from budwood.model.task import Task
    from budwood.recipe.schema import Recipe

UNITS = ("label", "example", "group", "step")
"""Core's units of loss terms; `batch_counts` adds custom ones."""


@dataclass(frozen=True)
class LossTerm:
    """A named part of the loss. Core divides the sum of `values` by the count of its unit in the optimizer step.

    Attributes:
        name: logged under this name; unique in a run.
        values: [labels], [examples], [groups] or a scalar, depending on the unit; floating point, attached to the
            graph. Core multiplies values of unit "label" by the labels' weights.
        unit: "label", "example", "group", "step" (added once per optimizer step, never replayed), or a unit from
            `batch_counts`, whose values may have any shape.
        weight: factor in the loss; the log shows the clean mean without it. With 0 a term is only logged.
    """

    name: str
    values: Tensor
    unit: str = "label"
    weight: float = 1.0


@dataclass
class Outputs:
    """The result of a forward pass: hidden states, and the head that has not been applied to them yet.

    Attributes:
        hidden: [R, T, d], or [R, 1, classes] if the model pools each row; `label_positions` index the flattened rows.
            NaN at other positions, in a pass of which only the head reads the outputs.
        head: the model's own head; maps rows of `hidden` [n, d] to logits [n, vocabulary or classes].
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reference:
    """The reference model's outputs at a micro-batch's labels, without a graph.

    Attributes:
        hidden: [L, d] hidden states at the labels.
        log_probs: [L] of the labels; None if the task has no log-probabilities.
        logits: maps label positions [n] to logits [n, vocabulary or classes].
    """

    hidden: Tensor
    log_probs: Tensor | None
    logits: Callable[[Tensor], Tensor]


class Generator:
    """Random numbers determined by a key: drawn on the CPU, so equal on every device and process."""

    def __init__(self, *key: object) -> None:
        self.evaluates: bool = "eval" in key
        """Whether it is keyed for an evaluation, in which nothing is augmented; see `Task.vary`."""
        digest = hashlib.sha256(repr(key).encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def normal_like(self, tensor: Tensor) -> Tensor:
        """Sample from the standard normal distribution with the shape, dtype and device of `tensor`."""
        return torch.randn(tensor.shape, generator=self._generator).to(tensor)

    def uniform_like(self, tensor: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Sample uniformly from [low, high) with the shape, dtype and device of `tensor`."""
        return torch.empty(tensor.shape).uniform_(low, high, generator=self._generator).to(tensor)

    @property
    def torch_generator(self) -> torch.Generator:
        """The underlying CPU generator, for other distributions."""
        return self._generator


Which = Literal["start", "base"]
"""A reference: the model at the start of the run, or the base."""

Terms = Callable[[Tensor, Tensor], Tensor]
"""Maps logits [n, V] and their labels' positions [n] to values [n] of unit "label"."""


class StepEngine(Protocol):
    """Core's implementation of `Step` (training.step.Engine)."""

    scores_sequences: bool

    def noisy_forward(self, step: Step, noise: Tensor | None) -> Outputs: ...
    def replay(self, step: Step, noise: Tensor | None, weight: float, gradient: bool) -> Tensor | None: ...
    def noise_gradient(self, step: Step, noise: Tensor, terms: Terms | None) -> Tensor: ...
    def reference(self, step: Step, which: Which) -> Reference: ...
    def reference_log_probs(self, step: Step) -> Tensor: ...


@dataclass
class Step:
    """One micro-step. A pass is a forward, its loss terms and its backward: core's, `replay` or `noise_gradient`.

    Attributes:
        batch: the micro-batch.
        micro_step: its index in the optimizer step on this process, from 0.
        noise: [R, T, d] or None; the task's forward adds it to the embeddings' output. If set before core's pass, that
            pass is noisy, and so are its logged terms.
        main_weight: weight of core's backward; FreeLB sets 1/K.
        track_noise: if set before core's backward, `noise_grad` receives the gradient.
        noise_grad: [R, T, d] fp32, the gradient of core's pass with respect to the embeddings' output.
        loss: detached scalar of the last pass: its label and example terms, each divided by its unit's count in the
            optimizer step and multiplied by its weight; the sum over micro-steps is the optimizer step's loss. It
            includes `step_terms` in linear form; then only differences between passes are meaningful.
        cache: results computed once per micro-step that do not depend on the noise, such as a teacher's logits.
        replaying: True inside `forward`, `replay` and `noise_gradient`.
        compared: True inside `forward`, whose outputs are compared with those of a pass.
    """

    run: Run
    batch: Batch
    engine: StepEngine
    micro_step: int = 0
    noise: Tensor | None = None
    main_weight: float = 1.0
    track_noise: bool = False
    noise_grad: Tensor | None = None
    loss: Tensor | None = None
    replaying: bool = False
    compared: bool = False
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def scores_sequences(self) -> bool:
        """Whether a strategy's terms need the labels' log-probabilities."""
        return self.engine.scores_sequences

    @property
    def kept(self) -> dict[str, Any]:
        """`cache` under its name in version 1 of the contract."""
        return self.cache

    def forward(self, noise: Tensor | None = None) -> Outputs:
        """Run the model with only `noise` on the embeddings, for terms that compare clean and noisy outputs.

        Inside a pass (in a `forward` wrapper or `token_terms`) the outputs become part of it: every chunk of
        `token_terms` may use them, and their gradient reaches the parameters when the pass ends. Do not use them in
        another pass.
        """
        return self.engine.noisy_forward(self, noise)

    def logits(self, outputs: Outputs, positions: Tensor) -> Tensor:
        """Return the logits [n, vocabulary or classes] of `outputs` at the labels `positions` [n]."""
        rows = outputs.hidden.flatten(0, -2).index_select(0, self.batch.label_positions[positions])
        return outputs.head(rows)

    def replay(self, noise: Tensor | None, weight: float = 1.0, gradient: bool = False) -> Tensor | None:
        """Run a forward and backward pass with `noise`, with label and example terms multiplied by `weight`.

        Parameter gradients accumulate. With `gradient`, returns the gradient [R, T, d] fp32 of the same weighted terms
        with respect to the noise, otherwise None.
        """
        return self.engine.replay(self, noise, weight, gradient)

    def noise_gradient(self, noise: Tensor, terms: Terms | None = None) -> Tensor:
        """Return the gradient [R, T, d] fp32 of the replayed terms with respect to `noise` [R, T, d] fp32.

        Parameter gradients do not change. `terms` replaces all terms: it maps a chunk's noisy logits [n, V] and label
        positions [n] to values [n], and must detach any tensor that it compares the logits with.
        """
        return self.engine.noise_gradient(self, noise, terms)

    def reference(self, which: Which = "start") -> Reference:
        """Return the outputs of a frozen model without a second copy of the base: the reference of an objective.

        Computed once per micro-step and shared by all strategies. If a strategy sets `uses_reference`, it is computed
        before the policy's forward pass, so that both never need memory at the same time.

        Args:
            which: "start": the model before the first step, with the adapter that the recipe's `adapter` continues; a
                new adapter does not change the model, so without `adapter` it is the base. "base": the run's adapter
                off, also if the run continues one.

        Raises:
            InputError: "base", and no strategy of the run owns an adapter; declare `requires = ("adapter",)`.
        """
        return self.engine.reference(self, which)

    def reference_log_probs(self) -> Tensor:
        """Return the labels' log-probabilities [L] under `reference()`, cached if a strategy sets `caches_reference`.

        Raises:
            InputError: the task has no log-probabilities.
        """
        return self.engine.reference_log_probs(self)

    def zero_noise(self) -> Tensor:
        """Return fp32 zeros in the shape of the embeddings' output, [rows, width, d] for text, on its device."""
        return self.run.task.noise_like(self.run.model, self.batch)

    def generator(self, strategy: Strategy, example: int) -> Generator:
        """Return a generator keyed by seed, strategy, optimizer step and example (index into `batch.keys`).

        Every call restarts it, so a replay draws the same numbers.
        """
        return Generator(self.run.seed, strategy.name, self.run.step, self.batch.keys[example])


@dataclass
class ParameterGroup:
    """Trainable parameters; `learning_rate_ratio` multiplies the recipe's rate, `weight_decay` replaces its decay."""

    name: str
    parameters: dict[str, nn.Parameter]
    learning_rate_ratio: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True)
class BestMetric:
    """The metric, such as "eval_loss", that selects a run's best evaluation, also for early stopping."""

    name: str
    higher: bool = False  # whether a higher value is better
    owner: str = field(default="", compare=False)  # the plugin that chose it, for messages; set by core


@dataclass(frozen=True)
class Event:
    """An event of a run; `kind` is "start", "step", "evaluation" or "end"."""

    kind: str
    step: int
    values: dict[str, Any]


@dataclass
class Plan:
    """A recipe before it runs, with its composition and problems."""

    recipe: Recipe
    strategies: Sequence[Strategy]
    steps: int | None = None  # optimizer steps; None until the data has been read if the recipe counts epochs
    model: PreTrainedModel | None = None  # the base on the meta device; None if the config alone is not enough
    task: Task = None  # type: ignore[assignment]  # None only if the recipe's task cannot be loaded
    start_adapter: SavedAdapter | None = None  # the adapter that the recipe continues
    tokenizer: PreTrainedTokenizerBase | None = None  # the base's; None if the task needs none
    problems: list[str] = field(default_factory=list)

    def problem(self, strategy: Strategy | Task, text: str) -> None:
        """Record a problem of a strategy, or of the task; all problems are reported together."""
        self.problems.append(f"{strategy}: {text}")


_LATER: Any = None


@dataclass
class Run:
    """The state of a run. Attributes are set as the run proceeds: a hook can read all that earlier stages have set.

    `dtype` is the compute dtype. `trainable` parameters are fp32. `step` counts completed optimizer steps. `counts`
    holds the units of the current optimizer step, over all micro-steps and processes.
    """

    recipe: Recipe
    directory: Path
    device: torch.device
    dtype: torch.dtype
    strategies: Sequence[Strategy] = ()
    hooks: Composition = _LATER
    task: Task = _LATER
    tokenizer: PreTrainedTokenizerBase = _LATER  # None if the task needs none
    base: Base = _LATER
    model: PreTrainedModel = _LATER
    accelerator: Accelerator = _LATER
    optimizer: Optimizer = _LATER
    scheduler: LRScheduler = _LATER
    examples: Examples = _LATER
    eval_examples: Examples | None = None
    held_out: list[int] = field(default_factory=list)  # rows of the training data that are `eval_examples` instead
    groups: list[ParameterGroup] = field(default_factory=list)
    seed: int = 0
    steps: int | None = None
    step: int = 0
    epoch: int = 0
    task_weight: float = 1.0  # weight of the task's loss; `prepare_model` lowers it if a strategy shares the loss
    planning: bool = False  # the steps run on fake tensors, without values: take the largest case that they allow
    packed: bool = True
    micro_tokens: int = 0  # most tokens per micro-batch: the recipe's or the plan's, reduced if memory runs out
    eval_tokens: int = 0  # the same for evaluation
    reference_tokens: int = 0  # the same for a cached reference
    best_metric: BestMetric | None = None  # the task's, unless a strategy replaces it in `prepare_model`
    average: Average | None = None  # set by `average_with`
    adapter_final: bool = True  # a strategy sets False until its adapter is final; until then no evaluation is the best
    world: Processes = field(default_factory=Processes)  # the processes of this run, and what they exchange
    sharded: bool = False  # the base's layers are sharded: every process makes as many passes as the others
    counts: dict[str, float] = field(default_factory=dict)
    planned: dict[str, Any] = field(default_factory=dict)  # memory and time as `budwood plan --json` gives them; or {}
    spare_memory: int = 0  # bytes that the plan leaves free
    before: dict[str, float] = field(default_factory=dict)  # metrics of the evaluation before the first step
    metrics: dict[str, float] = field(default_factory=dict)  # latest value of every logged metric
    logged: dict[str, Any] = field(default_factory=dict)  # passed to `log` in the current optimizer step
    answers: list[dict[str, str]] = field(default_factory=list)  # prompt, answer, reference: some of an evaluation's
    say: Callable[[str], None] = print  # shows one line to the user
    start: list[Tensor] = field(default_factory=list)  # initial values, in the order of `trainable`
    start_adapter: SavedAdapter | None = None  # the adapter that the recipe continues; set before the base is loaded
    grown_from: tuple[int, int] | None = (
        None  # its lowest and highest rank, if a strategy raises them in `prepare_model`
    )
    only_adapter_trains: bool = True  # whether all of `trainable` belongs to the strategy that owns the adapter
    starts_as_base: bool = True  # a strategy sets False in `prepare_model` if its new adapter changes the base at once
    sampler: Sampler | None = None  # implements `generate`; set once the model is prepared, never in planning
    _generators: dict[str, tuple[int, Generator]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        usual = getattr(self.recipe, "micro_tokens", 0)
        self.micro_tokens = self.micro_tokens or usual
        self.eval_tokens = self.eval_tokens or usual
        self.reference_tokens = self.reference_tokens or usual
        if self.task is not None and self.best_metric is None:
            self.best_metric = BestMetric(self.task.best_metric, not self.task.lower_is_better, str(self.task))

    @property
    def trainable(self) -> list[nn.Parameter]:
        """All trainable parameters, group by group."""
        return [p for group in self.groups for p in group.parameters.values()]

    @property
    def process_index(self) -> int:
        """This process among those of the run, from 0."""
        return self.world.rank

    @property
    def processes(self) -> int:
        """Number of processes of the run."""
        return self.world.size

    def generator(self, strategy: Strategy) -> Generator:
        """Return the strategy's random stream for this optimizer step, the same on every process."""
        step, generator = self._generators.get(strategy.name, (-1, None))
        if generator is None or step != self.step:
            generator = Generator(self.seed, strategy.name, self.step)
            self._generators[strategy.name] = (self.step, generator)
        return generator

    def drop_gradients(self) -> None:
        """Remove the gradients of all trainable parameters."""
        for parameter in self.trainable:
            parameter.grad = None

    def begin_step_again(self) -> None:
        """Discard the current optimizer step: gradients, logged values, and the state of the random streams."""
        self.drop_gradients()
        self.logged.clear()
        self._generators.clear()

    def generate(
        self, prompts: Prompts, *, adapter: bool = True, max_new_tokens: int = 64, temperature: float = 1.0,
        top_p: float = 1.0, stop: Sequence[str] = (), samples: int = 1,
    ) -> list[list[Sample]]:  # fmt: skip
        """Generate `samples` continuations of each prompt with the current model in evaluation mode.

        Inside `evaluate` it uses the averaged parameters, if the run has an average. Batches depend only on the prompts
        and their order, and random numbers only on seed, optimizer step, prompt and sample: the same call in the same
        step returns the same samples.

        Args:
            prompts: examples, cut to their prompts by `task.probe`; texts; or token ids. Examples are identified for
                random numbers by their keys, other prompts by tokens and index.
            adapter: False turns the run's adapter off, so that the base generates.
            max_new_tokens: limit per sample.
            temperature: 0 means greedy decoding.
            top_p: sample from the smallest set of most likely tokens that holds this share of the probability.
            stop: strings that end a sample's text; they are removed from it.

        Returns:
            The samples of each prompt, in the order of `prompts`.

        Raises:
            InputError: the task does not generate text; a prompt is empty or fills the model's context; an option is
                out of range; `adapter=False` and no strategy owns an adapter.
            RuntimeError: the model is not prepared yet, or the run is only being planned.
        """
        if self.sampler is None:
            raise RuntimeError("run.generate: not available in planning, or before the model is prepared")
        return self.sampler(
            self, prompts, adapter=adapter, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
            stop=stop, samples=samples,
        )  # fmt: skip

    def log(self, name: str, value: float | Tensor) -> None:
        """Log a number for the current optimizer step.

        Tensors are read together with the loss once the passes of the step have ended; one that a hook logs after them
        is read when the step ends, and the device is waited for again.

        Raises:
            PluginError: core or another plugin already logs under that name.
            ValueError: `value` is not a single number.
        """
        if not (value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)):
            raise ValueError(f"run.log: '{name}' must be a single number")
        if self.hooks is not None:
            self.hooks.claim(name)
        self.logged[name] = value

    def average_with(self, update: Update, start: int = 1, every: int = 1) -> None:
        """Average the trainable parameters over the run; call it in `prepare_model`, and own the slot "average".

        Core keeps a shadow of each parameter, saves it in checkpoints and slices it in `replace_parameter`. From step
        `start` on, the average is evaluated, kept as the best, exported and reported; training continues with the
        parameters themselves.

        Args:
            update: updates a shadow in place; see `budwood.contract.average.Update`.
            start: the first step to average, from 1.
            every: average every `every`-th step from `start` on.

        Raises:
            ValueError: `start` or `every` is below 1, the run already has an average, or its parameters are chosen.
        """
        if start < 1 or every < 1:
            raise ValueError(f"average_with: start {start} and every {every} must be at least 1")
        if self.average is not None:
            raise ValueError('average_with: the run already has an average; declare slots = ("average",)')
        if self.groups:
            raise ValueError("average_with: call it in prepare_model")
        self.average = Average(update, start, every)

    def replace_parameter(self, old: nn.Parameter, new: nn.Parameter, index: Any) -> None:
        """Replace `old` with `new` in the groups and the optimizer; the caller replaces it in its module.

        Args:
            old: a trainable parameter.
            new: its successor, of the shape of `old[index]`.
            index: the part to keep of `old`, of its optimizer states of the same shape, and of its average.

        Raises:
            ValueError: `old` is not trainable, `new` does not have the shape of `old[index]`, or the run continues an
                adapter, which stays the reference as it is.
        """
        if self.start_adapter is not None:
            raise ValueError("replace_parameter: a run that continues an adapter must keep the shape of its tensors")
        if old.data[index].shape != new.shape:
            raise ValueError(f"replace_parameter: old[index] is {tuple(old.data[index].shape)}, new {tuple(new.shape)}")
        for group in self.groups:
            for name, parameter in group.parameters.items():
                if parameter is old:
                    group.parameters[name] = new
                    break
            else:
                continue
            break
        else:
            raise ValueError("replace_parameter: the parameter is not trainable")
        if self.start:
            position = next(i for i, parameter in enumerate(self.trainable) if parameter is new)
            self.start[position] = self.start[position][index].clone()
        if self.average is not None:
            self.average.replace(old, new, index)
        if self.optimizer is None:
            return
        for torch_group in self.optimizer.param_groups:
            torch_group["params"] = [new if p is old else p for p in torch_group["params"]]
        state = self.optimizer.state.get(old)
        if state:
            sliced = getattr(self.optimizer, "sliced_state", None)
            self.optimizer.state[new] = (
                sliced(old, index)
                if sliced is not None
                else {
                    k: v[index].clone() if isinstance(v, Tensor) and v.shape == old.shape else v
                    for k, v in state.items()
                }
            )
        self.optimizer.state.pop(old, None)

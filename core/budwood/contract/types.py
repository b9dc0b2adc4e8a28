"""What hooks receive and return: Run, Step, LossTerm and their parts. Examples and batches are in examples.py."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from budwood.contract.average import Average, Update
from budwood.contract.examples import Batch
from budwood.contract.samples import Prompts, Sample, Sampler

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from budwood.contract.registry import Composition
    from budwood.contract.strategy import Strategy
    from budwood.data.examples import Examples
    from budwood.model.base import Base
    from budwood.model.task import Task
    from budwood.recipe.schema import Recipe

UNITS = ("label", "example", "group", "step")
"""Core's units of loss terms; `batch_counts` adds others."""


@dataclass(frozen=True)
class LossTerm:
    """A named part of the loss. Core divides the sum of `values` by the count of its unit in the optimizer step.

    Attributes:
        name: under which it is logged; unique in a run.
        values: [labels], [examples] or [groups] or a scalar, by unit; floating, attached to the graph. Core multiplies
            values of unit "label" by the labels' weights.
        unit: what one value belongs to: "label", "example", "group", "step", or a name that `batch_counts` counts,
            whose values have any shape. A term of unit "step" is added once an optimizer step and never replayed.
        weight: factor in the loss; the log shows the clean mean without it.
    """

    name: str
    values: Tensor
    unit: str = "label"
    weight: float = 1.0


@dataclass
class Outputs:
    """What a forward gives: everything up to the head, and the head.

    Attributes:
        hidden: [R, T, d], or [R, 1, classes] where the model pools by row; flattened, it is what label_positions index.
        head: maps rows of `hidden` [n, d] to logits [n, vocabulary or classes]; the model's own head, exactly.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reference:
    """What the reference model gives at a micro-batch's labels; nothing has a graph.

    Attributes:
        hidden: [L, d], the reference's outputs at the labels.
        log_probs: [L] of the labels; None if the task has no log-probabilities.
        logits: maps labels' positions [n] to the reference's logits [n, vocabulary or classes].
    """

    hidden: Tensor
    log_probs: Tensor | None
    logits: Callable[[Tensor], Tensor]


class Generator:
    """Random numbers that depend on a key alone: drawn on the CPU, so equal on every device and process."""

    def __init__(self, *key: object) -> None:
        digest = hashlib.sha256(repr(key).encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def normal_like(self, tensor: Tensor) -> Tensor:
        """Standard normal numbers in the shape, dtype and device of `tensor`."""
        return torch.randn(tensor.shape, generator=self._generator).to(tensor)

    def uniform_like(self, tensor: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Numbers uniform in [low, high) in the shape, dtype and device of `tensor`."""
        return torch.empty(tensor.shape).uniform_(low, high, generator=self._generator).to(tensor)

    @property
    def torch_generator(self) -> torch.Generator:
        """The generator itself, on the CPU, for other draws."""
        return self._generator


Terms = Callable[[Tensor, Tensor], Tensor]
"""From logits [n, V] and the labels they belong to, `positions` [n], to values [n] of unit "label"."""


class StepEngine(Protocol):
    """What core puts behind `Step` (training.step.Engine)."""

    scores_sequences: bool

    def noisy_forward(self, step: Step, noise: Tensor | None) -> Outputs: ...
    def replay(self, step: Step, noise: Tensor | None, weight: float, gradient: bool) -> Tensor | None: ...
    def noise_gradient(self, step: Step, noise: Tensor, terms: Terms | None) -> Tensor: ...
    def reference(self, step: Step, start: bool) -> Reference: ...


@dataclass
class Step:
    """One micro-step, and what a strategy may ask of it.

    A pass is a forward, its loss terms and its backward: core's own, a `replay`, or a `noise_gradient`.

    Attributes:
        batch: the micro-batch.
        micro_step: its index in the optimizer step on this process, from 0.
        noise: [R, T, d] or None; added to the embeddings' output by the task's forward. Set before core's own pass, it
            makes that pass a noisy one, and the terms are then logged as that pass finds them.
        main_weight: weight of core's own backward; FreeLB sets 1/K.
        track_noise: set before core's backward to find that pass's gradient in `noise_grad`.
        noise_grad: [R, T, d] fp32, the gradient of core's own pass with respect to the embeddings' output.
        loss: of the last pass: its label and example terms, each over its unit's count in the optimizer step and times
            its own weight; summed over the micro-steps, they are the optimizer step's loss. A scalar, detached. With
            `step_terms` their linear form is in it, so that only differences between passes mean something.
        cache: what is computed once a micro-step and does not depend on the noise, such as a teacher's logits.
        replaying: True inside `forward`, `replay` and `noise_gradient`.
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
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def scores_sequences(self) -> bool:
        """Whether a strategy's terms need the labels' log-probabilities."""
        return self.engine.scores_sequences

    @property
    def kept(self) -> dict[str, Any]:
        """`cache`, as version 1 of the contract called it."""
        return self.cache

    def forward(self, noise: Tensor | None = None) -> Outputs:
        """Run the model with `noise`, and no other, on the embeddings, for terms that compare clean with noisy.

        Inside a pass (from a `forward` wrapper or `token_terms`) the outputs take part in it: `token_terms` may use
        them in any of its chunks; their gradient is gathered as that of the pass's own outputs is, and reaches the
        parameters when the pass ends. They are of no use in another pass.
        """
        return self.engine.noisy_forward(self, noise)

    def logits(self, outputs: Outputs, positions: Tensor) -> Tensor:
        """Logits [n, vocabulary or classes] of `outputs` at the labels `positions` [n], through their head."""
        rows = outputs.hidden.flatten(0, -2).index_select(0, self.batch.label_positions[positions])
        return outputs.head(rows)

    def replay(self, noise: Tensor | None, weight: float = 1.0, gradient: bool = False) -> Tensor | None:
        """Forward with `noise`, all label and example terms times `weight`, backward; parameters' gradients add up.

        Returns:
            With `gradient` the gradient [R, T, d] fp32 of the same weighted terms with respect to the noise, else None.
        """
        return self.engine.replay(self, noise, weight, gradient)

    def noise_gradient(self, noise: Tensor, terms: Terms | None = None) -> Tensor:
        """Gradient [R, T, d] fp32 of the terms that are replayed with respect to `noise`; no parameter's is touched.

        Args:
            noise: [R, T, d] fp32.
            terms: function of a chunk's noisy logits [n, V] and its labels' positions [n], whose values [n] take the
                place of all terms. Whatever it compares them with must be detached.
        """
        return self.engine.noise_gradient(self, noise, terms)

    def reference(self, start: bool = False) -> Reference:
        """What the model gives with the run's adapter off; with `start`, with the adapter that the run started from.

        It is computed once a micro-step and shared by all strategies that ask. A strategy that sets `uses_reference`
        has it computed before the policy's forward, so that both never take memory at the same time.

        Raises:
            InputError: no strategy of the run owns an adapter; declare `requires = ("adapter",)`.
        """
        return self.engine.reference(self, start)

    def zero_noise(self) -> Tensor:
        """Zeros fp32 on the device, in the shape of what noise is added to: [rows, width, d] for text."""
        return self.run.task.noise_like(self.run.model, self.batch)

    def generator(self, strategy: Strategy, example: int) -> Generator:
        """A generator keyed by seed, strategy, optimizer step and the example (index into `batch.keys`).

        Each call starts it anew, so that a replay draws the same numbers.
        """
        return Generator(self.run.seed, strategy.name, self.run.step, self.batch.keys[example])


@dataclass
class ParameterGroup:
    """Parameters that train together: `learning_rate_ratio` multiplies the recipe's rate, `weight_decay` overrides."""

    name: str
    parameters: dict[str, nn.Parameter]
    learning_rate_ratio: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True)
class BestMetric:
    """The metric by which a run keeps its best evaluation, early stopping included.

    Attributes:
        name: as an evaluation gives it, such as "eval_loss".
        higher: whether a higher value is better.
        owner: who chose it, for messages; core fills it in.
    """

    name: str
    higher: bool = False
    owner: str = field(default="", compare=False)


@dataclass(frozen=True)
class Event:
    """Something that happened: kind "start", "step", "evaluation", "end"; `values` by name."""

    kind: str
    step: int
    values: dict[str, Any]


@dataclass
class Plan:
    """A recipe before it runs: the composition and its problems."""

    recipe: Recipe
    strategies: Sequence[Strategy]
    steps: int | None = None
    """Optimizer steps of the run; if the recipe counts epochs, None until the data has been read."""
    model: PreTrainedModel | None = None
    """The base's modules on the meta device, without weights; None if the config alone does not give them."""
    task: Task = None  # type: ignore[assignment]  # None only if the recipe's task cannot be loaded
    """The recipe's task."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """That of the base; None for a task that needs none."""
    problems: list[str] = field(default_factory=list)

    def problem(self, strategy: Strategy, text: str) -> None:
        """Record what cannot work; all problems are reported together."""
        self.problems.append(f"{strategy}: {text}")


_LATER: Any = None


@dataclass
class Run:
    """What a run is made of. Attributes are filled in the order of the run; a hook finds all that came before it.

    `dtype` is the compute dtype; `trainable` parameters are fp32; `step` counts completed optimizer steps; `counts`
    are the units of the current optimizer step, over all micro-steps and processes.
    """

    recipe: Recipe
    directory: Path
    device: torch.device
    dtype: torch.dtype
    strategies: Sequence[Strategy] = ()
    hooks: Composition = _LATER
    task: Task = _LATER
    tokenizer: PreTrainedTokenizerBase = _LATER
    """None for a task that needs none."""
    base: Base = _LATER
    model: PreTrainedModel = _LATER
    accelerator: Accelerator = _LATER
    optimizer: Optimizer = _LATER
    scheduler: LRScheduler = _LATER
    examples: Examples = _LATER
    eval_examples: Examples | None = None
    groups: list[ParameterGroup] = field(default_factory=list)
    seed: int = 0
    steps: int | None = None
    step: int = 0
    epoch: int = 0
    task_weight: float = 1.0
    """Factor of the task's own loss term; a strategy that shares the loss with it lowers it in `prepare_model`."""
    planning: bool = False
    packed: bool = True
    micro_tokens: int = 0
    """At most so many tokens at once in training: the recipe's, until memory runs out."""
    eval_tokens: int = 0
    """The same in evaluation."""
    best_metric: BestMetric | None = None
    """What decides which evaluation is the best: the task's choice, unless a strategy sets another in `prepare_model`.
    """
    average: Average | None = None
    """What `average_with` asked for."""
    adapter_final: bool = True
    """A strategy sets False while its adapter is not yet what it will be; until then no evaluation can be the best."""
    process_index: int = 0
    processes: int = 1
    counts: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    """Metrics of the evaluation before the first step."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Latest value of every logged number."""
    logged: dict[str, Any] = field(default_factory=dict)
    """What `log` was given in the current optimizer step."""
    say: Callable[[str], None] = print
    """Show one line to the user."""
    start: list[Tensor] = field(default_factory=list)
    """Trainable parameters as they were before the first step, in the order of `trainable`."""
    sampler: Sampler | None = None
    """What `generate` asks; core sets it once the model is prepared, never in planning."""
    _generators: dict[str, tuple[int, Generator]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        train = getattr(self.recipe, "train", None)
        if train is not None:
            self.micro_tokens = self.micro_tokens or train.micro_tokens
            self.eval_tokens = self.eval_tokens or train.micro_tokens
        if self.task is not None and self.best_metric is None:
            self.best_metric = BestMetric(self.task.best_metric, not self.task.lower_is_better, str(self.task))

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Every parameter that trains, in the order of its group."""
        return [p for group in self.groups for p in group.parameters.values()]

    def generator(self, strategy: Strategy) -> Generator:
        """The strategy's stream of this optimizer step, the same on every process; goes on until the step ends."""
        step, generator = self._generators.get(strategy.name, (-1, None))
        if generator is None or step != self.step:
            generator = Generator(self.seed, strategy.name, self.step)
            self._generators[strategy.name] = (self.step, generator)
        return generator

    def begin_step_again(self) -> None:
        """Forget the optimizer step under way: gradients, what was logged, what the strategies' streams have drawn."""
        for parameter in self.trainable:
            parameter.grad = None
        self.logged.clear()
        self._generators.clear()

    def generate(
        self, prompts: Prompts, *, adapter: bool = True, max_new_tokens: int = 64, temperature: float = 1.0,
        top_p: float = 1.0, stop: Sequence[str] = (), samples: int = 1,
    ) -> list[list[Sample]]:  # fmt: skip
        """Continue prompts with the model as it is now, in evaluation mode.

        Between steps the weights that train compute; inside `evaluate` their average does, if the run has one. Random
        numbers are keyed by seed, optimizer step, prompt and sample, and batches depend on the prompts and their order
        alone: the same call in the same step gives the same samples.

        Args:
            prompts: examples, of which `task.probe` gives the prompt; texts; or token ids. Random numbers know an
                example by its key, another prompt by its tokens and its index.
            adapter: False: the run's adapter is off, the base answers.
            max_new_tokens: of each sample.
            temperature: 0: greedy, the most likely token.
            top_p: sample among the most likely tokens that hold this share of the probability.
            stop: strings that end a sample's text, and are cut from it.
            samples: of each prompt.

        Returns:
            The samples of each prompt, in the order of `prompts`.

        Raises:
            InputError: the task generates no text; an empty prompt, or one that fills the model's context; an option
                out of range; with `adapter=False`, no strategy owns an adapter.
            RuntimeError: the model is not prepared yet, or the run is a plan.
        """
        if self.sampler is None:
            raise RuntimeError("run.generate: a plan never samples, and a run not before its model is prepared")
        return self.sampler(
            self, prompts, adapter=adapter, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
            stop=stop, samples=samples,
        )  # fmt: skip

    def log(self, name: str, value: float | Tensor) -> None:
        """Log a number with the optimizer step under way; a tensor is read off the device when the step ends.

        Raises:
            PluginError: a number of core or of another plugin has that name.
            ValueError: it is not one number.
        """
        if not (value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)):
            raise ValueError(f"run.log: '{name}' must be one number")
        if self.hooks is not None:
            self.hooks.claim(name)
        self.logged[name] = value

    def average_with(self, update: Update, start: int = 1, every: int = 1) -> None:
        """Average what trains over the steps of the run; call it in `prepare_model`, and own the slot "average".

        Core keeps a shadow of each parameter, in checkpoints too, and slices it in `replace_parameter`. From step
        `start` on, the averaged parameters are what is evaluated, kept as the best, exported and reported; training
        goes on with the parameters themselves.

        Args:
            update: `update(shadow, parameter, updates)` moves a shadow in place; see `budwood.contract.average.Update`.
            start: the first step that is averaged, from 1.
            every: of the steps from there on, each `every`-th is averaged.

        Raises:
            ValueError: `start` or `every` is below 1, the run has an average already, or its parameters are chosen.
        """
        if start < 1 or every < 1:
            raise ValueError(f"average_with: start {start} and every {every} count steps, from 1")
        if self.average is not None:
            raise ValueError('average_with: the run has an average already; declare slots = ("average",)')
        if self.groups:
            raise ValueError("average_with: call it in prepare_model")
        self.average = Average(update, start, every)

    def replace_parameter(self, old: nn.Parameter, new: nn.Parameter, index: Any) -> None:
        """Put `new` in the place of `old` in the groups and the optimizer; the caller puts it into its module.

        Args:
            old: a trainable parameter.
            new: its successor, of the shape of `old[index]`.
            index: what is kept of `old`, of each optimizer state of its shape, and of its average.

        Raises:
            ValueError: `old` does not train, or `new` has not the shape of `old[index]`.
        """
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
            raise ValueError("replace_parameter: the parameter does not train")
        if self.start:
            place = next(i for i, parameter in enumerate(self.trainable) if parameter is new)
            self.start[place] = self.start[place][index].clone()
        if self.average is not None:
            self.average.replace(old, new, index)
        if self.optimizer is None:
            return
        for torch_group in self.optimizer.param_groups:
            torch_group["params"] = [new if p is old else p for p in torch_group["params"]]
        state = self.optimizer.state.pop(old, None)
        if state is not None:
            self.optimizer.state[new] = {
                k: v[index].clone() if isinstance(v, Tensor) and v.shape == old.shape else v for k, v in state.items()
            }

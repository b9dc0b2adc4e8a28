"""One example of each hook, as shown in docs/hooks.md. The tests run all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from budwood import (
    RUN_ADAPTER,
    Batch,
    Column,
    Event,
    Example,
    InputError,
    LiveAdapter,
    LiveUpdate,
    LossTerm,
    Options,
    Outputs,
    ParameterGroup,
    Plan,
    Run,
    Sample,
    Step,
    Strategy,
    hookimpl,
    linear_shape,
    load_base,
    match_targets,
)


class LongEnough(Strategy):
    """Refuses a run that is too short."""

    class Options(Options):
        steps: int = Field(10, ge=1, description="minimum number of optimizer steps")

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        if plan.steps is not None and plan.steps < self.options.steps:
            plan.problem(self, f"{plan.steps} steps are too few: raise train.epochs, or lower long-enough.steps.")


class OnlyShort(Strategy):
    """Trains only on short examples."""

    class Options(Options):
        tokens: int = Field(256, ge=1, description="maximum length of an example")

    @hookimpl
    def prepare_examples(self, run: Run, examples: Sequence[Example]) -> Sequence[Example]:
        kept = [example for example in examples if run.task.length(example) <= self.options.tokens]
        run.say(f"only-short: kept {len(kept)} of {len(examples)} examples")
        return kept


class RoundedBase(Strategy):
    """Loads the base with each row of every linear rounded to 15 levels, to simulate quantisation."""

    @hookimpl
    def load_base(self, run: Run) -> Any:
        recipe, task = run.recipe.base, run.task
        kwargs = task.model_kwargs(run.examples.labels)
        base = load_base(recipe.model, "none", task.auto_class, run.dtype, run.device, model_kwargs=kwargs)
        for module in base.model.modules():
            if isinstance(module, nn.Linear):
                scale = module.weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
                module.weight.copy_((module.weight / scale).round() * scale)
        return base


class Scaled(nn.Module):
    """A linear whose output is multiplied by 1 + s; `scales` holds s per adapter, `active` the adapters in use."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.scales = nn.ParameterDict()
        self.active: list[str | None] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if not self.active:
            return y
        rows = [torch.zeros_like(y[0, 0]) if name is None else self.scales[name] for name in self.active]
        return y * (1 + torch.stack(rows)[:, None]).to(y.dtype)  # one for all rows, or one per row


def scaled_linears(model: nn.Module) -> dict[str, Scaled]:
    """Return the scaled linears of a model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Scaled)}


def add_scale(model: nn.Module, path: str, name: str, scale: Tensor) -> None:
    """Add one adapter's vector to one linear."""
    module: Any = model.get_submodule(path)
    if not isinstance(module, Scaled):
        module = Scaled(module)
        model.set_submodule(path, module)
    module.scales[name] = nn.Parameter(scale.float().to(module.linear.weight.device))


class OutputScale(Strategy):
    """An adapter that scales the output of each linear by a vector (Liu et al., 2022, here on attention)."""

    api = 2
    slots = ("adapter",)
    adapter_types = ("OUTPUT_SCALE",)

    class Options(Options):
        targets: list[str] = Field(["k_proj", "v_proj"], description="names of linears")

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        for path in match_targets(model, self.options.targets, layers=None):
            linear: Any = model.get_submodule(path)
            add_scale(model, path, RUN_ADAPTER, torch.zeros(linear.out_features))  # no effect at the start
        self.use_adapters(model, [RUN_ADAPTER], index=[])
        return model

    @hookimpl
    def trainable_parameters(self, run: Run, model: nn.Module) -> list[ParameterGroup]:
        parameters = {path: module.scales[RUN_ADAPTER] for path, module in scaled_linears(model).items()}
        return [ParameterGroup("scales", parameters, learning_rate_ratio=10.0)]

    @hookimpl
    def export(self, run: Run, model: nn.Module, directory: Path) -> None:
        tensors = {path: module.scales[RUN_ADAPTER].detach().cpu() for path, module in scaled_linears(model).items()}
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "OUTPUT_SCALE", "modules": [*tensors]}))

    @hookimpl
    def attach_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
        linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | Scaled)}
        for path, scale in tensors.items():
            module: Any = linears.get(path)
            linear = module.linear if isinstance(module, Scaled) else module
            if linear is None or scale.shape != (linear.out_features,):
                raise InputError(f"the adapter's '{path}' does not fit a linear of this model.")
        for path, scale in tensors.items():
            add_scale(model, path, name, scale)

    @hookimpl
    def use_adapters(self, model: nn.Module, names: Sequence[str], index: Sequence[int]) -> None:
        rows = [names[i] if i >= 0 else None for i in index] if index else names
        for module in scaled_linears(model).values():
            module.active = [name if name in module.scales else None for name in rows]

    @hookimpl
    def detach_adapter(self, model: nn.Module, name: str) -> None:
        for path, module in scaled_linears(model).items():
            if name in module.scales:
                del module.scales[name]
            if not module.scales:
                model.set_submodule(path, module.linear)

    @hookimpl
    def live_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> LiveAdapter:
        def update(factor: Tensor) -> LiveUpdate:
            def row_forward(x: Tensor, y: Tensor, rows: Tensor) -> None:
                y[rows] *= factor.to(y.dtype)

            return LiveUpdate(row_forward=row_forward)

        for path, scale in tensors.items():
            if path not in dict(model.named_modules()) or scale.shape != linear_shape(model.get_submodule(path))[:1]:
                raise InputError(f"the adapter's '{path}' does not fit a linear of this model.")
        return LiveAdapter({path: update(1 + scale) for path, scale in tensors.items()})

    @hookimpl
    def convert_adapter(
        self, config: dict[str, Any], tensors: dict[str, Tensor], adapter_type: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        if adapter_type != "ia3":  # PEFT's equivalent, whose vector is the complete factor
            return None
        values = {"peft_type": "IA3", "target_modules": config["modules"], "feedforward_modules": []}
        return values, {f"base_model.model.{path}.ia3_l": 1 + scale[:, None] for path, scale in tensors.items()}

    @hookimpl
    def combine_adapters(
        self, adapters: Sequence[Any], weights: Sequence[float]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors: dict[str, Tensor] = {}
        for adapter, weight in zip(adapters, weights, strict=True):
            for path, scale in adapter.load_tensors().items():  # changes of a factor, so that they add up
                if path in tensors and tensors[path].shape != scale.shape:
                    raise InputError(f"{adapter.directory}: its '{path}' has another size than that of the others.")
                tensors[path] = tensors.get(path, 0) + weight * scale
        return {"peft_type": "OUTPUT_SCALE", "modules": [*tensors]}, tensors

    @hookimpl
    @torch.no_grad()
    def merge_adapter(self, model: nn.Module, name: str) -> None:
        for module in scaled_linears(model).values():
            if name in module.scales:
                module.linear.weight.mul_(1 + module.scales[name][:, None])
                if module.linear.bias is not None:
                    module.linear.bias.mul_(1 + module.scales[name])
        self.detach_adapter(model, name)


class Momentum(Strategy):
    """SGD with momentum in place of AdamW, with an exponentially decaying learning rate."""

    slots = ("optimizer",)

    class Options(Options):
        momentum: float = Field(0.9, ge=0, lt=1, description="momentum factor")
        decay: float = Field(0.99, gt=0, le=1, description="factor applied to the learning rate after each step")

    @hookimpl
    def build_optimizer(self, run: Run, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, momentum=self.options.momentum)

    @hookimpl
    def build_scheduler(self, run: Run, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, self.options.decay)


class BalancedExamples(Strategy):
    """A second cross-entropy that gives every example equal weight, however long its answer is."""

    class Options(Options):
        weight: float = Field(0.5, gt=0, description="weight of the term in the loss")

    @hookimpl
    def prepare_batch(self, run: Run, batch: Batch) -> Batch:
        labels = torch.bincount(batch.example_of_label, minlength=len(batch.keys))
        batch.columns["share"] = 1.0 / labels[batch.example_of_label]
        return batch

    @hookimpl
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> LossTerm:
        loss = F.cross_entropy(logits.float(), step.batch.labels[positions], reduction="none")
        return LossTerm("balanced", loss * step.batch.columns["share"][positions], weight=self.options.weight)


class Perturbed(Strategy):
    """A second pass with adversarial noise of a fixed norm at each token (after Miyato et al., 2017)."""

    class Options(Options):
        epsilon: float = Field(0.1, gt=0, description="norm of the noise at each token")

    @hookimpl(wrapper=True)
    def backward(self, step: Step) -> Iterator[None]:
        step.track_noise = True
        yield  # core's own pass
        gradient = step.noise_grad
        noise = self.options.epsilon * gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        step.replay(noise, weight=1.0)


class HiddenNoise(Strategy):
    """Gaussian noise on the decoder's output, independent of how a batch is split."""

    class Options(Options):
        deviation: float = Field(0.01, gt=0, description="standard deviation of the noise")

    @hookimpl(wrapper=True)
    def forward(self, step: Step) -> Any:
        outputs = yield
        hidden = outputs.hidden.flatten(0, 1)
        noise = torch.zeros_like(hidden)
        for index in range(len(step.batch.keys)):
            rows = step.batch.example_of_position == index
            noise[rows] = step.generator(self, index).normal_like(noise[rows])
        noisy = hidden + self.options.deviation * noise
        return Outputs(noisy.view_as(outputs.hidden), outputs.head)


class SmallHidden(Strategy):
    """Penalises the mean square of the decoder's output over the tokens of each example."""

    @hookimpl
    def loss_terms(self, step: Step, outputs: Outputs) -> LossTerm:
        squares = outputs.hidden.flatten(0, 1).float().square().mean(-1)
        lengths = torch.tensor(step.batch.lengths, device=squares.device)
        real = step.batch.example_of_position >= 0
        sums = torch.zeros(len(lengths), device=squares.device)
        sums = sums.index_add(0, step.batch.example_of_position[real], squares[real])
        return LossTerm("small_hidden", sums / lengths, unit="example", weight=0.01)


class LongAnswers(Strategy):
    """Adds a loss term for long answers only: the mean negative log-likelihood of their labels."""

    api = 2

    class Options(Options):
        labels: int = Field(2, ge=1, description="answers with more labels than this are long")

    def long(self, batch: Batch) -> Tensor:
        """Return a mask [L] of the labels that belong to a long answer."""
        counts = torch.bincount(batch.example_of_label, minlength=len(batch.keys))
        return counts[batch.example_of_label] > self.options.labels

    @hookimpl
    def batch_counts(self, run: Run, batch: Batch) -> dict[str, float]:
        return {"long_label": float(self.long(batch).sum())}

    @hookimpl
    def sequence_terms(self, step: Step, log_probs: Tensor) -> LossTerm:
        values = torch.where(self.long(step.batch), -log_probs, 0.0)
        return LossTerm("long_answers", values, unit="long_label", weight=0.1)


class Repulsion(Strategy):
    """Pushes the examples of a step apart: the mean cosine similarity of their answers' hidden states."""

    api = 2

    @hookimpl
    def step_values(self, step: Step, outputs: Outputs, log_probs: Tensor | None) -> dict[str, Tensor]:
        rows = outputs.hidden.flatten(0, 1)[step.batch.label_positions]
        zeros = rows.new_zeros(len(step.batch.keys), rows.shape[-1])
        return {"answers": zeros.index_add(0, step.batch.example_of_label, rows)}  # the mean has the same direction

    @hookimpl
    def step_terms(self, run: Run, values: dict[str, Tensor]) -> LossTerm:
        answers = F.normalize(values["answers"].float(), dim=-1)
        similarity = answers @ answers.t() - torch.eye(len(answers), device=answers.device)  # to the others
        return LossTerm("repulsion", similarity.mean(), unit="step", weight=0.1)


class Shorter(Strategy):
    """Samples answers and makes short ones more likely (REINFORCE; Williams, 1992): reward is the negative length."""

    api = 2
    requires = ("adapter",)

    class Options(Options):
        tokens: int = Field(8, ge=1, description="maximum length of a sampled answer")

    @hookimpl
    def planned_examples(self, run: Run) -> Sequence[Example]:
        longest = Sample([0] * 16, [0] * self.options.tokens, [0.0] * self.options.tokens, "", "length")
        return [self.example(0, 0, number, longest, 0.0) for number in range(4)]

    @hookimpl
    def next_examples(self, run: Run, indices: Sequence[int]) -> Sequence[Sequence[Example]]:
        prompts = [run.examples[index] for index in indices]
        answers = run.generate(prompts, samples=2, max_new_tokens=self.options.tokens)
        mean = np.mean([len(sample.tokens) for samples in answers for sample in samples])
        return [
            [
                self.example(prompt.key, prompt.row, number, sample, float(mean - len(sample.tokens)))
                for prompt, samples in zip(prompts, answers, strict=True)
                for number, sample in enumerate(samples)
            ]
        ]  # one optimizer step: `updates` is 1

    def example(self, key: Any, row: int, number: int, sample: Sample, advantage: float) -> Example:
        """Convert a sample into an example whose labels are the sampled tokens."""
        ids = np.array([*sample.prompt, *sample.tokens], dtype=np.int32)
        positions = np.arange(len(sample.prompt) - 1, len(ids) - 1)
        columns = {"advantage": Column(np.float32(advantage))}
        weights = np.ones(len(positions), dtype=np.float32)
        labels, key = ids[positions + 1], f"{key}/{number}"
        return Example({"input_ids": ids}, positions, labels, weights, key=key, row=row, columns=columns)

    @hookimpl
    def sequence_terms(self, step: Step, log_probs: Tensor) -> LossTerm:
        advantages = step.batch.columns["advantage"][step.batch.example_of_label]
        return LossTerm("shorter", -advantages * log_probs)


class GradientCentralization(Strategy):
    """Subtracts the mean from each gradient (after Yong et al., 2020)."""

    @hookimpl
    def before_clip(self, run: Run) -> None:
        for parameter in run.trainable:
            if parameter.grad is not None:
                parameter.grad -= parameter.grad.mean()


class GradientNoise(Strategy):
    """Annealed Gaussian noise on the gradients (Neelakantan et al., 2015, eq. 1)."""

    class Options(Options):
        eta: float = Field(0.01, gt=0, description="variance at step 0")

    @hookimpl
    def before_optimizer_step(self, run: Run) -> None:
        deviation = (self.options.eta / (1 + run.step) ** 0.55) ** 0.5
        for parameter in run.trainable:
            if parameter.grad is not None:
                parameter.grad.add_(run.generator(self).normal_like(parameter), alpha=deviation)


class Oscillation(Strategy):
    """Logs the distance of the parameters from their running average, to show whether a run oscillates."""

    class Options(Options):
        decay: float = Field(0.9, ge=0, lt=1, description="decay of the running average")

    def __init__(self, options: Any = None, name: str = "", distribution: str = "") -> None:
        super().__init__(options, name, distribution)
        self.average: list[Tensor] = []

    @hookimpl
    def after_optimizer_step(self, run: Run) -> None:
        current = [parameter.detach().clone() for parameter in run.trainable]
        self.average = [
            old.lerp(new, 1 - self.options.decay) for old, new in zip(self.average or current, current, strict=True)
        ]
        run.log("oscillation", self._distance(run))

    @hookimpl
    def evaluate(self, run: Run) -> dict[str, float]:
        return {"eval_oscillation": float(self._distance(run)) if self.average else 0.0}

    @hookimpl
    def state_dict(self, run: Run) -> dict[str, Any]:
        return {"version": 1, **{str(index): tensor for index, tensor in enumerate(self.average)}}

    @hookimpl
    def load_state_dict(self, run: Run, state: dict[str, Any]) -> None:
        if state["version"] != 1:
            raise InputError(f"{self}: the saved state has version {state['version']}; this one reads version 1.")
        self.average = [state[str(index)].to(run.device) for index in range(len(state) - 1)]

    def _distance(self, run: Run) -> Tensor:
        pairs = zip(run.trainable, self.average, strict=True)
        return torch.stack([(parameter.detach() - average).square().sum() for parameter, average in pairs]).sum().sqrt()


class EventLog(Strategy):
    """Writes one line per event to a file."""

    class Options(Options):
        file: str = Field("events.txt", description="path of the file")

    @hookimpl
    def on_event(self, event: Event) -> None:
        with open(self.options.file, "a", encoding="utf-8") as file:
            file.write(f"{event.kind} {event.step}: loss {event.values.get('loss', '–')}\n")

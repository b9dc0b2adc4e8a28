"""Small strategies that the tests install as a third-party distribution."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from budwood import BestMetric, LossTerm, Options, Run, Step, Strategy, hookimpl

SEEN: list[Any] = []


class Recorder(Strategy):
    """Records gradients before clipping, and calls of the optimizer hooks."""

    @hookimpl
    def before_clip(self, run: Run) -> None:
        SEEN.append(("gradients", [p.grad.clone() for p in run.trainable]))

    @hookimpl
    def before_optimizer_step(self, run: Run) -> None:
        SEEN.append(("before_optimizer_step", run.step))

    @hookimpl
    def after_optimizer_step(self, run: Run) -> None:
        SEEN.append(("after_optimizer_step", run.step))


class Poison(Strategy):
    """Makes the loss of one example infinite at one step."""

    class Options(Options):
        step: int = 2
        example: int = 3

    @hookimpl(wrapper=True)
    def forward(self, step: Step) -> Any:
        outputs = yield
        if step.run.step >= self.options.step and self.options.example in step.batch.keys:
            index = step.batch.keys.index(self.options.example)
            bad = (step.batch.example_of_position == index).view(outputs.hidden.shape[:2])
            outputs.hidden = torch.where(bad[..., None], torch.inf, outputs.hidden)
        return outputs


class Still(Strategy):
    """Sets all gradients to zero."""

    @hookimpl
    def before_optimizer_step(self, run: Run) -> None:
        for parameter in run.trainable:
            parameter.grad = torch.zeros_like(parameter)


class InterruptAt(Strategy):
    """Raises KeyboardInterrupt after a step."""

    class Options(Options):
        step: int = 3

    @hookimpl
    def after_optimizer_step(self, run: Run) -> None:
        if run.step + 1 == self.options.step:
            raise KeyboardInterrupt


class FastGradient(Strategy):
    """FGM (Miyato et al., 2017): a second pass on the embeddings plus epsilon times the normalised gradient."""

    class Options(Options):
        epsilon: float = 0.5

    @hookimpl(wrapper=True)
    def backward(self, step: Step) -> Any:
        step.track_noise = True
        yield
        gradient = step.noise_grad
        norms = torch.zeros(len(step.batch.keys), dtype=gradient.dtype)
        flat = gradient.flatten(0, 1)
        norms.index_add_(0, step.batch.example_of_position, flat.square().sum(-1))
        scale = self.options.epsilon / norms.sqrt().clamp(min=1e-12)
        noise = (flat * scale[step.batch.example_of_position][:, None]).view_as(gradient)
        SEEN.append(("noise", step.batch.keys, noise, step.noise_gradient(torch.zeros_like(noise)), gradient))
        step.replay(noise, 1.0)


class Penalty(Strategy):
    """Squared norm of the trainable parameters, a term of unit "step"."""

    @hookimpl
    def loss_terms(self, step: Step, outputs: Any) -> LossTerm:
        return LossTerm("penalty", sum(p.square().sum() for p in step.run.trainable), "step", 0.01)


class PerExample(Strategy):
    """Mean square of each example's hidden states, a term of unit "example"."""

    @hookimpl
    def loss_terms(self, step: Step, outputs: Any) -> LossTerm:
        squares = outputs.hidden.flatten(0, 1).float().square().mean(-1)
        owner = step.batch.example_of_position
        count = len(step.batch.keys)
        sums = torch.zeros(count).index_add(0, owner, squares)
        return LossTerm("size", sums / torch.bincount(owner, minlength=count), "example", 0.1)


class Counter(Strategy):
    """Keeps state in tensors and plain values, and uses the global random states."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps, self.sum = 0, torch.zeros(())

    @hookimpl
    def before_optimizer_step(self, run: Run) -> None:
        self.steps += 1
        noise = random.random() + np.random.rand() + random.gauss(0, 1) + float(torch.rand(()))
        for parameter in run.trainable:
            parameter.grad.add_(noise * 1e-3)
        self.sum = self.sum + noise

    @hookimpl
    def state_dict(self, run: Run) -> dict[str, Any]:
        return {"steps": self.steps, "sum": self.sum, "nested": ({1: float("inf"), "a/b": np.arange(3)},)}

    @hookimpl
    def load_state_dict(self, run: Run, state: dict[str, Any]) -> None:
        assert state["nested"][0][1] == float("inf") and state["nested"][0]["a/b"].tolist() == [0, 1, 2]
        self.steps, self.sum = state["steps"], state["sum"]


class Unsaveable(Strategy):
    """Returns a state that cannot be saved."""

    @hookimpl
    def state_dict(self, run: Run) -> dict[str, Any]:
        return {"inner": [{"a": object()}]}

    @hookimpl
    def load_state_dict(self, run: Run, state: dict[str, Any]) -> None: ...


class Reward(Strategy):
    """Returns an additional metric, best at step 2, and makes it the run's best metric."""

    class Options(Options):
        metric: str = "eval_reward"
        plain: bool = False

    @hookimpl
    def prepare_model(self, run: Run, model: Any) -> Any:
        run.best_metric = self.options.metric if self.options.plain else BestMetric(self.options.metric, higher=True)
        return model

    @hookimpl
    def evaluate(self, run: Run) -> dict[str, float]:
        return {"eval_reward": 3.0 if run.step == 2 else 2.0}

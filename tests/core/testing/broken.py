"""Strategies that each break exactly one promise."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field, field_serializer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from budwood import RUN_ADAPTER, Batch, LossTerm, Options, Outputs, Run, Step, Strategy, hookimpl
from budwood.lowrank import adapter_layers
from budwood_lora import LoRA


class Undocumented(Strategy):
    @hookimpl
    def before_clip(self, run: Run) -> None: ...


class MissingOwnerHooks(Strategy):
    """Declares the slot of the adapter, but only implements attach_adapter."""

    slots = ("adapter",)

    @hookimpl
    def attach_adapter(self, model: nn.Module) -> None: ...


class _Observes(Strategy):
    """Implements a hook without an effect."""

    @hookimpl
    def before_clip(self, run: Run) -> None: ...


class AcceptsAnything(_Observes):
    """Ignores unknown options."""

    class Options(Options):
        model_config = ConfigDict(extra="ignore")
        rate: float = 0.5


class RoundsInYAML(_Observes):
    """Changes the value of an option when it is written."""

    class Options(Options):
        rate: float = Field(0.123, gt=0)

        @field_serializer("rate")
        def _rounded(self, value: float) -> float:
            return round(value, 1)


class NotFrozen(_Observes):
    """Has mutable options."""

    class Options(Options):
        model_config = ConfigDict(frozen=False)
        rate: float = 0.5


class NonZeroStart(LoRA):
    """LoRA whose B does not start at zero."""

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        model = super().prepare_model(run, model)
        with torch.no_grad():
            for _, layer in adapter_layers(model, RUN_ADAPTER):
                layer.lora_B[RUN_ADAPTER].weight.fill_(0.01)
        return model


class Unfreezes(Strategy):
    """Enables a gradient on the base's head."""

    @hookimpl
    def prepare_batch(self, run: Run, batch: Batch) -> Batch:
        run.model.get_output_embeddings().weight.requires_grad_(True)
        return batch


class DeclaresUnused(LoRA):
    """LoRA that declares a parameter that the model does not use."""

    @hookimpl
    def trainable_parameters(self, run: Run, model: nn.Module) -> Any:
        groups = super().trainable_parameters(run, model)
        groups[0].parameters["idle"] = nn.Parameter(torch.ones(3))
        return groups


class ChangesTheBase(Strategy):
    """Changes a row of the base's embeddings that no example uses."""

    @hookimpl
    def after_optimizer_step(self, run: Run) -> None:
        with torch.no_grad():
            run.model.get_input_embeddings().weight[3] *= 1.01


class Unseeded(Strategy):
    """Adds noise that does not depend on the seed."""

    @hookimpl
    def after_optimizer_step(self, run: Run) -> None:
        draw = torch.Generator().manual_seed(int.from_bytes(os.urandom(6), "little"))
        with torch.no_grad():
            for parameter in run.trainable:
                parameter += 1e-7 * torch.randn(parameter.shape, generator=draw)


def _size(step: Step, outputs: Outputs) -> Tensor:
    """Return the mean square of the first hidden element of each example, [examples]."""
    squares = outputs.hidden.flatten(0, 1)[:, 0].float().square()
    sums = squares.new_zeros(len(step.batch.keys)).index_add(0, step.batch.example_of_position, squares)
    return sums / torch.tensor(step.batch.lengths)


class FirstMicroBatchAlone(Strategy):
    """Adds its term only to the first micro-batch of a step."""

    @hookimpl
    def loss_terms(self, step: Step, outputs: Outputs) -> LossTerm | None:
        return None if step.micro_step else LossTerm("size", _size(step, outputs), "example", 0.1)


class FirstProcessAlone(Strategy):
    """Adds its term only in the first process."""

    @hookimpl
    def loss_terms(self, step: Step, outputs: Outputs) -> LossTerm | None:
        return None if step.run.process_index else LossTerm("size", _size(step, outputs), "example", 0.1)


class Forgets(Strategy):
    """Counts steps, but restarts from zero when a run is resumed."""

    steps = 0

    @hookimpl
    def before_clip(self, run: Run) -> None:
        self.steps += 1
        for parameter in run.trainable:
            parameter.grad /= self.steps


class SavesHalf(LoRA):
    """LoRA that saves half of its update."""

    @hookimpl
    def export(self, run: Run, model: nn.Module, directory: Path) -> None:
        super().export(run, model, directory)
        file = directory / "adapter_model.safetensors"
        tensors = {key: tensor / 2 if "lora_B" in key else tensor for key, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


class MergesHalf(LoRA):
    """LoRA that merges half of its update."""

    @hookimpl
    def merge_adapter(self, model: nn.Module, name: str) -> None:
        with torch.no_grad():
            for _, layer in adapter_layers(model, name):
                layer.lora_B[name].weight /= 2
        super().merge_adapter(model, name)


class StaysOn(LoRA):
    """LoRA that cannot be disabled."""

    @hookimpl
    def use_adapters(self, model: nn.Module, names: Sequence[str], index: Sequence[int]) -> None:
        if names:
            super().use_adapters(model, names, index)


class LeavesAHook(LoRA):
    """LoRA that leaves a hook on the model when it is detached."""

    @hookimpl
    def detach_adapter(self, model: nn.Module, name: str) -> None:
        super().detach_adapter(model, name)
        model.get_input_embeddings().register_forward_hook(lambda *_: None)


class NeedsFloats(Strategy):
    """Works only on unquantised weights, without declaring it."""

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        assert all(parameter.is_floating_point() for parameter in model.parameters()), "weights must be floating"
        return model


class ReadsAValue(Strategy):
    """Branches on a value that a plan does not have."""

    @hookimpl
    def before_clip(self, run: Run) -> None:
        if any(float(parameter.grad.abs().max()) > 1e9 for parameter in run.trainable):
            run.say("large")


class ForgetsItsHook(Strategy):
    """Registers a hook on the model for a forward pass, and removes it only on success."""

    @hookimpl(wrapper=True)
    def forward(self, step: Step) -> Any:
        handle = step.run.model.get_input_embeddings().register_forward_hook(lambda *_: None)
        outputs = yield
        handle.remove()
        return outputs


class Swallows(Strategy):
    """Swallows every exception."""

    @hookimpl(wrapper=True)
    def backward(self, step: Step) -> Any:
        try:
            return (yield)
        except Exception:
            return None


class FailsInReplay(Strategy):
    """Fails if another strategy replays a pass."""

    @hookimpl
    def loss_terms(self, step: Step, outputs: Outputs) -> None:
        if step.replaying:
            raise RuntimeError("a replayed pass")

"""Every hook that a strategy can take part in, in the order in which a run calls them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from budwood.contract.types import Batch, Event, Example, LossTerm, Outputs, ParameterGroup, Plan, Run, Step

hookspec = pluggy.HookspecMarker("budwood")


class HookSpecs:
    """The contract. "One owner": at most one strategy implements it. "Chain": each receives what the last returned,
    in the solved order. "Collect": every result is used. "Wrappable": `@hookimpl(wrapper=True)` may surround it."""

    @hookspec
    def check_plan(self, plan: Plan) -> None:
        """Collect. Call `plan.problem(self, text)` for what cannot work. `plan.steps` may be None before the data."""

    @hookspec(firstresult=True)
    def load_base(self, run: Run) -> Any:
        """One owner. Return a `Base` in place of the one that the recipe's quantiser loads."""

    @hookspec
    def prepare_examples(self, run: Run, examples: Sequence[Example]) -> Sequence[Example]:
        """Chain, before packing. Return the examples to train on; `example.columns` may carry more arrays."""

    @hookspec
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Chain. Change the loaded model, for instance put an adapter on it, and return it."""

    @hookspec
    def trainable_parameters(self, run: Run, model: nn.Module) -> list[ParameterGroup]:
        """Collect. Return named groups of what trains; a parameter that stands in two groups is an error."""

    @hookspec(firstresult=True)
    def build_optimizer(self, run: Run, groups: list[dict[str, Any]]) -> Optimizer:
        """One owner. Build the optimizer from torch parameter groups ("params", "lr", "weight_decay", "name")."""

    @hookspec(firstresult=True)
    def build_scheduler(self, run: Run, optimizer: Optimizer) -> LRScheduler:
        """One owner. Build the learning-rate scheduler; it is stepped once an optimizer step."""

    @hookspec
    def prepare_batch(self, run: Run, batch: Batch) -> Batch:
        """Chain. Change a packed batch on its device, or add to `batch.columns`, before its step."""

    @hookspec(firstresult=True)
    def forward(self, step: Step) -> Outputs:
        """One implementation (the task's), wrappable. Run the model up to its head; adds `step.noise` to embeddings."""

    @hookspec
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> list[LossTerm] | LossTerm | None:
        """Collect. Loss terms of unit "label" for one chunk of the head's output.

        `logits` [n, vocabulary or classes] belong to the labels `positions` [n] int64, which index `batch.labels`,
        `batch.label_positions` and `batch.example_of_label`. Values are [n], in the order of `positions`.
        """

    @hookspec
    def loss_terms(self, step: Step, outputs: Outputs) -> list[LossTerm] | LossTerm | None:
        """Collect. Loss terms that need no head: unit "example" (values [examples]) or "step" (a scalar)."""

    @hookspec(firstresult=True)
    def backward(self, step: Step) -> None:
        """One implementation (core's), wrappable. Forward, loss terms and backward of a micro-step."""

    @hookspec
    def before_clip(self, run: Run) -> None:
        """Collect. Gradients are whole (all micro-steps and processes), unscaled and not yet clipped."""

    @hookspec
    def before_optimizer_step(self, run: Run) -> None:
        """Collect. Gradients are clipped; the optimizer has not moved."""

    @hookspec
    def after_optimizer_step(self, run: Run) -> None:
        """Collect. The optimizer has moved; gradients are still there, and are zeroed afterwards."""

    @hookspec
    def evaluate(self, run: Run) -> dict[str, float]:
        """Collect, wrappable. Return named metrics of the model on `run.eval_examples`."""

    @hookspec
    def state_dict(self, run: Run) -> dict[str, Any]:
        """Collect. Return tensors and JSON values that a resume needs."""

    @hookspec
    def load_state_dict(self, run: Run, state: dict[str, Any]) -> None:
        """Receive what `state_dict` of the same strategy returned, before shapes and optimizer are restored."""

    @hookspec
    def export(self, run: Run, model: nn.Module, directory: Path) -> None:
        """Collect, wrappable. Write what the run made into `directory`, a temporary folder renamed when complete."""

    @hookspec
    def on_event(self, event: Event) -> None:
        """Observe. One that fails is named and set aside; the run goes on."""

    @hookspec
    def attach_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
        """Owner of the adapter's kind. Put a saved adapter on a live model, not in use; every tensor is consumed."""

    @hookspec
    def use_adapters(self, model: nn.Module, names: Sequence[str | None]) -> None:
        """Owner. [] : none; one name: for every row; else one name or None for each row of the next batches."""

    @hookspec
    def detach_adapter(self, model: nn.Module, name: str) -> None:
        """Owner. Take an adapter off; without any left the model's modules are those of the base."""

    @hookspec(firstresult=True)
    def convert_adapter(
        self, config: dict[str, Any], tensors: dict[str, Tensor], kind: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Owner, optional. A saved adapter as one of another `kind` that computes the same; None where it cannot be.

        Both are adapter_config.json and the tensors of PEFT's file.
        """

    @hookspec
    def merge_adapter(self, model: nn.Module, name: str) -> None:
        """Owner. Add an attached adapter into the (unquantised) weights and take it off."""

"""Hooks that a strategy can implement, in the order in which a run calls them.

docs/hooks.md is generated from these declarations: how each hook is called, when, what it may change, what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from budwood.adapters.live_update import LiveAdapter
    from budwood.adapters.store import SavedAdapter
    from budwood.contract.examples import Batch, Example
    from budwood.contract.types import Event, LossTerm, Outputs, ParameterGroup, Plan, Run, Step
    from budwood.model.base import Base

CALL_STYLES = {
    "collect": "every strategy, in the resolved order; all results are used",
    "chain": "every strategy, in the resolved order; each receives what the previous one returned",
    "exclusive": "at most one strategy; it replaces core's implementation",
    "core": "implemented by core or the task; strategies may only wrap it",
    "per strategy": "every strategy, with its own state only",
    "observe": "every strategy; one that raises is reported and disabled, and the run continues",
    "adapter owner": "the one strategy that owns the adapter type; the pool calls it outside of runs too",
}
"""How a hook is called."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _hook(call_style: str, *, wrappable: bool = False, first: bool = False) -> Callable[[_Function], _Function]:
    """Declare a hook. `wrappable`: strategies may wrap it; `first`: the first result that is not None ends the call."""
    assert call_style in CALL_STYLES

    def declare(function: _Function) -> _Function:
        function.call_style, function.wrappable = call_style, wrappable  # type: ignore[attr-defined]
        return pluggy.HookspecMarker("budwood")(function, firstresult=first)

    return declare


class HookSpecs:
    """The contract. Arguments are passed by name; an implementation may leave out those it does not need.

    An implementation marked `@hookimpl(wrapper=True)` wraps the complete call of a wrappable hook: it yields exactly
    once and returns the result.
    """

    @_hook("collect")
    def check_plan(self, plan: Plan) -> None:
        """Check the plan and report each problem with `plan.problem(self, text)`; all of them are shown together.

        When: before the data is read, and again before the base is loaded; also in `budwood plan`. `plan.steps` is None
            in the first call if the recipe counts epochs.
        May change: nothing.
        """

    @_hook("chain")
    def prepare_examples(self, run: Run, examples: Sequence[Example]) -> Sequence[Example]:
        """Filter, modify or create training examples.

        When: once, after the data is read, before it is packed and before the base is loaded.
        May change: the examples and their order; `example.columns` may hold additional values, each a `Column` with its
            axis. Evaluation examples are not passed to this hook.
        Returns: the training examples; the examples of a group are adjacent.
        """

    @_hook("collect")
    def planned_examples(self, run: Run) -> Sequence[Example]:
        """Return placeholder examples of the sizes that `next_examples` will produce, since planning never samples.

        When: only in planning, instead of `next_examples`.
        May change: nothing.
        Returns: the examples of one optimizer step at the largest expected sizes; their values are ignored.
        """

    @_hook("exclusive", first=True)
    def load_base(self, run: Run) -> Base:
        """Load the base, replacing the recipe's quantiser.

        When: once, after the plan has been checked with the final number of steps.
        May change: nothing but the returned base.
        Returns: a `Base`.
        """

    @_hook("chain")
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Modify the loaded model, for example attach an adapter.

        When: once, after the base is loaded and frozen; `run.examples` and `run.steps` are set.
        May change: the model's modules, but not the bytes of the base's weights; `run.task_weight`, to share the loss
            with the task; `run.best_metric`, to select the best adapter by another metric than the task's. To average
            the trainable parameters, call `run.average_with` here.
        Returns: the model.
        """

    @_hook("collect")
    def trainable_parameters(self, run: Run, model: nn.Module) -> list[ParameterGroup]:
        """Return the parameters to train. Parameters that no strategy returns are frozen.

        When: once, after every `prepare_model`.
        May change: nothing.
        Returns: groups of fp32 parameters; names of groups and parameters are unique, and no parameter appears twice.
        """

    @_hook("exclusive", first=True)
    def build_optimizer(self, run: Run, groups: list[dict[str, Any]]) -> Optimizer:
        """Build the optimizer, replacing AdamW.

        When: once, after `trainable_parameters`; `groups` are torch parameter groups with the keys "params", "lr",
            "weight_decay" and "name".
        May change: the groups' values, such as a learning rate.
        Returns: a torch optimizer over all groups. If its state of a parameter is not made of tensors of the
            parameter's shape, it has a method `sliced_state(old, index)`, which returns the state of the part
            `old[index]`; `run.replace_parameter` calls it.

        A strategy whose optimizer keeps its states in less memory than AdamW says so by `provides =
        ("compact-optimizer",)`; `budwood plan --fit` may then suggest it.
        """

    @_hook("exclusive", first=True)
    def build_scheduler(self, run: Run, optimizer: Optimizer) -> LRScheduler:
        """Build the learning-rate scheduler, replacing the recipe's `train.schedule`.

        When: once, after `build_optimizer`; `run.steps` is set.
        May change: nothing but the returned scheduler.
        Returns: a torch scheduler; core steps it once per optimizer step that is not skipped.
        """

    @_hook("exclusive", first=True)
    def next_examples(self, run: Run, indices: Sequence[int]) -> Sequence[Sequence[Example]]:
        """Generate the examples of the next optimizer steps with the current model: on-policy data.

        When: whenever the previous set is used up; on the main thread, between optimizer steps, without gradients.
            `indices` select this process's prompts from `run.examples` and may be empty; results are gathered from all
            processes. `run.generate` samples from the live model.
        May change: nothing in the run. Core keeps the set until it is used up and saves it in checkpoints. Logged
            values count for the first step of the set; `run.generator` is restarted for that step.
        Returns: one sequence of examples per optimizer step that uses the set, `updates` in total (a class attribute
            of the strategy). Keys are unique within a step across all processes; columns carry per-sample values such
            as advantages and log-probabilities.
        """

    @_hook("collect")
    def batch_counts(self, run: Run, batch: Batch) -> dict[str, float]:
        """Count custom units; core divides loss terms of such a unit by its total in the optimizer step.

        When: for every micro-batch of an optimizer step, before the first one is run; the batch is on the host.
        May change: nothing.
        Returns: the micro-batch's count by unit name. Core sums the counts over micro-batches and processes.
        """

    @_hook("chain")
    def prepare_batch(self, run: Run, batch: Batch) -> Batch:
        """Modify a micro-batch or add columns to it.

        When: before each micro-step, once the batch is on the device. Not in evaluations.
        May change: the batch, but not what is counted (labels, their weights, examples, groups), because the optimizer
            step's counts are already fixed; `batch.columns` may hold additional tensors.
        Returns: the batch.
        """

    @_hook("core", wrappable=True, first=True)
    def backward(self, step: Step) -> None:
        """Run the forward pass, the loss terms and the backward pass of a micro-step.

        When: once per micro-step. A wrapper may run further passes before or after its yield: `step.replay`,
            `step.noise_gradient`. If memory runs out, the optimizer step restarts from micro-step 0 with smaller
            micro-batches: reset any sum over the optimizer step at `step.micro_step == 0`.
        May change: before the yield `step.noise`, `step.main_weight` and `step.track_noise`; after it the gradients,
            which accumulate over micro-steps.
        """

    @_hook("core", wrappable=True, first=True)
    def forward(self, step: Step) -> Outputs:
        """Run the model up to its head, with `step.noise` added to the embeddings' output. Implemented by the task.

        When: in each pass of a micro-step, inside `backward`. Not in evaluation or generation.
        May change: the outputs; a wrapper may call `step.forward(noise)` for outputs to compare with.
        Returns: hidden states [R, T, d], and the head that maps rows of them to logits.
        """

    @_hook("collect")
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> list[LossTerm] | LossTerm | None:
        """Add loss terms that need logits, one value per label; all such terms share one chunked pass over the head.

        When: for each chunk of labels in each pass, after `forward`. `logits` [n, vocabulary or classes] are those of
            the labels `positions` [n] int64, which index `batch.labels`, `batch.label_positions` and
            `batch.example_of_label`.
        May change: nothing.
        Returns: terms of unit "label", values [n] in the order of `positions`, or of a unit of `batch_counts`; or None.
        """

    @_hook("collect")
    def sequence_terms(self, step: Step, log_probs: Tensor) -> list[LossTerm] | LossTerm | None:
        """Add loss terms that are functions of the labels' log-probabilities: preference losses, clipped ratios.

        When: once per pass, after its `token_terms`. `log_probs` [L] has a graph; `batch.example_of_label` and
            `batch.groups` map labels to examples and groups. The task must provide log-probabilities.
        May change: nothing.
        Returns: terms of unit "label" (values [L]), "example", "group", or a unit of `batch_counts`; or None.
        """

    @_hook("collect")
    def loss_terms(self, step: Step, outputs: Outputs) -> list[LossTerm] | LossTerm | None:
        """Add loss terms that do not need the head.

        When: once per pass, after its `token_terms`. Leave `outputs` out if you do not read them: where nothing does
            but the head, the last layer computes label positions alone.
        May change: nothing.
        Returns: terms of unit "example" (values [examples]), "group" (values [groups]), "step" (a scalar, added once
            per optimizer step and never replayed), or a unit of `batch_counts`; or None.
        """

    @_hook("per strategy")
    def step_values(self, step: Step, outputs: Outputs, log_probs: Tensor | None) -> dict[str, Tensor] | None:
        """Return what the same strategy's `step_terms` needs from a micro-batch: embeddings, scores.

        When: once per pass. `outputs.hidden` and `log_probs` [L] (None if the task has none) have a graph. If a step
            has several micro-batches or processes, also once per micro-batch before micro-step 0, without a graph.
        May change: nothing.
        Returns: tensors by name; core concatenates them along their first dimension over the optimizer step.
        """

    @_hook("per strategy")
    def step_terms(self, run: Run, values: dict[str, Tensor]) -> list[LossTerm] | LossTerm | None:
        """Add a loss across all examples of the optimizer step: in-batch negatives, a baseline over the batch.

        When: once per optimizer step. `values` are those of `step_values` over all micro-batches and processes. Core
            computes the loss's gradient with respect to them once, with the model unperturbed, and uses it in every
            pass of the step (Gao et al., 2021, "Scaling deep contrastive learning batch size", section 3.2). The
            result therefore does not depend on how the step is split.
        May change: nothing.
        Returns: terms of unit "step", each a scalar; or None.
        """

    @_hook("collect")
    def before_clip(self, run: Run) -> None:
        """Read or modify the complete gradients before they are clipped.

        When: once per optimizer step, with gradients unscaled and summed over all micro-steps and processes. Not in a
            step that the fp16 scaler skips.
        May change: the gradients of `run.trainable`.
        """

    @_hook("collect")
    def before_optimizer_step(self, run: Run) -> None:
        """Read or modify the gradients that the optimizer will use.

        When: once per optimizer step, after clipping and before the update. Not in a step that is skipped.
        May change: the gradients of `run.trainable`.
        """

    @_hook("collect")
    def after_optimizer_step(self, run: Run) -> None:
        """React to the updated parameters: prune them, log about them.

        When: once per optimizer step, after the update; `run.step` does not count this step yet, and the gradients are
            still available. Not in a step that is skipped.
        May change: the values of `run.trainable`; their shapes with `run.replace_parameter`.
        """

    @_hook("observe")
    def on_event(self, event: Event) -> None:
        """Observe the run: a tracker, a notifier.

        When: at the "start", after each "step" and each "evaluation", and at the "end".
        May change: nothing in the run.
        """

    @_hook("collect", wrappable=True)
    def evaluate(self, run: Run) -> dict[str, float]:
        """Evaluate the model on `run.eval_examples`; the results are reported together with the task's metrics.

        When: before the first step, every `train.eval_every` steps and at the end, if the recipe has `data.eval`.
        May change: nothing permanently. The trainable parameters have the values that would be exported: the average,
            if the run has one.
        Returns: metrics by name.
        """

    @_hook("collect")
    def state_dict(self, run: Run) -> dict[str, Any]:
        """Return the state that a resume needs beyond parameters and optimizer.

        When: at the end of an optimizer step, before its evaluation: for every checkpoint, and before every evaluation
            in case that is interrupted. All processes call it; the first process's result is saved for all.
        May change: nothing.
        Returns: tensors, arrays and JSON values by name, arbitrarily nested. Including a version number is recommended.
        """

    @_hook("per strategy")
    def load_state_dict(self, run: Run, state: dict[str, Any]) -> None:
        """Restore the state that the same strategy's `state_dict` returned.

        When: on resume, after `trainable_parameters` and before parameters and optimizer are restored.
        May change: the strategy's own state; shapes of parameters with `run.replace_parameter`.
        """

    @_hook("collect", wrappable=True)
    def export(self, run: Run, model: nn.Module, directory: Path) -> None:
        """Write the run's result.

        When: at the end, after the parameters of the best evaluation have been restored. `directory` is a temporary
            folder, which is renamed once it is complete.
        May change: the folder.
        """

    @_hook("adapter owner")
    def attach_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
        """Attach a saved adapter to a live model without activating it.

        When: the pool loads an adapter of this type, or a strategy adds one beside the run's. `config` is the content
            of adapter_config.json.
        May change: the model's modules, not its weights. Every tensor must be used; refuse one that does not fit.
        """

    @_hook("adapter owner")
    def use_adapters(self, model: nn.Module, names: Sequence[str], index: Sequence[int]) -> None:
        """Select the active adapters.

        When: before each generation of the pool, and around a run's computation of the base's own logits. `names` are
            the distinct adapters in use; `index` selects one of them for each row of the next batches, or the base
            alone with -1. With an empty `index`, a single name applies to every row, and no name means the base alone.
            If adapters share packed rows, `index` has one entry per position of the batch.
        May change: the selection only. A method that cannot mix these adapters in one batch raises InputError; it is
            then called with one adapter per batch.
        """

    @_hook("adapter owner")
    def detach_adapter(self, model: nn.Module, name: str) -> None:
        """Remove an attached adapter.

        When: the pool unloads it.
        May change: the model's modules; after the last adapter is removed they are bitwise identical to the base's.
        """

    @_hook("adapter owner", first=True)
    def live_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> LiveAdapter | None:
        """Return a saved adapter as entries of the live table, so that it shares batches with others. Optional.

        When: the pool loads an adapter of this type, instead of `attach_adapter`; without gradients, and in the base's
            precision. `config` and `tensors` are those of PEFT's files; the tensors stay in memory.
        May change: nothing. Every tensor must be used; refuse one that does not fit.
        Returns: a `LiveAdapter`; None: attach this one, whose rows then run in batches of their own.
        """

    @_hook("adapter owner", first=True)
    def convert_adapter(
        self, config: dict[str, Any], tensors: dict[str, Tensor], adapter_type: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Convert a saved adapter to an equivalent one of another type. Optional.

        When: `budwood adapter export --as TYPE`, and exports for programs that know LoRA alone. `config` and `tensors`
            are those of PEFT's files.
        May change: nothing.
        Returns: config and tensors of the other type, or None if the adapter cannot be converted.
        """

    @_hook("adapter owner", first=True)
    def combine_adapters(
        self, adapters: Sequence[SavedAdapter], weights: Sequence[float], base: Callable[[], nn.Module]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return one adapter of this type whose changes of the base are the weighted sum of others' changes. Optional.

        When: `budwood adapter combine` on adapters of this type, which are of one base and one task. `base()` loads
            this base and returns its model; call it only if files and weights do not say enough. The class declares its
            type in `adapter_types`.
        May change: nothing. An adapter that does not fit the others is refused by the name of its `directory`.
        Returns: config and tensors of PEFT's files; None: the sum is no adapter of this type.
        """

    @_hook("adapter owner")
    def merge_adapter(self, model: nn.Module, name: str) -> None:
        """Merge an attached adapter into the weights and remove it.

        When: `budwood adapter merge`, on unquantised fp32 weights.
        May change: the model's weights and modules.
        """

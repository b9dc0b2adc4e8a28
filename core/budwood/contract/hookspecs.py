"""Every hook that a strategy can implement, in the order in which a run calls them.

docs/hooks.md is generated from these declarations: how each hook is called, when it runs, what it may change, and what
it returns.
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

    from budwood.contract.examples import Batch, Example
    from budwood.contract.types import Event, LossTerm, Outputs, ParameterGroup, Plan, Run, Step
    from budwood.model.base import Base

HOW = {
    "collect": "every strategy, in the resolved order; all results are used",
    "chain": "every strategy, in the resolved order; each receives what the previous one returned",
    "exclusive": "at most one strategy, which replaces core's implementation",
    "core": "implemented by core or the task; strategies can only wrap it",
    "per strategy": "every strategy, each with its own state only",
    "observe": "every strategy; a strategy that raises is reported and disabled, and the run continues",
    "adapter owner": "the strategy that owns the adapter type; the adapter pool calls it outside of runs too",
}
"""The ways in which hooks are called."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _hook(how: str, *, wrappable: bool = False, first: bool = False) -> Callable[[_Function], _Function]:
    """Declare a hook: how it is called, whether strategies may wrap it, and whether only the first result counts."""
    assert how in HOW

    def declare(function: _Function) -> _Function:
        function.how, function.wrappable = how, wrappable  # type: ignore[attr-defined]
        return pluggy.HookspecMarker("budwood")(function, firstresult=first)

    return declare


class HookSpecs:
    """The contract. An implementation may take any subset of a hook's arguments, by name.

    "Wrappable": `@hookimpl(wrapper=True)` surrounds the whole call. It yields once and returns the result.
    """

    @_hook("collect")
    def check_plan(self, plan: Plan) -> None:
        """Report what cannot work, through `plan.problem(self, text)`; all problems are shown together.

        When: before the data is read, and again before the base loads; also in `budwood plan`. The first time,
            `plan.steps` is None if the recipe counts epochs.
        May change: nothing.
        """

    @_hook("chain")
    def prepare_examples(self, run: Run, examples: Sequence[Example]) -> Sequence[Example]:
        """Filter, change or create training examples.

        When: once, after the data is read, before it is packed and before the base loads.
        May change: the examples and their order. `example.columns` may hold additional values, each a `Column` with its
            axis. Evaluation examples are not passed to this hook.
        Returns: the training examples; those of one group must be adjacent.
        """

    @_hook("collect")
    def planned_examples(self, run: Run) -> Sequence[Example]:
        """Return examples of the sizes that `next_examples` will produce, for planning, which never samples.

        When: only in planning, in place of `next_examples`.
        May change: nothing.
        Returns: the examples of one optimizer step, at the largest expected sizes; their values do not matter.
        """

    @_hook("exclusive", first=True)
    def load_base(self, run: Run) -> Base:
        """Load the base in place of the recipe's quantiser.

        When: once, after the plan has been checked with the number of steps.
        May change: nothing except the model it creates.
        Returns: a `Base`.
        """

    @_hook("chain")
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Modify the loaded model, for example attach an adapter.

        When: once, after the base is loaded and frozen; `run.examples` and `run.steps` are set.
        May change: the model's modules, but not the bytes of the base's weights. It may also set `run.task_weight`, to
            share the loss with the task, and `run.best_metric`, to select the best adapter by another metric than the
            task's, and call `run.average_with`, to average the trainable parameters.
        Returns: the model.
        """

    @_hook("collect")
    def trainable_parameters(self, run: Run, model: nn.Module) -> list[ParameterGroup]:
        """Return the parameters to train. Parameters that no strategy returns stay frozen.

        When: once, after every `prepare_model`.
        May change: nothing.
        Returns: groups of fp32 parameters. Group names are unique, as are parameter names; each parameter appears once.
        """

    @_hook("exclusive", first=True)
    def build_optimizer(self, run: Run, groups: list[dict[str, Any]]) -> Optimizer:
        """Build the optimizer in place of AdamW.

        When: once, after `trainable_parameters`. `groups` are torch parameter groups with the keys "params", "lr",
            "weight_decay" and "name".
        May change: the groups' values, such as a learning rate.
        Returns: a torch optimizer over all groups.
        """

    @_hook("exclusive", first=True)
    def build_scheduler(self, run: Run, optimizer: Optimizer) -> LRScheduler:
        """Build the learning-rate scheduler in place of the recipe's `train.schedule`.

        When: once, after `build_optimizer`; `run.steps` is set.
        May change: nothing except the scheduler it creates.
        Returns: a torch scheduler, which core steps once per optimizer step that is not skipped.
        """

    @_hook("exclusive", first=True)
    def next_examples(self, run: Run, indices: Sequence[int]) -> Sequence[Sequence[Example]]:
        """Create the examples of the next optimizer steps with the current model: on-policy data.

        When: whenever the previous set is used up, on the main thread between optimizer steps, without gradients.
            `indices` are this process's share of the rows of `run.examples` (the prompts) that the plan draws for the
            set; it may be empty. The results of all processes are gathered. `run.generate` samples from the live model.
        May change: nothing in the run. Core keeps the set until it is used up, and saves it with a checkpoint. Logged
            values count towards the set's first step; `run.generator` restarts for that step.
        Returns: one sequence of examples per optimizer step that uses the set: `updates` of them, a class attribute of
            the strategy. Keys are unique within a step, across all processes. Columns hold per-sample values such as
            the advantage and the log-probabilities.
        """

    @_hook("collect")
    def batch_counts(self, run: Run, batch: Batch) -> dict[str, float]:
        """Count custom units, by which core divides loss terms of that unit.

        When: for every micro-batch of an optimizer step, before the first of them runs; the batch is on the host.
        May change: nothing.
        Returns: the batch's amount of each unit, by the unit's name. Core sums over micro-batches and processes.
        """

    @_hook("chain")
    def prepare_batch(self, run: Run, batch: Batch) -> Batch:
        """Change a micro-batch, or add columns to it.

        When: before each micro-step, once the batch is on its device. Not in evaluations.
        May change: the batch, but not its counts (labels, their weights, examples, groups): those of the optimizer step
            are already fixed. `batch.columns` may hold additional tensors.
        Returns: the batch.
        """

    @_hook("core", wrappable=True, first=True)
    def backward(self, step: Step) -> None:
        """Run the forward pass, loss terms and backward pass of a micro-step; implemented by core.

        When: once per micro-step. A wrapper may run further passes before or after its yield, with `step.replay` and
            `step.noise_gradient`. If memory runs out, the whole optimizer step restarts from micro-step 0 with smaller
            micro-batches, so reset anything summed over an optimizer step at `step.micro_step == 0`.
        May change: before the yield, `step.noise`, `step.main_weight` and `step.track_noise`; after it, the gradients,
            which accumulate over the micro-steps.
        """

    @_hook("core", wrappable=True, first=True)
    def forward(self, step: Step) -> Outputs:
        """Run the model up to its head, with `step.noise` added to the embeddings' output; implemented by the task.

        When: in each pass of a micro-step, inside `backward`. Not in evaluation or generation.
        May change: the outputs. A wrapper may call `step.forward(noise)` for outputs to compare with.
        Returns: the outputs: hidden states [R, T, d] and the head that maps rows of them to logits.
        """

    @_hook("collect")
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> list[LossTerm] | LossTerm | None:
        """Add loss terms that need the head, one value per label; all such terms share one chunked pass of the head.

        When: for each chunk of labels in each pass, after `forward`. `logits` [n, vocabulary or classes] are those of
            the labels `positions` [n] int64, which index `batch.labels`, `batch.label_positions` and
            `batch.example_of_label`.
        May change: nothing.
        Returns: terms of unit "label" with values [n] in the order of `positions`, or None.
        """

    @_hook("collect")
    def sequence_terms(self, step: Step, log_probs: Tensor) -> list[LossTerm] | LossTerm | None:
        """Add loss terms that are functions of the labels' log-probabilities: preference losses, clipped ratios.

        When: once per pass, after its `token_terms`. `log_probs` [L] has a graph; `batch.example_of_label` and
            `batch.groups` map each label to its example and group. The task must define log-probabilities.
        May change: nothing.
        Returns: terms of unit "label" (values [L]), "example", "group", or a unit from `batch_counts`; or None.
        """

    @_hook("collect")
    def loss_terms(self, step: Step, outputs: Outputs) -> list[LossTerm] | LossTerm | None:
        """Add loss terms that do not need the head.

        When: once per pass, after its `token_terms`.
        May change: nothing.
        Returns: terms of unit "example" (values [examples]), "group" (values [groups]), "step" (a scalar, added once
            per optimizer step and never replayed), or a unit from `batch_counts`; or None.
        """

    @_hook("per strategy")
    def step_values(self, step: Step, outputs: Outputs, log_probs: Tensor | None) -> dict[str, Tensor] | None:
        """Return the values of a micro-batch that the same strategy's `step_terms` needs: embeddings, scores.

        When: once per pass. `outputs.hidden` and `log_probs` [L] (None if the task has none) have a graph. If a step
            has several micro-batches or processes, also once per micro-batch before micro-step 0, without a graph.
        May change: nothing.
        Returns: tensors by name; core concatenates each along its first dimension over the optimizer step.
        """

    @_hook("per strategy")
    def step_terms(self, run: Run, values: dict[str, Tensor]) -> list[LossTerm] | LossTerm | None:
        """Add a loss across all examples of the optimizer step: in-batch negatives, a batch baseline.

        When: once per optimizer step. `values` holds the `step_values` of all micro-batches and processes. Core
            computes the loss's gradient with respect to them once, with the unperturbed model, and uses it in every
            pass of the step (Gao et al., 2021, "Scaling deep contrastive learning batch size", section 3.2), so the
            result does not depend on how the step is split.
        May change: nothing.
        Returns: terms of unit "step", each a scalar; or None.
        """

    @_hook("collect")
    def before_clip(self, run: Run) -> None:
        """Read or change the accumulated gradients before they are clipped.

        When: once per optimizer step; gradients are summed over all micro-steps and processes, and unscaled. Not in a
            step that the fp16 scaler skips.
        May change: the gradients of `run.trainable`.
        """

    @_hook("collect")
    def before_optimizer_step(self, run: Run) -> None:
        """Read or change the gradients that the optimizer will use.

        When: once per optimizer step, after clipping and before the update. Not in a skipped step.
        May change: the gradients of `run.trainable`.
        """

    @_hook("collect")
    def after_optimizer_step(self, run: Run) -> None:
        """React to the updated parameters: shrink them, log statistics.

        When: once per optimizer step, after the update. `run.step` does not count this step yet, and the gradients are
            still available. Not in a skipped step.
        May change: the values of `run.trainable`; their shapes through `run.replace_parameter`.
        """

    @_hook("observe")
    def on_event(self, event: Event) -> None:
        """Observe the run: for trackers and notifiers.

        When: at "start", after each "step" and each "evaluation", and at "end".
        May change: nothing in the run.
        """

    @_hook("collect", wrappable=True)
    def evaluate(self, run: Run) -> dict[str, float]:
        """Evaluate the model on `run.eval_examples`; these metrics are added to the task's own.

        When: before the first step, every `train.eval_every` steps, and at the end, if the recipe has `data.eval`.
        May change: nothing permanently. The parameters are those that would be exported: the average, if the run has
            one.
        Returns: metrics by name.
        """

    @_hook("collect")
    def state_dict(self, run: Run) -> dict[str, Any]:
        """Return the state that a resume needs in addition to parameters and optimizer.

        When: at the end of an optimizer step: for a checkpoint, and before an evaluation, in case it is interrupted.
            Every process calls it; the first process's result is saved for all.
        May change: nothing.
        Returns: tensors, arrays and JSON values by name, nested to any depth; include a version.
        """

    @_hook("per strategy")
    def load_state_dict(self, run: Run, state: dict[str, Any]) -> None:
        """Restore what the same strategy's `state_dict` returned.

        When: on resume, after `trainable_parameters` and before parameters and optimizer are restored.
        May change: the strategy's own state; shapes of parameters through `run.replace_parameter`.
        """

    @_hook("collect", wrappable=True)
    def export(self, run: Run, model: nn.Module, directory: Path) -> None:
        """Write the run's results.

        When: at the end, with the parameters of the best evaluation restored. `directory` is temporary and is renamed
            once it is complete.
        May change: the contents of the directory.
        """

    @_hook("adapter owner")
    def attach_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
        """Attach a saved adapter to a live model, without activating it.

        When: the pool loads an adapter of this type, or a strategy needs one in addition to the run's. `config` is the
            content of adapter_config.json.
        May change: the model's modules, not its weights. Every tensor must be used; raise if anything does not fit.
        """

    @_hook("adapter owner")
    def use_adapters(self, model: nn.Module, names: Sequence[str], index: Sequence[int]) -> None:
        """Select the active adapters.

        When: before each generation of the pool, and around the base's own logits in a run. `names` are the distinct
            active adapters. `index` maps each row of the following batches to one of them, or to -1 for the base alone.
            With an empty index, the single name applies to every row, and no name means the base alone. If adapters
            share packed rows, `index` has one entry per position of the batch.
        May change: the selection only. A method that cannot mix adapters in one batch raises InputError; it is then
            called with batches of one adapter each.
        """

    @_hook("adapter owner")
    def detach_adapter(self, model: nn.Module, name: str) -> None:
        """Remove an adapter.

        When: the pool unloads it.
        May change: the model's modules. Once no adapter is left, they are bitwise identical to the base's.
        """

    @_hook("adapter owner", first=True)
    def convert_adapter(
        self, config: dict[str, Any], tensors: dict[str, Tensor], adapter_type: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Convert a saved adapter to an equivalent adapter of another type; optional.

        When: `budwood adapter export --as TYPE`. `config` and `tensors` are the contents of PEFT's files.
        May change: nothing.
        Returns: config and tensors of the other type, or None if it cannot be converted.
        """

    @_hook("adapter owner")
    def merge_adapter(self, model: nn.Module, name: str) -> None:
        """Merge an attached adapter into the weights and remove it.

        When: `budwood adapter merge`, on unquantised fp32 weights.
        May change: the model's weights and modules.
        """

"""Every hook that a strategy can take part in, in the order in which a run calls them.

docs/hooks.md is made of these declarations: how each is called, when it runs, what it may change, what it returns.
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
    "exclusive": "at most one strategy; it replaces core's implementation",
    "core": "implemented by core or the task; strategies may only wrap it",
    "per strategy": "every strategy, with its own state only",
    "observe": "every strategy; one that raises is named and disabled, and the run continues",
    "adapter owner": "the one strategy that owns the adapter type; called outside of runs too, by the pool",
}
"""How a hook is called."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _hook(how: str, *, wrappable: bool = False, first: bool = False) -> Callable[[_Function], _Function]:
    """Declare a hook: how it is called, whether strategies may wrap it, whether the first result is the only one."""
    assert how in HOW

    def declare(function: _Function) -> _Function:
        function.how, function.wrappable = how, wrappable  # type: ignore[attr-defined]
        return pluggy.HookspecMarker("budwood")(function, firstresult=first)

    return declare


class HookSpecs:
    """The contract. An implementation may take fewer arguments, by name, than a hook has.

    "Wrappable": `@hookimpl(wrapper=True)` may surround the whole call: it yields once, and returns the result.
    """

    @_hook("collect")
    def check_plan(self, plan: Plan) -> None:
        """Say what stands against the plan, by `plan.problem(self, text)`; all problems are reported at once.

        When: before the data is read, and again before the base loads; by `budwood plan` too. `plan.steps` may be None
            the first time, where the recipe counts epochs.
        May change: nothing.
        """

    @_hook("chain")
    def prepare_examples(self, run: Run, examples: Sequence[Example]) -> Sequence[Example]:
        """Filter, change or make the examples to train on.

        When: once, after the data is read, before it is packed and before the base loads.
        May change: the examples and their order; `example.columns` may carry more values, each a `Column` with its
            axis. Evaluation examples are left alone.
        Returns: the examples to train on; those of a group stand together.
        """

    @_hook("collect")
    def planned_examples(self, run: Run) -> Sequence[Example]:
        """Give examples of the sizes that `next_examples` will make, for planning, which never samples.

        When: only in planning, in place of `next_examples`.
        May change: nothing.
        Returns: examples of one optimizer step, the largest that are expected; their values do not matter.
        """

    @_hook("exclusive", first=True)
    def load_base(self, run: Run) -> Base:
        """Load the base in place of the recipe's quantiser.

        When: once, after the plan was checked with the number of steps.
        May change: nothing but what it makes.
        Returns: a `Base`.
        """

    @_hook("chain")
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Change the loaded model, for instance put an adapter on it.

        When: once, after the base is loaded and frozen; `run.examples` and `run.steps` are known.
        May change: the model's modules; not the bytes of the base's weights. `run.task_weight`, where a strategy shares
            the loss with the task; `run.best_metric`, if another metric than the task's decides which adapter is
            kept; `run.average_with`, to average what trains.
        Returns: the model.
        """

    @_hook("collect")
    def trainable_parameters(self, run: Run, model: nn.Module) -> list[ParameterGroup]:
        """Name what trains. All that no strategy names is frozen.

        When: once, after every `prepare_model`.
        May change: nothing.
        Returns: groups of parameters, fp32; groups and parameters have names of their own, and each stands once.
        """

    @_hook("exclusive", first=True)
    def build_optimizer(self, run: Run, groups: list[dict[str, Any]]) -> Optimizer:
        """Build the optimizer in place of AdamW.

        When: once, after `trainable_parameters`; `groups` are torch's parameter groups, with the keys "params", "lr",
            "weight_decay" and "name".
        May change: the groups' values, such as a learning rate.
        Returns: a torch optimizer over all of the groups.
        """

    @_hook("exclusive", first=True)
    def build_scheduler(self, run: Run, optimizer: Optimizer) -> LRScheduler:
        """Build the learning-rate scheduler in place of the recipe's `train.schedule`.

        When: once, after `build_optimizer`; `run.steps` is known.
        May change: nothing but what it makes.
        Returns: a torch scheduler; it is stepped once an optimizer step that is not skipped.
        """

    @_hook("exclusive", first=True)
    def next_examples(self, run: Run, indices: Sequence[int]) -> Sequence[Sequence[Example]]:
        """Make the examples of the next optimizer steps with the model as it is now: on-policy data.

        When: whenever the last set is used up, on the main thread between optimizer steps, without gradients. `indices`
            are this process's share of the rows of `run.examples` (prompts) that the plan draws for the set, perhaps
            none; every process's results are gathered. `run.generate` samples on the live model.
        May change: nothing of the run. Core keeps the set until it is used up, and saves it with a checkpoint. What is
            logged counts for the first of its steps; `run.generator` begins anew for that step.
        Returns: one sequence of examples for each optimizer step that uses the set, `updates` of them in all (a class
            attribute of the strategy). Keys are unique within a step, over all processes; columns carry what belongs
            to a sample: its advantage, its log-probabilities.
        """

    @_hook("collect")
    def batch_counts(self, run: Run, batch: Batch) -> dict[str, float]:
        """Count units of one's own, by which core divides loss terms of that unit.

        When: for each micro-batch of an optimizer step, before the first of them is run; the batch is on the host.
        May change: nothing.
        Returns: how much of each unit the batch holds, by the unit's name. Core adds up micro-batches and processes.
        """

    @_hook("chain")
    def prepare_batch(self, run: Run, batch: Batch) -> Batch:
        """Change a micro-batch, or add to its columns.

        When: before each micro-step, when the batch is on its device. Not in evaluations.
        May change: the batch, but not its counts (labels, their weights, examples, groups), since the optimizer step's
            are known by then; `batch.columns` may carry more tensors.
        Returns: the batch.
        """

    @_hook("core", wrappable=True, first=True)
    def backward(self, step: Step) -> None:
        """Forward, loss terms and backward of a micro-step: core's.

        When: once a micro-step. A wrapper may run further passes before or after its yield: `step.replay`,
            `step.noise_gradient`. Where memory runs out, the whole optimizer step begins again from micro-step 0 with
            smaller micro-batches: start at `step.micro_step == 0` what is summed over an optimizer step.
        May change: before the yield `step.noise`, `step.main_weight` and `step.track_noise`; after it gradients, which
            add up over the micro-steps.
        """

    @_hook("core", wrappable=True, first=True)
    def forward(self, step: Step) -> Outputs:
        """Run the model up to its head, with `step.noise` added to the embeddings' output: the task's.

        When: in each pass of a micro-step, inside `backward`. Not in evaluations and generation.
        May change: the outputs; a wrapper may run `step.forward(noise)` to compare with.
        Returns: the outputs: hidden states [R, T, d] and the head that maps rows of them to logits.
        """

    @_hook("collect")
    def token_terms(self, step: Step, logits: Tensor, positions: Tensor) -> list[LossTerm] | LossTerm | None:
        """Add loss terms that need the head, one value a label; all such terms share one chunked pass of the head.

        When: for each chunk of the labels of each pass, after `forward`. `logits` [n, vocabulary or classes] belong to
            the labels `positions` [n] int64, which index `batch.labels`, `batch.label_positions` and
            `batch.example_of_label`.
        May change: nothing.
        Returns: terms of unit "label", values [n] in the order of `positions`; or None.
        """

    @_hook("collect")
    def sequence_terms(self, step: Step, log_probs: Tensor) -> list[LossTerm] | LossTerm | None:
        """Add loss terms that are functions of the labels' log-probabilities: preference losses, clipped ratios.

        When: once a pass, after its `token_terms`. `log_probs` [L] has a graph; `batch.example_of_label` and
            `batch.groups` tell whose each label is. The task must have log-probabilities.
        May change: nothing.
        Returns: terms of unit "label" (values [L]), "example", "group", or one that `batch_counts` counts; or None.
        """

    @_hook("collect")
    def loss_terms(self, step: Step, outputs: Outputs) -> list[LossTerm] | LossTerm | None:
        """Add loss terms that need no head.

        When: once a pass, after its `token_terms`.
        May change: nothing.
        Returns: terms of unit "example" (values [examples]), "group" (values [groups]), "step" (a scalar, added once an
            optimizer step and never replayed), or one that `batch_counts` counts; or None.
        """

    @_hook("per strategy")
    def step_values(self, step: Step, outputs: Outputs, log_probs: Tensor | None) -> dict[str, Tensor] | None:
        """Give what `step_terms` of the same strategy needs of a micro-batch: embeddings, scores.

        When: once a pass. `outputs.hidden` and `log_probs` [L] (None if the task has none) have a graph. If a step has
            several micro-batches or processes, also once for each micro-batch before micro-step 0, without a graph.
        May change: nothing.
        Returns: tensors by name, whose first dimension core concatenates over the optimizer step.
        """

    @_hook("per strategy")
    def step_terms(self, run: Run, values: dict[str, Tensor]) -> list[LossTerm] | LossTerm | None:
        """Add a loss across all examples of the optimizer step: in-batch negatives, a baseline over the batch.

        When: once an optimizer step. `values` are those of `step_values` over all micro-batches and processes. Core
            finds the loss's gradient with respect to them once, with the model unperturbed, and uses it in every pass
            of the step (Gao et al., 2021, "Scaling deep contrastive learning batch size", section 3.2), so that the
            result does not depend on how the step is split.
        May change: nothing.
        Returns: terms of unit "step", each a scalar; or None.
        """

    @_hook("collect")
    def before_clip(self, run: Run) -> None:
        """Read or change the whole gradients before they are clipped.

        When: once an optimizer step: gradients are summed over all micro-steps and processes, and unscaled. Not in a
            step that the fp16 scaler skips.
        May change: the gradients of `run.trainable`.
        """

    @_hook("collect")
    def before_optimizer_step(self, run: Run) -> None:
        """Read or change the gradients that the optimizer will use.

        When: once an optimizer step, after clipping and before the optimizer moves. Not in a step that is skipped.
        May change: the gradients of `run.trainable`.
        """

    @_hook("collect")
    def after_optimizer_step(self, run: Run) -> None:
        """Follow the parameters: shrink them, log about them.

        When: once an optimizer step, after the optimizer moved; `run.step` counts the steps before this one, and the
            gradients are still there. Not in a step that is skipped.
        May change: the values of `run.trainable`; their shapes by `run.replace_parameter`.
        """

    @_hook("observe")
    def on_event(self, event: Event) -> None:
        """Learn what happened: a tracker, a notifier.

        When: at the "start", after each "step" and each "evaluation", at the "end".
        May change: nothing of the run.
        """

    @_hook("collect", wrappable=True)
    def evaluate(self, run: Run) -> dict[str, float]:
        """Measure the model on `run.eval_examples`; the task's metrics stand beside the strategies'.

        When: before the first step, each `train.eval_every` steps and at the end, where the recipe has `data.eval`.
        May change: nothing that lasts. What trains is what would be exported: the average, if the run has one.
        Returns: metrics by name.
        """

    @_hook("collect")
    def state_dict(self, run: Run) -> dict[str, Any]:
        """Give what a resume needs beyond parameters and optimizer.

        When: at the end of an optimizer step, before any evaluation of it: when a checkpoint is taken, and before an
            evaluation, in case it is cut short. Every process calls it; what the first one returns is saved for all.
        May change: nothing.
        Returns: tensors, arrays and JSON values by name, nested as you like; a version among them is wise.
        """

    @_hook("per strategy")
    def load_state_dict(self, run: Run, state: dict[str, Any]) -> None:
        """Take back what `state_dict` of the same strategy returned.

        When: at a resume, after `trainable_parameters` and before parameters and optimizer are restored.
        May change: its own state; shapes of parameters by `run.replace_parameter`.
        """

    @_hook("collect", wrappable=True)
    def export(self, run: Run, model: nn.Module, directory: Path) -> None:
        """Write what the run made.

        When: at the end, after the best evaluation's parameters were put back. `directory` is a temporary folder, which
            is renamed when it is complete.
        May change: the folder.
        """

    @_hook("adapter owner")
    def attach_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
        """Put a saved adapter on a live model, not in use yet.

        When: the pool loads an adapter of this type, or a strategy wants one beside the run's. `config` is
            adapter_config.json.
        May change: the model's modules, not its weights; every tensor is used, and what does not fit is refused.
        """

    @_hook("adapter owner")
    def use_adapters(self, model: nn.Module, names: Sequence[str], index: Sequence[int]) -> None:
        """Choose which adapters compute.

        When: before each generation of the pool, around the base's own logits in a run. `names` are the distinct names
            in use, and `index` says for each row of the next batches which of them computes it; -1: the base alone.
            Without an index, one name computes every row, and no name leaves the base alone. If adapters share packed
            rows, `index` has one entry for each of the batch's positions.
        May change: the choice alone. A method that cannot mix these in one batch raises InputError, and is then asked
            for batches with one adapter each.
        """

    @_hook("adapter owner")
    def detach_adapter(self, model: nn.Module, name: str) -> None:
        """Take an adapter off.

        When: the pool unloads it.
        May change: the model's modules; without any adapter left they are those of the base, bit for bit.
        """

    @_hook("adapter owner", first=True)
    def convert_adapter(
        self, config: dict[str, Any], tensors: dict[str, Tensor], adapter_type: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Turn a saved adapter into one of another type that computes the same; optional.

        When: `budwood adapter export --as TYPE`. `config` and `tensors` are those of PEFT's files.
        May change: nothing.
        Returns: config and tensors of the other type, or None where it cannot be.
        """

    @_hook("adapter owner")
    def merge_adapter(self, model: nn.Module, name: str) -> None:
        """Add an attached adapter into the weights, and take it off.

        When: `budwood adapter merge`, on unquantised fp32 weights.
        May change: the model's weights and modules.
        """

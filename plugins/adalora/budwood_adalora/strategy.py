"""AdaLoRA as a strategy: rank schedule, orthogonality penalty, and PEFT's file format.

Torch and PEFT take seconds to import, so they are imported in the hooks: invalid options are refused before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budwood import (
    RUN_ADAPTER,
    CorruptError,
    InputError,
    Strategy,
    hookimpl,
    linear_shape,
    match_targets,
    whole_modules,
)
from budwood_adalora.options import TYPE, AdaLoRAOptions
from budwood_adalora.schedule import Schedule, smallest_steps

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood import LiveAdapter, LossTerm, ParameterGroup, Plan, Run, Step
    from budwood_adalora.importance import Importance
    from budwood_adalora.layers import SVDLinear

STATE_VERSION = 1


class AdaLoRA(Strategy):
    """Low-rank adapters W + s · B diag(E) A with ranks allocated by importance (Zhang et al., 2023)."""

    Options = AdaLoRAOptions
    api = 2
    slots = ("adapter",)
    adapter_types = ("ADALORA",)
    # Each rank has its value by itself to learn, and a third of the ranks go: `benchmarks.defaults` has its best scores
    # between one and three times LoRA's rate.
    learning_rate_scale = 1.5

    @classmethod
    def continued_options(cls, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        from budwood.lowrank import continued_selection
        from budwood_adalora.file import parse

        saved = parse(config)
        if saved.bias != "none":
            raise InputError(f"adapter_config.json: 'bias: {saved.bias}' is not supported by adalora: use bias: none.")
        target = config.get("target_r")
        kept = target if isinstance(target, int) and 0 < target <= saved.init_r else saved.init_r
        fixed = {"initial_rank": saved.init_r, "alpha": saved.lora_alpha}
        return fixed, {"target_rank": kept, **continued_selection(config)}

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        options = self.options
        scheduled = plan.steps is not None and plan.start_adapter is None
        if scheduled and not (phases := Schedule.of(options, plan.steps)).fits:
            plan.problem(
                self,
                f"a run of {plan.steps} steps is too short for an initial phase of {phases.initial}, a final phase of "
                f"{phases.final} and an interval of {phases.interval}: it needs at least {smallest_steps(options)} "
                "steps; or lower initial_phase, final_phase or interval.",
            )
        if plan.model is None:
            return
        from budwood.lowrank import planned_targets
        from budwood_adalora.file import parse

        start = plan.start_adapter
        try:
            targets = planned_targets(plan, options, None if start is None else parse(start.config), experts=True)
        except InputError as error:
            plan.problem(self, str(error))
            return
        for path in targets:
            if options.initial_rank > (largest := min(linear_shape(plan.model.get_submodule(path)))):
                plan.problem(
                    self, f"initial_rank {options.initial_rank}: '{path}' has {largest} singular values; lower it."
                )
                return

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        import torch

        from budwood.lowrank import adapter_layers, experts_of, new_tokens, select_adapters
        from budwood_adalora.importance import Importance
        from budwood_adalora.layers import add_adapter, scale

        options = self.options
        if run.start_adapter is not None:
            return self._continue(run, run.start_adapter, model)
        self._schedule = Schedule.of(options, run.steps or 0)
        self._modules_to_save = whole_modules(model, options.modules_to_save, run.task, run.base)
        self._paths = match_targets(model, options.targets, options.layers, self._modules_to_save, experts=True)
        self._tokens = new_tokens(model, run.base, self._modules_to_save)
        ranks = {p: [options.initial_rank] * (experts_of(model.get_submodule(p)) or 1) for p in self._paths}
        scaling = dict.fromkeys(self._paths, scale(options.alpha, options.initial_rank))
        with torch.random.fork_rng(devices=[]):  # the initialisation depends on the seed alone
            torch.manual_seed(run.seed)
            add_adapter(model, RUN_ADAPTER, ranks, scaling, options.dropout, self._modules_to_save, tokens=self._tokens)
        select_adapters(model, TYPE, [RUN_ADAPTER])
        self._layers: dict[str, SVDLinear] = dict(adapter_layers(model, RUN_ADAPTER))
        self._importance: Importance | None = Importance(self._triplets(), options.beta1, options.beta2)
        run.adapter_final = False
        if options.target_rank == options.initial_rank:
            run.say("adalora: target_rank equals initial_rank, so no ranks will be pruned")
        return model

    def _continue(self, run: Run, saved: Any, model: nn.Module) -> nn.Module:
        """Attach the adapter that the run continues. It keeps its ranks."""
        from budwood.lowrank import adapter_layers, select_adapters
        from budwood_adalora.file import attach

        config = {**saved.config, "lora_dropout": self.options.dropout}
        self._modules_to_save, self._tokens = attach(model, config, saved.load_tensors(), RUN_ADAPTER)
        select_adapters(model, TYPE, [RUN_ADAPTER])
        self._layers = dict(adapter_layers(model, RUN_ADAPTER))
        self._paths = list(self._layers)
        self._schedule = Schedule(run.steps or 0, 0, 0, self.options.interval)
        self._importance = None
        total = sum(self.ranks().values())
        run.say(f"adalora: the adapter keeps its {total} ranks: target_rank and the phases have no effect")
        return model

    @hookimpl
    def trainable_parameters(self, run: Run, model: nn.Module) -> list[ParameterGroup]:
        from budwood import ParameterGroup
        from budwood.lowrank import whole_groups

        vectors = {
            f"{path}.{part}": getattr(layer, part)[RUN_ADAPTER]
            for path, layer in self._layers.items()
            for part in ("lora_A", "lora_B")
        }
        groups = [ParameterGroup("adalora", vectors)]
        # With Adam, a step of LoRA's B changes an element of W by rate · sqrt(rank / (3 in)), root mean square, while a
        # step of E, with singular vectors of norm 1, changes it by rate · sqrt(rank / (in · out)): this ratio makes
        # both equal. Otherwise AdaLoRA would start sqrt(out / 3) times as slowly.
        for outputs in sorted({layer.out_features for layer in self._layers.values()}):
            values = {
                f"{path}.lora_E": layer.lora_E[RUN_ADAPTER]
                for path, layer in self._layers.items()
                if layer.out_features == outputs
            }
            groups.append(ParameterGroup(f"adalora_values_{outputs}", values, (outputs / 3) ** 0.5))
        return [*groups, *whole_groups(model, RUN_ADAPTER)]

    @hookimpl
    def loss_terms(self, step: Step) -> LossTerm | None:
        from budwood import LossTerm
        from budwood_adalora.penalty import orthogonality

        # It depends on the parameters alone, so only one micro-step of one process adds it, and no replay.
        if not self.options.orthogonality or step.micro_step or step.replaying or step.run.process_index:
            return None
        layers = [layer for layer in self._layers.values() if layer.r[RUN_ADAPTER]]
        right, left = [], []
        for layer in layers:  # each expert's vectors by themselves
            ranks = layer.ranks(RUN_ADAPTER)
            right += [a for a in layer.lora_A[RUN_ADAPTER].split(ranks) if len(a)]
            left += [b for b in layer.lora_B[RUN_ADAPTER].split(ranks, 1) if b.shape[1]]
        mean = orthogonality(right, left) / self._updates()
        return LossTerm("orthogonality", mean, "step", self.options.orthogonality)

    @hookimpl
    def before_clip(self, run: Run) -> None:
        # Clipping would weight the steps by the norm of the full gradient.
        if self._importance is not None:
            self._importance.update(self._triplets())

    @hookimpl
    def after_optimizer_step(self, run: Run) -> None:
        import torch

        from budwood_adalora.importance import choose

        step, (start, target) = run.step + 1, self._budgets(run)
        budget = self._schedule.budget(step, start, target)
        if self._importance is not None and step >= self._schedule.last:  # later if fp16 skipped that step
            if run.planning:  # the pruned ranks depend on values; at worst a module keeps all of its ranks
                self._importance, run.adapter_final = None, True
                return
            keep = choose(self._importance.scores(), target)
            self._shrink(run, {path: mask.nonzero()[:, 0] for path, mask in zip(self._layers, keep, strict=True)})
            ranks = [rank for layer in self._layers.values() for rank in layer.ranks(RUN_ADAPTER)]
            run.say(
                f"adalora: {sum(ranks)} of {start} ranks remain after step {step}, "
                f"{min(ranks)} to {max(ranks)} per module"
            )
        elif self._importance is not None and self._schedule.allocates(step):
            masks = choose(self._importance.scores(), budget)
            with torch.no_grad():
                for layer, mask in zip(self._layers.values(), masks, strict=True):
                    layer.lora_E[RUN_ADAPTER].masked_fill_(~mask[:, None], 0.0)
        run.log("rank_budget", budget)

    @hookimpl
    def state_dict(self, run: Run) -> dict[str, Any]:
        state: dict[str, Any] = {"version": STATE_VERSION, "ranks": self.ranks()}
        state |= {f"owners.{path}": layer.owners[RUN_ADAPTER] for path, layer in self._layers.items() if layer.experts}
        if self._importance is not None:
            names = self._names()
            state |= {f"sensitivity.{k}": v for k, v in zip(names, self._importance.sensitivity, strict=True)}
            state |= {f"uncertainty.{k}": v for k, v in zip(names, self._importance.uncertainty, strict=True)}
        return state

    @hookimpl
    def load_state_dict(self, run: Run, state: dict[str, Any]) -> None:
        import torch

        if state.get("version") != STATE_VERSION:
            raise CorruptError(f"state of adalora: version {state.get('version')} instead of {STATE_VERSION}.")
        if state["ranks"].keys() != self._layers.keys():
            raise CorruptError("state of adalora: it is from a run with other targets.")
        if run.start_adapter is not None:
            if state["ranks"] != self.ranks():
                raise CorruptError("state of adalora: its ranks are not those of the adapter that the run continues.")
            return
        if self._importance is None:
            raise CorruptError("state of adalora: the ranks of the current run are already final.")
        importance, names = self._importance, self._names()
        if any(key.startswith("sensitivity.") for key in state):
            for part, averages in (("sensitivity", importance.sensitivity), ("uncertainty", importance.uncertainty)):
                for name, tensor in zip(names, averages, strict=True):
                    tensor.copy_(state[f"{part}.{name}"])
        else:  # the ranks are final: restore the shapes; core restores the values afterwards
            self._shrink(run, {path: torch.arange(rank) for path, rank in state["ranks"].items()})
            for path, layer in self._layers.items():
                if layer.experts:
                    layer.owners[RUN_ADAPTER] = state[f"owners.{path}"]

    @hookimpl
    def export(self, run: Run, model: nn.Module, directory: Path) -> None:
        from peft import AdaLoraConfig
        from safetensors.torch import save_file

        from budwood.lowrank import fan_in_fan_out, split_targets
        from budwood_adalora.file import adapter_tensors
        from budwood_adalora.picture import draw_ranks

        options, ranks = self.options, self.ranks()
        kept = [path for path, rank in ranks.items() if rank]  # rank 0: the unchanged base module
        linears, experts = split_targets(model, kept)
        if experts:
            run.say(
                "adalora: PEFT has no AdaLoRA on experts: the adapter opens in Budwood alone, or merged into its base"
            )
        if self._importance is not None:
            run.say(f"adalora: the budget was not reached; all {sum(ranks.values())} ranks are saved")
        initial = options.initial_rank
        config = AdaLoraConfig(
            init_r=initial,
            target_r=options.target_rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=linears,
            target_parameters=experts or None,
            fan_in_fan_out=fan_in_fan_out(model, self._paths),
            modules_to_save=self._modules_to_save or None,
            trainable_token_indices=self._tokens or None,
            tinit=self._schedule.initial,
            tfinal=self._schedule.final,
            deltaT=options.interval,
            beta1=options.beta1,
            beta2=options.beta2,
            orth_reg_weight=options.orthogonality,
            total_step=self._schedule.steps,
            # PEFT counts the True entries of each mask; the original positions no longer matter.
            rank_pattern={
                f"{path}.lora_E": [i < rank for rank in self._layers[path].ranks(RUN_ADAPTER) for i in range(initial)]
                for path in kept
            },
            task_type=run.task.peft_task_type,
            base_model_name_or_path=run.recipe.base.model,
            inference_mode=True,
        )
        config.target_modules = sorted(config.target_modules or ())  # PEFT makes it an unordered set
        config.save_pretrained(str(directory))
        tensors = {key: slot.detach().cpu().contiguous() for key, slot in adapter_tensors(model, RUN_ADAPTER).items()}
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        start, target = self._budgets(run)
        budgets = [self._schedule.budget(step, start, target) for step in range(run.step + 1)]
        try:
            means = {path: round(rank / (self._layers[path].experts or 1)) for path, rank in ranks.items()}
            draw_ranks(means, budgets, target, initial, run.directory / "ranks.png")
        except (OSError, ValueError) as error:
            run.say(f"warning: ranks.png was not drawn: {error}")

    @hookimpl
    def attach_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
        from budwood_adalora.file import attach

        attach(model, config, tensors, name)

    @hookimpl
    def live_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> LiveAdapter:
        from budwood_adalora.file import live

        return live(model, config, tensors)

    @hookimpl
    def use_adapters(self, model: nn.Module, names: Sequence[str], index: Sequence[int]) -> None:
        from budwood.lowrank import select_adapters

        select_adapters(model, TYPE, names, index)

    @hookimpl
    def detach_adapter(self, model: nn.Module, name: str) -> None:
        from budwood.lowrank import remove_adapter

        remove_adapter(model, name)

    @hookimpl
    def merge_adapter(self, model: nn.Module, name: str) -> None:
        from budwood_adalora.file import merge

        merge(model, name)

    @hookimpl
    def convert_adapter(
        self, config: dict[str, Any], tensors: dict[str, Tensor], adapter_type: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        from budwood_adalora.file import as_lora

        return as_lora(config, tensors) if adapter_type == "lora" else None

    def ranks(self) -> dict[str, int]:
        """Return the rank of each adapted module of the run, by its path; for experts the sum of their ranks."""
        return {path: layer.r[RUN_ADAPTER] for path, layer in self._layers.items()}

    def _budgets(self, run: Run) -> tuple[int, int]:
        """Return the sum of ranks at the start and at the end; an adapter that the run continues keeps its ranks."""
        if run.start_adapter is not None:
            total = sum(self.ranks().values())
            return total, total
        return self.options.initial_rank * self._updates(), self.options.target_rank * self._updates()

    def _updates(self) -> int:
        """Return the number of updates: one for each linear, and for each expert of a projection."""
        return sum(layer.experts or 1 for layer in self._layers.values())

    def _triplets(self) -> list[nn.Parameter]:
        """Return A [r, in], B [out, r], E [r, 1] of each module in turn."""
        parts = ("lora_A", "lora_B", "lora_E")
        return [getattr(layer, part)[RUN_ADAPTER] for layer in self._layers.values() for part in parts]

    def _names(self) -> list[str]:
        return [f"{path}.{part}" for path in self._layers for part in ("lora_A", "lora_B", "lora_E")]

    def _shrink(self, run: Run, keep: dict[str, Tensor]) -> None:
        width = max((len(indices) for path, indices in keep.items() if not self._layers[path].experts), default=0)
        for path, indices in keep.items():
            layer = self._layers[path]
            layer.shrink(run, RUN_ADAPTER, indices.to(layer.lora_E[RUN_ADAPTER].device), width)
        self._importance = None
        run.adapter_final = True

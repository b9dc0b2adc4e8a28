"""LoRA as a strategy.

Torch and PEFT take seconds to import, so they are imported in the hooks: invalid options are refused before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budwood import InputError, Strategy, hookimpl
from budwood_lora.options import LoRAOptions, SavedConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood import LiveAdapter, ParameterGroup, Plan, Run


class LoRA(Strategy):
    """Low-rank adapters W + (alpha / rank) · B A on frozen linears (Hu et al., 2021)."""

    Options = LoRAOptions
    api = 2
    slots = ("adapter",)
    adapter_types = ("LORA",)

    def __init__(self, options: Any = None, name: str = "", distribution: str = "") -> None:
        super().__init__(options, name, distribution)
        self.needs_whole_weights = self.options.dora  # its magnitudes start as the norms of the weights

    @classmethod
    def continued_options(cls, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        from budwood.lowrank import continued_selection, parse_saved_config

        saved = parse_saved_config("lora", SavedConfig, config)
        fixed = {"rslora": saved.use_rslora, "dora": saved.use_dora, "bias": saved.bias}
        return fixed, {"rank": saved.r, "alpha": saved.lora_alpha, **continued_selection(config)}

    def _check_model(self, plan: Plan, model: nn.Module) -> None:
        from budwood.lowrank import parse_saved_config, planned_targets
        from budwood_lora.ranks import check_rank

        start = plan.start_adapter
        saved = None if start is None else parse_saved_config("lora", SavedConfig, start.config)
        planned_targets(plan, self.options, saved, experts=True)
        if start is not None and saved is not None:
            check_rank(model, saved, start.directory, self.options)

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        if plan.model is None:
            return
        try:
            self._check_model(plan, plan.model)
        except InputError as error:
            plan.problem(self, str(error))

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        from budwood_lora.adapter import create
        from budwood_lora.layers import plan_dora

        if self.options.dora and run.planning:
            plan_dora(run.dtype)
        self._config = create(run, model, self.options)
        return model

    @hookimpl
    def trainable_parameters(self, run: Run, model: nn.Module) -> list[ParameterGroup]:
        from budwood_lora.adapter import parameter_groups

        return parameter_groups(model, self.options)

    @hookimpl
    def export(self, run: Run, model: nn.Module, directory: Path) -> None:
        from budwood_lora.adapter import write

        write(model, self._config, directory)
        if self._config.target_parameters and self._config.lora_dropout:
            run.say("lora: the file says lora_dropout: 0, as PEFT's layers for experts refuse dropout")
        if self._config.target_parameters and self._config.use_dora:
            run.say("lora: PEFT has no DoRA on experts: the adapter opens in Budwood alone, or merged into its base")

    @hookimpl
    def attach_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
        from budwood_lora.adapter import attach

        attach(model, config, tensors, name)

    @hookimpl
    def live_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> LiveAdapter:
        from budwood_lora.live import live

        return live(model, config, tensors)

    @hookimpl
    def use_adapters(self, model: nn.Module, names: Sequence[str], index: Sequence[int]) -> None:
        from budwood.lowrank import select_adapters
        from budwood_lora.layers import TYPE

        select_adapters(model, TYPE, names, index)

    @hookimpl
    def detach_adapter(self, model: nn.Module, name: str) -> None:
        from budwood.lowrank import remove_adapter

        remove_adapter(model, name)

    @hookimpl
    def merge_adapter(self, model: nn.Module, name: str) -> None:
        from budwood_lora.adapter import merge

        merge(model, name)

"""PEFT's methods that train parts of the base as they are, as strategies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from budwood import InputError, Strategy, hookimpl, whole_modules
from budwood_peft_methods import options as own

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood import LiveAdapter, ParameterGroup, Plan, Run, Task
    from budwood_peft_methods.replaced import Parts


class Replacing(Strategy):
    """A method of PEFT that trains parts of the base as they are.

    Attributes:
        peft_config: the name of PEFT's config class.
        FIELDS: the fields of PEFT's config that belong to the method.
    """

    api = 2
    slots = ("adapter",)
    beyond_linears = True
    peft_config: ClassVar[str] = ""
    FIELDS: ClassVar[tuple[str, ...]] = ()

    def new_parts(self, model: nn.Module) -> tuple[list[str], dict[str, list[int]]]:
        """Return the modules and rows of a new adapter."""
        raise NotImplementedError

    def saved_parts(self, model: nn.Module, config: Mapping[str, Any]) -> tuple[list[str], list[int]]:
        """Return the modules and token ids of a saved adapter."""
        raise NotImplementedError

    def fields(self, parts: Parts) -> dict[str, Any]:
        """Return the fields of PEFT's config for these parts."""
        raise NotImplementedError

    def whole(self, model: nn.Module, task: Task, base: Any = None) -> list[str]:
        """Return the full names of other modules that train whole; see `whole_modules`."""
        return whole_modules(model, self.options.modules_to_save, task, base)

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        if plan.model is None:
            return
        try:
            whole = self.whole(plan.model, plan.task)
            self.new_parts(plan.model)
            if plan.start_adapter is not None:
                from budwood_peft_methods.replaced import check_continued

                saved = plan.start_adapter
                check_continued(self, plan.model, saved.config, list(saved.infos), whole)
        except InputError as error:
            plan.problem(self, str(error))

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        from budwood_peft_methods.replaced import create

        self._parts = create(self, run, model)
        return model

    @hookimpl
    def trainable_parameters(self, run: Run, model: nn.Module) -> list[ParameterGroup]:
        from budwood_peft_methods.replaced import parameter_groups

        return parameter_groups(self, self._parts, model)

    @hookimpl
    def export(self, run: Run, model: nn.Module, directory: Path) -> None:
        from budwood_peft_methods.replaced import write

        write(self, self._parts, model, run, directory)

    @hookimpl
    def attach_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
        from budwood_peft_methods.replaced import attach

        attach(self, model, config, tensors, name)

    @hookimpl
    def live_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> LiveAdapter:
        from budwood_peft_methods.replaced import live

        return live(self, model, config, tensors)

    @hookimpl
    def combine_adapters(
        self, adapters: Sequence[Any], weights: Sequence[float], base: Callable[[], nn.Module]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        from budwood_peft_methods.replaced_sums import combine

        return combine(self, adapters, weights, base)

    @hookimpl
    def use_adapters(self, model: nn.Module, names: Sequence[str], index: Sequence[int]) -> None:
        from budwood.lowrank import select_adapters

        select_adapters(model, self.name, names, index)

    @hookimpl
    def detach_adapter(self, model: nn.Module, name: str) -> None:
        from budwood.lowrank import remove_adapter

        remove_adapter(model, name)

    @hookimpl
    def merge_adapter(self, model: nn.Module, name: str) -> None:
        from budwood_peft_methods.replaced import merge

        merge(model, name)


class LNTuning(Replacing):
    """LN tuning: the weights of the norms (Zhao et al., 2024)."""

    Options = own.LNTuningOptions
    adapter_types = ("LN_TUNING",)
    peft_config = "LNTuningConfig"
    FIELDS = ("target_modules", "exclude_modules")

    @classmethod
    def continued_options(cls, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        targets = config.get("target_modules")
        if not isinstance(targets, list) or config.get("exclude_modules"):
            raise InputError("adapter_config.json: target_modules must be a list of names to be continued.")
        return {}, {"targets": targets, "modules_to_save": config.get("modules_to_save") or []}

    def new_parts(self, model: nn.Module) -> tuple[list[str], dict[str, list[int]]]:
        from budwood_peft_methods.replaced import norm_targets

        return norm_targets(self, model), {}

    def saved_parts(self, model: nn.Module, config: Mapping[str, Any]) -> tuple[list[str], list[int]]:
        from budwood_peft_methods.replaced import saved_norms

        return saved_norms(model, config), []

    def fields(self, parts: Parts) -> dict[str, Any]:
        return {"target_modules": parts.own, "modules_to_save": parts.whole or None}


class TrainableTokens(Replacing):
    """Trainable tokens: the embeddings of chosen tokens."""

    Options = own.TrainableTokensOptions
    adapter_types = ("TRAINABLE_TOKENS",)
    peft_config = "TrainableTokensConfig"
    FIELDS = ("token_indices", "target_modules", "init_weights")

    @classmethod
    def continued_options(cls, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        from budwood_peft_methods.replaced import saved_token_ids

        return {"tokens": saved_token_ids(config)}, {}

    def whole(self, model: nn.Module, task: Task, base: Any = None) -> list[str]:
        found = whole_modules(model, [], task, base)
        if found:
            raise InputError(f"PEFT's trainable tokens cannot hold '{found[0]}', which must train too: use lora.")
        return found

    def new_parts(self, model: nn.Module) -> tuple[list[str], dict[str, list[int]]]:
        from budwood_peft_methods.replaced import token_targets

        return [], token_targets(self, model)

    def saved_parts(self, model: nn.Module, config: Mapping[str, Any]) -> tuple[list[str], list[int]]:
        from budwood_peft_methods.replaced import saved_token_ids

        return [], saved_token_ids(config)

    def fields(self, parts: Parts) -> dict[str, Any]:
        if len(parts.tokens) != 1:
            raise InputError("trainable_tokens trains rows of the embeddings alone: use lora for new tokens of a head.")
        ((path, ids),) = parts.tokens.items()
        return {"target_modules": [path], "token_indices": ids}

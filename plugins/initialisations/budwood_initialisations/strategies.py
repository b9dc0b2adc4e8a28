"""The initialisations as strategies beside `lora`.

Torch and PEFT take seconds to import, so they are imported in the hooks: invalid options are refused before that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from budwood import InputError, Strategy, hookimpl, linear_shape, match_targets, whole_modules
from budwood_initialisations import options as own

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood import Plan, Run


class Initialisation(Strategy):
    """A start of LoRA's A and B.

    Attributes:
        subtracts: the adapter counts from its start, so that it starts as the base.
        directions: least size of a linear's smaller side, as a multiple of `lora.rank`.
        with_dora: whether DoRA may use it.
    """

    api = 2
    slots = ("start",)
    requires = ("lora",)
    conflicts = ("adalora",)
    after = ("lora",)
    subtracts: ClassVar[bool] = True
    directions: ClassVar[int] = 1
    with_dora: ClassVar[bool] = False

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        lora = next((strategy for strategy in plan.strategies if strategy.name == "lora"), None)
        if lora is None:
            return  # reported already
        if plan.start_adapter is not None:
            plan.problem(self, "the run continues an adapter, which is not initialised: leave it out.")
        if lora.options.init != "default":
            plan.problem(
                self, f"lora.init: {lora.options.init} has no effect, since {self.name} replaces it: leave it out."
            )
        if lora.options.dora and not self.with_dora:
            plan.problem(
                self, "lora.dora rescales the weights, so that the difference to the start is not a low-rank update: "
                "leave dora out, or use eva."
            )  # fmt: skip
        if plan.model is not None:
            try:
                self._check_model(plan, lora)
            except InputError as error:
                plan.problem(self, str(error))

    def _check_model(self, plan: Plan, lora: Strategy) -> None:
        from budwood.lowrank import moved_targets, split_targets

        assert plan.model is not None
        options = lora.options
        whole = whole_modules(plan.model, options.modules_to_save, plan.task)
        found = match_targets(plan.model, options.targets, options.layers, whole, experts=True)
        targets, experts = split_targets(plan.model, found)
        if other := [*experts, *moved_targets(plan.model, targets)]:
            raise InputError(f"'{other[0]}' is of an expert, which LoRA alone can start: name others in lora.targets.")
        for path in targets:
            shape = linear_shape(plan.model.get_submodule(path))
            if self.directions * options.rank > min(shape):
                most = min(shape) // self.directions
                raise InputError(
                    f"'{path}' [{shape[0]}, {shape[1]}] allows ranks up to {most}, and lora.rank is {options.rank}: "
                    "lower it, or name other linears in lora.targets."
                )
        self.check_targets(plan, targets)

    def check_targets(self, plan: Plan, targets: list[str]) -> None:
        """Raise InputError if it cannot start on these linears."""

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        from budwood_initialisations.compute import initialise

        self._starts = initialise(self, run, model)
        return model

    def find_starts(self, run: Run, model: nn.Module) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
        """Return A [r, in] and B [out, r] of each adapted linear, and what to say about them."""
        raise NotImplementedError

    @hookimpl
    def state_dict(self, run: Run) -> dict[str, Any]:
        parts = {part: {path: factors[i] for path, factors in self._starts.items()} for i, part in enumerate("AB")}
        return {"version": 1, **parts}

    @hookimpl
    def load_state_dict(self, run: Run, state: dict[str, Any]) -> None:
        from budwood_initialisations.compute import restore

        if state["version"] != 1:
            raise InputError(f"{self}: the saved state has version {state['version']}; this one reads version 1.")
        saved: Mapping[str, tuple[Tensor, Tensor]] = {path: (state["A"][path], state["B"][path]) for path in state["A"]}
        self._starts = restore(self, run, saved)


class PiSSA(Initialisation):
    """PiSSA: starts from the weights' principal singular vectors (Meng et al., 2024)."""

    Options = own.PiSSAOptions

    def find_starts(self, run: Run, model: nn.Module) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
        from budwood_initialisations.compute import from_weights

        count = self.options.iterations
        return from_weights(run, model, f"pissa_niter_{count}" if count else "pissa")


class OLoRA(Initialisation):
    """OLoRA: starts from the first columns and rows of the weights' QR decomposition (Büyükakyüz, 2024)."""

    def find_starts(self, run: Run, model: nn.Module) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
        from budwood_initialisations.compute import from_weights

        return from_weights(run, model, "olora")


class CorDA(Initialisation):
    """CorDA: starts from the weights' singular vectors, oriented by the data's activations (Yang et al., 2024)."""

    Options = own.CorDAOptions

    def find_starts(self, run: Run, model: nn.Module) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
        from budwood_initialisations.compute import from_covariance

        return from_covariance(self, run, model)


class EVA(Initialisation):
    """EVA: A starts from the activations' principal components, which share out ranks (Paischer et al., 2024)."""

    Options = own.EVAOptions
    subtracts = False
    with_dora = True

    def find_starts(self, run: Run, model: nn.Module) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
        from budwood_initialisations.compute import from_activations

        return from_activations(self, run, model)


class LoRAGA(Initialisation):
    """LoRA-GA: starts from the singular vectors of the weights' gradient (Wang et al., 2024)."""

    Options = own.LoRAGAOptions
    directions = 2
    conflicts = ("adalora", "objective", "grpo")

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        from budwood import Task

        if plan.task is not None and type(plan.task).token_terms is not Task.token_terms:
            plan.problem(self, f"{plan.task} has no loss of single labels, whose gradient it needs: use pissa or eva.")
        super().check_plan(plan)

    def find_starts(self, run: Run, model: nn.Module) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
        from budwood_initialisations.compute import from_gradients

        return from_gradients(self, run, model)


class LoftQ(Initialisation):
    """LoftQ: starts as the nearest low-rank update to the base's quantisation error (Li et al., 2023)."""

    Options = own.LoftQOptions
    subtracts = False

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        if plan.recipe.base.quantization == "none":
            plan.problem(self, "base.quantization is none, so there is no error to start from: quantise, or use pissa.")
        super().check_plan(plan)

    def check_targets(self, plan: Plan, targets: list[str]) -> None:
        from budwood import OriginalWeights

        assert plan.model is not None
        weights = OriginalWeights(plan.model, plan.recipe.base.model)
        for path in targets:
            weights.check(path)

    def find_starts(self, run: Run, model: nn.Module) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
        from budwood_initialisations.compute import from_residual

        run.starts_as_base = False
        return from_residual(self, run, model)

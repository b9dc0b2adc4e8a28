"""PEFT's methods as strategies.

Torch and PEFT take seconds to import, so they are imported in the hooks: invalid options are refused before that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from budwood import InputError, Strategy, hookimpl, linear_shape
from budwood_peft_methods import options as own
from budwood_peft_methods.rules import COLUMNS, FACTOR, LINEAR, POSITIONS, ROWS, Sum

if TYPE_CHECKING:
    from torch import Tensor, nn

    from budwood import LiveAdapter, ParameterGroup, Plan, Run
    from budwood_peft_methods.adapter import Placed


class PeftMethod(Strategy):
    """A method of PEFT, computed by PEFT's own layers on the frozen base.

    Attributes:
        peft_config: the name of PEFT's config class.
        transposed: whether PEFT adapts linears that store their weight as [in, out], such as GPT-2's.
        decays: whether weight decay may pull the parameters to zero.
        OTHER_FIELDS: fields of PEFT's config that the strategy reads itself.
        RATIOS: learning rates of parameters, by a part of their names, as ratios to the strategy's.
    """

    Options: ClassVar[type[own.MethodOptions]] = own.MethodOptions
    api = 2
    slots = ("adapter",)
    peft_config: ClassVar[str] = ""
    transposed: ClassVar[bool] = False
    decays: ClassVar[bool] = True
    OTHER_FIELDS: ClassVar[tuple[str, ...]] = ()
    RATIOS: ClassVar[dict[str, float]] = {}

    def __init__(self, options: Any = None, name: str = "", distribution: str = "") -> None:
        super().__init__(options, name, distribution)
        self._placed: dict[str, Placed] = {}  # by name of the adapter on the model

    @classmethod
    def type_name(cls) -> str:
        """Return the adapter type in PEFT, in lower case, which is also the name of the strategy."""
        return cls.adapter_types[0].lower()

    def module_fields(self, targets: Sequence[str]) -> dict[str, Any]:
        """Return fields of PEFT's config that name modules, for a new adapter on these targets."""
        return {}

    @classmethod
    def saved_module_fields(cls, targets: Sequence[str], feedforward: Any) -> dict[str, Any]:
        """Return fields of PEFT's config that name modules, for a saved adapter on these targets."""
        return {}

    @classmethod
    def continued_options(cls, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        from budwood.lowrank import continued_selection
        from budwood_peft_methods.saved import Saved

        saved = Saved.read(cls, config)
        values = {option: getattr(saved.options, option) for option in cls.Options.FIELDS}
        fixed = {option: value for option, value in values.items() if option not in cls.Options.TRAINING}
        return fixed, continued_selection(config)

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        quantization = plan.recipe.base.quantization
        if self.options.needs_weight and quantization != "none":
            plan.problem(
                self,
                f"{self.name} computes with the base's weight, which a base in {quantization} does not hold: use "
                "quantization: none, or a method that adds to its output.",
            )
        if plan.model is None:
            return
        try:
            self._check_model(plan, plan.model)
        except InputError as error:
            plan.problem(self, str(error))

    def _check_model(self, plan: Plan, model: nn.Module) -> None:
        from budwood.lowrank import planned_targets
        from budwood_peft_methods.adapter import check_transposed
        from budwood_peft_methods.layers import check_weight
        from budwood_peft_methods.saved import Saved

        options, start = self.options, plan.start_adapter
        targets = planned_targets(plan, options, None if start is None else Saved.read(self, start.config).selection)
        check_transposed(self, model, targets)
        self.module_fields(targets)
        if start is not None:
            return
        shapes = {path: linear_shape(model.get_submodule(path)) for path in targets}
        for path, shape in shapes.items():
            if options.needs_weight:
                check_weight(path, model.get_submodule(path), self.name)
            if problem := options.misfit(*shape):
                raise InputError(f"'{path}' cannot be adapted: {problem}.")
        if problem := options.indivisible(shapes):
            raise InputError(f"{problem}.")
        if problem := options.misfit_of_all([*shapes.values()]):
            raise InputError(f"{self.name}: {problem}.")

    @hookimpl
    def prepare_model(self, run: Run, model: nn.Module) -> nn.Module:
        from budwood_peft_methods.adapter import create

        self._run_adapter = create(self, run, model)
        return model

    @hookimpl
    def trainable_parameters(self, run: Run, model: nn.Module) -> list[ParameterGroup]:
        from budwood_peft_methods.adapter import parameter_groups

        return parameter_groups(self, self._run_adapter, model)

    @hookimpl
    def export(self, run: Run, model: nn.Module, directory: Path) -> None:
        from budwood_peft_methods.adapter import write

        write(self._run_adapter, model, directory)

    @hookimpl
    def attach_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
        from budwood_peft_methods.adapter import attach

        self._placed[name] = attach(self, model, config, tensors, name)

    @hookimpl
    def live_adapter(self, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> LiveAdapter:
        from budwood_peft_methods.adapter import live

        return live(self, model, config, tensors)

    @hookimpl
    def use_adapters(self, model: nn.Module, names: Sequence[str], index: Sequence[int]) -> None:
        from budwood.lowrank import select_adapters

        select_adapters(model, self.name, names, index)

    @hookimpl
    def detach_adapter(self, model: nn.Module, name: str) -> None:
        from budwood.lowrank import remove_adapter

        remove_adapter(model, name)
        self._placed.pop(name, None)

    @hookimpl
    def merge_adapter(self, model: nn.Module, name: str) -> None:
        from budwood_peft_methods.adapter import merge

        merge(self._placed.pop(name), model, name)


class Summable(PeftMethod):
    """A method whose sums are of the same method: weighted sums of its adapters' changes are exact.

    Attributes:
        SUM: a tensor's name, or a part of it → how it is summed, and which fields may differ; see `sums.Sum`.
    """

    SUM: ClassVar[Sum]

    @hookimpl
    def combine_adapters(
        self, adapters: Sequence[Any], weights: Sequence[float], base: Callable[[], nn.Module]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        from budwood_peft_methods.sums import combine

        return combine(self, adapters, weights, base)


class LoHa(PeftMethod):
    """LoHa: the Hadamard product of two low-rank updates (Hyeon-Woo et al., 2022)."""

    Options = own.LoHaOptions
    adapter_types = ("LOHA",)
    peft_config = "LoHaConfig"


class LoKr(PeftMethod):
    """LoKr: the Kronecker product of two small matrices (Yeh et al., 2023)."""

    Options = own.LoKrOptions
    adapter_types = ("LOKR",)
    peft_config = "LoKrConfig"


class OFT(PeftMethod):
    """OFT: rotations of blocks of the inputs (Qiu et al., 2023, 2025)."""

    Options = own.OFTOptions
    adapter_types = ("OFT",)
    peft_config = "OFTConfig"


class BOFT(PeftMethod):
    """BOFT: rotations of blocks of the inputs, and a scale for each output (Liu et al., 2024)."""

    Options = own.BOFTOptions
    adapter_types = ("BOFT",)
    peft_config = "BOFTConfig"
    decays = False


class IA3(Summable):
    """(IA)³: a factor for each output, or for each input of feedforward modules (Liu et al., 2022)."""

    Options = own.IA3Options
    adapter_types = ("IA3",)
    peft_config = "IA3Config"
    SUM = Sum({"ia3_l": FACTOR})
    transposed = True
    decays = False
    learning_rate_scale = 15.0  # Liu et al. train with 3e-3
    OTHER_FIELDS = ("feedforward_modules",)

    @classmethod
    def continued_options(cls, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        fixed, defaults = super().continued_options(config)
        feedforward = config.get("feedforward_modules") or []
        if not isinstance(feedforward, list):
            raise InputError("adapter_config.json: feedforward_modules: an expression cannot be continued.")
        return {**fixed, "feedforward": feedforward}, defaults

    def module_fields(self, targets: Sequence[str]) -> dict[str, Any]:
        found: list[str] = []
        for end in self.options.feedforward:
            hits = [path for path in targets if path == end or path.endswith(f".{end}")]
            if not hits:
                from budwood import did_you_mean

                near = did_you_mean(end, sorted({path.rpartition(".")[2] for path in targets}))
                raise InputError(f"feedforward: '{end}' is none of the targets.{near}")
            found += hits
        return {"feedforward_modules": found}

    @classmethod
    def saved_module_fields(cls, targets: Sequence[str], feedforward: Any) -> dict[str, Any]:
        from budwood_peft_methods.saved import chosen_modules

        return {"feedforward_modules": chosen_modules(targets, feedforward, "feedforward_modules")}


class VeRA(PeftMethod):
    """VeRA: two vectors a module, around random projections that all modules share (Kopiczko et al., 2024)."""

    Options = own.VeRAOptions
    adapter_types = ("VERA",)
    peft_config = "VeraConfig"
    transposed = True
    learning_rate_scale = 20.0  # Kopiczko et al. train with 4e-3


class FourierFT(Summable):
    """FourierFT: a few coefficients of the update's Fourier transform (Gao et al., 2024)."""

    Options = own.FourierFTOptions
    adapter_types = ("FOURIERFT",)
    peft_config = "FourierFTConfig"
    SUM = Sum({"fourierft_spectrum": LINEAR})
    transposed = True
    learning_rate_scale = 15.0  # Gao et al. train Llama with 3e-3


class HRA(PeftMethod):
    """HRA: a chain of reflections of the inputs (Yuan et al., 2024)."""

    Options = own.HRAOptions
    adapter_types = ("HRA",)
    peft_config = "HRAConfig"


class MiSS(Summable):
    """MiSS, formerly Bone: one small matrix that blocks of the weight share (Kang et al., 2024)."""

    Options = own.MiSSOptions
    adapter_types = ("MISS",)
    peft_config = "MissConfig"
    SUM = Sum({"miss_block": LINEAR})


class RandLoRA(PeftMethod):
    """RandLoRA: updates of full rank, as sums of scaled random bases (Albert et al., 2025)."""

    Options = own.RandLoRAOptions
    adapter_types = ("RANDLORA",)
    peft_config = "RandLoraConfig"
    transposed = True


class ShiRA(Summable):
    """SHiRA: a few weights at random positions (Bhardwaj et al., 2024)."""

    Options = own.ShiRAOptions
    adapter_types = ("SHIRA",)
    peft_config = "ShiraConfig"
    SUM = Sum({"shira_weight": POSITIONS, "shira_indices": POSITIONS}, free=("r", "random_seed"))


class C3A(Summable):
    """C3A: circulant blocks, which are computed as convolutions (Chen et al., 2024)."""

    Options = own.C3AOptions
    adapter_types = ("C3A",)
    peft_config = "C3AConfig"
    SUM = Sum({"c3a_kernel": LINEAR})


class RoAd(PeftMethod):
    """RoAd: rotations and scales of pairs of outputs (Liao & Monz, 2024)."""

    Options = own.RoAdOptions
    adapter_types = ("ROAD",)
    peft_config = "RoadConfig"
    decays = False


class GraLoRA(PeftMethod):
    """GraLoRA: low-rank updates of the blocks of a weight (Jung et al., 2025)."""

    Options = own.GraLoRAOptions
    adapter_types = ("GRALORA",)
    peft_config = "GraloraConfig"
    transposed = True


class DeLoRA(PeftMethod):
    """DeLoRA: low-rank updates whose directions and norm train apart (Bini et al., 2025)."""

    Options = own.DeLoRAOptions
    adapter_types = ("DELORA",)
    peft_config = "DeloraConfig"

    @hookimpl
    def check_plan(self, plan: Plan) -> None:
        super().check_plan(plan)
        if plan.recipe.train.precision == "fp16":
            plan.problem(
                self,
                "it divides by norms that begin at 1e-4, and the quotient exceeds the largest number of fp16: use "
                "train.precision: bf16 or fp32.",
            )


class HiRA(Summable):
    """HiRA: the product of the weight's elements with those of a low-rank matrix (Huang et al., 2025)."""

    Options = own.HiRAOptions
    adapter_types = ("HIRA",)
    peft_config = "HiraConfig"
    SUM = Sum({"hira_A": ROWS, "hira_B": COLUMNS}, free=("r", "rank_pattern"))

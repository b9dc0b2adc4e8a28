"""The options of PEFT's methods, their names in PEFT's config classes, and the fields that Budwood sets itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from annotated_types import MultipleOf
from pydantic import Field, field_validator, model_validator

from budwood import Layers, ModulesToSave, Options, Targets

RANK = 4096
"""Largest rank."""
SIZE = 1 << 20
"""Largest number of blocks, vectors or elements of a block."""


class MethodOptions(Options):
    """Options common to all methods that adapt linear modules.

    Attributes:
        FIELDS: the option's name in PEFT's config, for those of the method itself.
        TRAINING: options that only affect training, and need not be those of an adapter that a run continues.
        INIT: fields of PEFT's config with the value that a new adapter gets; what a file says there has no effect.
        ONLY: fields with the only supported value, and why.
        PATTERNS: fields that map modules to values of their own, which a file may have.
        DIVISORS: options that divide sizes of all adapted linears, unless they are 0: of inputs, of outputs or both.
        other_names: see `Options`: those of PEFT's config.
    """

    targets: Targets = "all-linear"
    layers: Layers = None
    modules_to_save: ModulesToSave = []

    FIELDS: ClassVar[dict[str, str]] = {}
    TRAINING: ClassVar[frozenset[str]] = frozenset()
    INIT: ClassVar[dict[str, Any]] = {"init_weights": True}
    ONLY: ClassVar[dict[str, tuple[Any, str]]] = {}
    PATTERNS: ClassVar[tuple[str, ...]] = ()
    DIVISORS: ClassVar[dict[str, tuple[str, ...]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        cls.other_names = {field: option for option, field in cls.FIELDS.items() if field != option}

    def fields(self) -> dict[str, Any]:
        """Return the fields of PEFT's config that belong to the method."""
        own = {field: getattr(self, option) for option, field in self.FIELDS.items()}
        return own | self.INIT | {field: value for field, (value, _) in self.ONLY.items()}

    def misfit(self, outputs: int, inputs: int) -> str:
        """Return why the method cannot adapt a linear of this shape; "": it can."""
        return ""

    def misfit_of_all(self, shapes: Sequence[tuple[int, int]]) -> str:
        """Return why the method cannot adapt linears [out, in] of these shapes together; "": it can."""
        return ""

    def indivisible(self, shapes: Mapping[str, tuple[int, int]]) -> str:
        """Return which linear has a size that an option of `DIVISORS` does not divide; "": there is none.

        Args:
            shapes: [out, in] of the linears, by full name.
        """
        for option, sides in self.DIVISORS.items():
            value = getattr(self, option)
            sizes = {
                (path, side): size
                for path, shape in shapes.items()
                for side, size in zip(("output", "input"), shape, strict=True)
                if side in sides
            }
            for (path, side), size in sizes.items() if value else ():
                if size % value:
                    field = type(self).model_fields[option]
                    step = next((m.multiple_of for m in field.metadata if isinstance(m, MultipleOf)), 1)
                    common = math.gcd(*sizes.values())
                    fits = [n for n in range(2, min(value, common) + 1) if common % n == 0 and n % step == 0]
                    remedy = f"{fits[-1]} divides all" if fits else "name targets whose sizes have a common divisor"
                    return (
                        f"'{path}' cannot be adapted: {option} {value} does not divide its {side} size {size}; {remedy}"
                    )
        return ""

    @property
    def needs_weight(self) -> bool:
        """Whether the method computes with the base's weight itself, which a quantised base does not hold."""
        return False


def dropout_of(what: str) -> Any:
    """Return the option of a dropout on what is named."""
    return Field(0.0, ge=0, lt=1, description=f"dropout on {what}")


LYCORIS_INIT = {"init_weights": True, "use_effective_conv2d": False, "module_dropout": 0.0}
"""`module_dropout` skips whole modules at random: the cost of such a step cannot be planned."""


class LoHaOptions(MethodOptions):
    """Options of `loha`; names in brackets are those in PEFT's LoHaConfig."""

    rank: int = Field(8, ge=1, le=RANK, description="rank of both factors of the product (r)")
    alpha: int = Field(8, ge=1, description="scale of the update: alpha / rank")
    rank_dropout: float = dropout_of("rows of the update")

    FIELDS = {"rank": "r", "alpha": "alpha", "rank_dropout": "rank_dropout"}
    TRAINING = frozenset({"rank_dropout"})
    INIT = LYCORIS_INIT
    PATTERNS = ("rank_pattern", "alpha_pattern")


class LoKrOptions(MethodOptions):
    """Options of `lokr`; names in brackets are those in PEFT's LoKrConfig."""

    rank: int = Field(8, ge=1, le=RANK, description="rank of the factors that are decomposed (r)")
    alpha: int = Field(8, ge=1, description="scale of the update: alpha / rank")
    decompose_both: bool = Field(False, description="decompose the left factor too, if it is larger than twice rank")
    decompose_factor: int = Field(
        -1, ge=-1, le=SIZE, description="size of the left factor; -1: near the square root of the module's"
    )
    rank_dropout: float = dropout_of("rows of the update")
    rank_dropout_scale: bool = Field(False, description="divide by the share of rows that rank_dropout keeps")

    FIELDS = {
        "rank": "r", "alpha": "alpha", "decompose_both": "decompose_both", "decompose_factor": "decompose_factor",
        "rank_dropout": "rank_dropout", "rank_dropout_scale": "rank_dropout_scale",
    }  # fmt: skip
    TRAINING = frozenset({"rank_dropout", "rank_dropout_scale"})
    INIT = LYCORIS_INIT
    PATTERNS = ("rank_pattern", "alpha_pattern")

    @model_validator(mode="after")
    def _factor(self) -> LoKrOptions:
        if self.decompose_factor == 0:
            raise ValueError("decompose_factor 0: must be -1 or positive")
        return self

    def misfit(self, outputs: int, inputs: int) -> str:
        from peft.tuners.lokr.layer import factorization

        largest = max(max(factorization(size, self.decompose_factor)) for size in (outputs, inputs))
        if self.rank > largest:
            return f"rank {self.rank} is above the size of its factors, {largest}: with that they train whole"
        return ""


class OFTOptions(MethodOptions):
    """Options of `oft`; names in brackets are those in PEFT's OFTConfig."""

    block_size: int = Field(
        32, ge=0, le=SIZE, description="size of a rotation's blocks (oft_block_size); 0: see blocks"
    )
    blocks: int = Field(0, ge=0, le=SIZE, description="number of blocks per module (r), if block_size is 0")
    block_share: bool = Field(False, description="all blocks of a module share one rotation")
    cayley_neumann: bool = Field(
        True, description="approximate the Cayley transform by its series (use_cayley_neumann)"
    )
    cayley_terms: int = Field(5, ge=2, le=64, description="terms of this series (num_cayley_neumann_terms)")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of blocks that do not rotate in a step (module_dropout)")

    FIELDS = {
        "block_size": "oft_block_size", "blocks": "r", "block_share": "block_share", "dropout": "module_dropout",
        "cayley_neumann": "use_cayley_neumann", "cayley_terms": "num_cayley_neumann_terms",
    }  # fmt: skip
    TRAINING = frozenset({"dropout"})
    INIT = {"init_weights": True, "eps": 6e-5}
    ONLY = {"coft": (False, "it changes the weights in every forward pass")}
    DIVISORS = {"block_size": ("input",), "blocks": ("input",)}

    @model_validator(mode="after")
    def _one_of_both(self) -> OFTOptions:
        return _one_of(self, "block_size", "blocks")


class BOFTOptions(MethodOptions):
    """Options of `boft`; names in brackets are those in PEFT's BOFTConfig."""

    block_size: int = Field(4, ge=0, le=SIZE, description="size of a rotation's blocks (boft_block_size)")
    blocks: int = Field(
        0, ge=0, le=SIZE, description="number of blocks per module (boft_block_num), if block_size is 0"
    )

    FIELDS = {"block_size": "boft_block_size", "blocks": "boft_block_num"}
    INIT = {"init_weights": True, "boft_dropout": 0.0}
    ONLY = {
        "boft_n_butterfly_factor": (1, "without PEFT's CUDA extension PEFT takes 1 instead, without an error"),
    }
    DIVISORS = {"block_size": ("input",), "blocks": ("input",)}

    @model_validator(mode="after")
    def _one_of_both(self) -> BOFTOptions:
        return _one_of(self, "block_size", "blocks")


class IA3Options(MethodOptions):
    """Options of `ia3`; names in brackets are those in PEFT's IA3Config."""

    feedforward: list[str] = Field(
        [], description="those of the targets whose inputs are scaled instead of their outputs (feedforward_modules)"
    )

    INIT = {"init_ia3_weights": True}


class VeRAOptions(MethodOptions):
    """Options of `vera`; names in brackets are those in PEFT's VeraConfig."""

    rank: int = Field(256, ge=1, le=RANK, description="rank of the frozen random projections (r)")
    seed: int = Field(0, ge=0, description="seed of the projections (projection_prng_key)")
    save_projection: bool = Field(True, description="save the projections with the adapter: they can differ elsewhere")
    d_initial: float = Field(0.1, description="initial value of the inner vectors")
    dropout: float = dropout_of("the adapter's input (vera_dropout)")

    FIELDS = {
        "rank": "r", "seed": "projection_prng_key", "save_projection": "save_projection", "d_initial": "d_initial",
        "dropout": "vera_dropout",
    }  # fmt: skip
    TRAINING = frozenset({"dropout", "d_initial"})

    @model_validator(mode="after")
    def _trains(self) -> VeRAOptions:
        if self.d_initial == 0:
            raise ValueError("d_initial 0: both vectors would start at 0, where neither has a gradient")
        return self


class FourierFTOptions(MethodOptions):
    """Options of `fourierft`; names in brackets are those in PEFT's FourierFTConfig."""

    frequencies: int = Field(1000, ge=1, description="number of trained coefficients per module (n_frequency)")
    scaling: float = Field(150.0, gt=0, description="scale of the update")
    seed: int = Field(777, ge=0, description="seed of the frequencies' positions (random_loc_seed)")

    FIELDS = {"frequencies": "n_frequency", "scaling": "scaling", "seed": "random_loc_seed"}
    PATTERNS = ("n_frequency_pattern",)

    def misfit(self, outputs: int, inputs: int) -> str:
        most = outputs * inputs
        return f"frequencies {self.frequencies} is above its {most} elements" if self.frequencies > most else ""


class HRAOptions(MethodOptions):
    """Options of `hra`; names in brackets are those in PEFT's HRAConfig."""

    rank: int = Field(8, ge=1, le=RANK, description="number of reflections, an even one: they start in pairs (r)")

    FIELDS = {"rank": "r"}
    ONLY = {"apply_GS": (False, "PEFT starts with pairs of equal vectors, which have no orthogonal basis")}

    def misfit(self, outputs: int, inputs: int) -> str:
        if self.rank % 2:
            return f"rank {self.rank} is odd, but reflections start in pairs that cancel: use an even one"
        return ""


class MiSSOptions(MethodOptions):
    """Options of `miss`; names in brackets are those in PEFT's MissConfig."""

    rank: int = Field(64, ge=1, le=RANK, description="number of sums that the inputs are folded to (r)")
    variant: Literal["balanced", "bat", "mini"] = Field(
        "balanced", description="balanced, bat (Bone: the update depends on the weight) or mini (init_weights)"
    )
    mini_rank: int = Field(1, ge=1, le=SIZE, description="number of different outputs with variant: mini (mini_r)")
    dropout: float = dropout_of("the adapter's input (miss_dropout)")

    FIELDS = {"rank": "r", "variant": "init_weights", "mini_rank": "mini_r", "dropout": "miss_dropout"}
    TRAINING = frozenset({"dropout"})
    INIT: ClassVar[dict[str, Any]] = {}

    def fields(self) -> dict[str, Any]:
        return super().fields() | {"init_weights": True if self.variant == "balanced" else self.variant}

    def misfit(self, outputs: int, inputs: int) -> str:
        if self.rank > inputs:
            return f"rank {self.rank} is above its {inputs} inputs"
        if self.variant == "bat" and (inputs % self.rank or outputs % self.rank):
            return f"with variant: bat its {outputs} outputs and {inputs} inputs must be multiples of rank {self.rank}"
        if self.variant == "mini" and outputs % self.mini_rank:
            return f"with variant: mini its {outputs} outputs must be a multiple of mini_rank {self.mini_rank}"
        return ""

    @property
    def needs_weight(self) -> bool:
        return self.variant == "bat"


class RandLoRAOptions(MethodOptions):
    """Options of `randlora`; names in brackets are those in PEFT's RandLoraConfig."""

    rank: int = Field(32, ge=1, le=RANK, description="rank of each random basis (r); smaller bases train more")
    alpha: int = Field(640, ge=1, description="scale of the update: alpha / rank (randlora_alpha)")
    seed: int = Field(0, ge=0, description="seed of the bases (projection_prng_key)")
    save_projection: bool = Field(True, description="save the bases with the adapter: they can differ elsewhere")
    sparse: bool = Field(False, description="ternary bases, of which a third is not zero")
    very_sparse: bool = Field(False, description="ternary bases, of which 1 / sqrt(size) is not zero")
    dropout: float = dropout_of("the adapter's input (randlora_dropout)")

    FIELDS = {
        "rank": "r", "alpha": "randlora_alpha", "seed": "projection_prng_key", "save_projection": "save_projection",
        "sparse": "sparse", "very_sparse": "very_sparse", "dropout": "randlora_dropout",
    }  # fmt: skip
    TRAINING = frozenset({"dropout"})


class ShiRAOptions(MethodOptions):
    """Options of `shira`; names in brackets are those in PEFT's ShiraConfig."""

    rank: int = Field(32, ge=1, le=RANK, description="trains as many weights as LoRA of this rank (r)")
    seed: int | None = Field(None, ge=0, description="seed of the weights' positions (random_seed); absent: the run's")

    FIELDS = {"rank": "r", "seed": "random_seed"}
    ONLY = {"mask_type": ("random", "PEFT has no other")}

    def misfit(self, outputs: int, inputs: int) -> str:
        wanted, most = self.rank * (outputs + inputs), outputs * inputs
        return f"rank {self.rank} trains {wanted} of its {most} weights" if wanted > most else ""


class C3AOptions(MethodOptions):
    """Options of `c3a`; names in brackets are those in PEFT's C3AConfig."""

    block_size: int = Field(256, ge=1, le=SIZE, description="size of the circulant blocks, which divides every size")

    FIELDS = {"block_size": "block_size"}
    PATTERNS = ("block_size_pattern",)
    DIVISORS = {"block_size": ("input", "output")}


class RoAdOptions(MethodOptions):
    """Options of `road`; names in brackets are those in PEFT's RoadConfig."""

    variant: Literal["road_1", "road_2", "road_4"] = Field(
        "road_1", description="angles and scales for each pair of outputs: one, two or four of each"
    )
    group_size: int = Field(64, ge=2, le=SIZE, multiple_of=2, description="outputs that are paired among themselves")

    FIELDS = {"variant": "variant", "group_size": "group_size"}
    DIVISORS = {"group_size": ("output",)}


class GraLoRAOptions(MethodOptions):
    """Options of `gralora`; names in brackets are those in PEFT's GraloraConfig."""

    rank: int = Field(32, ge=1, le=RANK, description="rank of every block's update (r), a multiple of blocks")
    hybrid_rank: int = Field(0, ge=0, le=RANK, description="rank of a plain LoRA update beside it (hybrid_r)")
    alpha: int = Field(64, ge=1, description="scale of the update: alpha / (rank + hybrid_rank)")
    blocks: int = Field(2, ge=1, le=SIZE, description="the weight is divided into blocks × blocks (gralora_k)")
    dropout: float = dropout_of("the adapter's input (gralora_dropout)")

    FIELDS = {
        "rank": "r", "hybrid_rank": "hybrid_r", "alpha": "alpha", "blocks": "gralora_k", "dropout": "gralora_dropout",
    }  # fmt: skip
    TRAINING = frozenset({"dropout"})
    DIVISORS = {"blocks": ("input", "output")}

    def misfit(self, outputs: int, inputs: int) -> str:
        if self.rank % self.blocks:
            return f"rank {self.rank} is no multiple of blocks {self.blocks}"
        return ""


class DeLoRAOptions(MethodOptions):
    """Options of `delora`; names in brackets are those in PEFT's DeloraConfig."""

    rank: int = Field(8, ge=1, le=RANK, description="rank of every update (r)")
    bound: int = Field(
        15, ge=1, description="bound on the norm of an update, in norms of the weight's columns; trains (delora_lambda)"
    )
    dropout: float = dropout_of("the adapter's input (module_dropout)")

    FIELDS = {"rank": "r", "bound": "delora_lambda", "dropout": "module_dropout"}
    TRAINING = frozenset({"dropout", "bound"})
    PATTERNS = ("rank_pattern", "lambda_pattern")


class HiRAOptions(MethodOptions):
    """Options of `hira`; names in brackets are those in PEFT's HiRAConfig."""

    rank: int = Field(32, ge=1, le=RANK, description="rank of the matrix that multiplies the weight's elements (r)")
    dropout: float = dropout_of("the adapter's input (hira_dropout)")

    FIELDS = {"rank": "r", "dropout": "hira_dropout"}
    TRAINING = frozenset({"dropout"})
    PATTERNS = ("rank_pattern",)


def _one_of(options: Any, first: str, second: str) -> Any:
    given = [bool(getattr(options, name)) for name in (first, second)]
    if given == [True, True] and second in options.model_fields_set:
        raise ValueError(f"give {first} or {second}: with {second}, set {first} to 0")
    if given == [False, False]:
        raise ValueError(f"{first} and {second} are both 0")
    return options


class LNTuningOptions(Options):
    """Options of `ln_tuning`."""

    targets: list[str] | Literal["all-norms"] = Field(
        "all-norms", description="all-norms, or a list of names of norms or last components of names"
    )
    modules_to_save: ModulesToSave = []


class TrainableTokensOptions(Options):
    """Options of `trainable_tokens`."""

    tokens: list[int] = Field([], description="ids of the tokens whose embeddings train (token_indices)")

    @field_validator("tokens")
    @classmethod
    def _ids(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value) or any(token < 0 for token in value):
            raise ValueError("token ids must be different and not negative")
        return value

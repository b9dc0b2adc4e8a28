"""The options of PEFT's later methods; see options.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator, model_validator

from budwood_peft_methods.options import RANK, SIZE, MethodOptions, dropout_of

WAVELETS = tuple(
    f"{family}{order}"
    for family, first, last in (("db", 1, 38), ("sym", 2, 20), ("coif", 1, 17))
    for order in range(first, last + 1)
)
"""The wavelets of WaveFT in PEFT, by their names in PyWavelets."""


class VBLoRAOptions(MethodOptions):
    """Options of `vblora`; names in brackets are those in PEFT's VBLoRAConfig."""

    rank: int = Field(4, ge=1, le=RANK, description="rank of every update (r)")
    vectors: int = Field(256, ge=2, le=SIZE, description="size of the bank that all modules share (num_vectors)")
    vector_length: int = Field(256, ge=1, le=SIZE, description="length of its vectors, which divides every size")
    topk: int = Field(2, ge=1, le=64, description="vectors in each mixture: 2, 4, 8, …, of which pairs cancel at first")
    bank_bound: float = Field(
        0.02, gt=0, le=1, description="bound on the bank's elements at the start (init_vector_bank_bound)"
    )
    logits_std: float = Field(
        0.1, ge=0, le=10, description="standard deviation of the logits at the start (init_logits_std)"
    )
    dropout: float = dropout_of("the adapter's input (vblora_dropout)")

    FIELDS = {
        "rank": "r", "vectors": "num_vectors", "vector_length": "vector_length", "topk": "topk",
        "bank_bound": "init_vector_bank_bound", "logits_std": "init_logits_std", "dropout": "vblora_dropout",
    }  # fmt: skip
    TRAINING = frozenset({"dropout", "bank_bound", "logits_std"})
    INIT = {}
    ONLY = {"save_only_topk_weights": (False, "such a file has no logits, which training and combining need")}
    DIVISORS = {"vector_length": ("input", "output")}

    def misfit(self, outputs: int, inputs: int) -> str:
        if self.topk < 2 or self.topk & (self.topk - 1):
            return f"topk {self.topk} is none of 2, 4, 8, …, with which the mixtures cancel exactly at the start"
        if self.topk > self.vectors:
            return f"topk {self.topk} is above the number of vectors {self.vectors}"
        return ""


class WaveFTOptions(MethodOptions):
    """Options of `waveft`; names in brackets are those in PEFT's WaveFTConfig."""

    frequencies: int = Field(2592, ge=1, description="number of trained coefficients per module (n_frequency)")
    proportional: bool = Field(
        False, description="this number on average, in proportion to the modules' sizes (proportional_parameters)"
    )
    scaling: float = Field(25.0, gt=0, description="scale of the update")
    wavelet: str = Field("db1", description="db1 … db38, sym2 … sym20 or coif1 … coif17 (wavelet_family)")
    transform: bool = Field(True, description="false: the coefficients are elements of the update itself (use_idwt)")
    seed: int = Field(777, ge=0, description="seed of the coefficients' positions (random_loc_seed)")

    FIELDS = {
        "frequencies": "n_frequency", "proportional": "proportional_parameters", "scaling": "scaling",
        "wavelet": "wavelet_family", "transform": "use_idwt", "seed": "random_loc_seed",
    }  # fmt: skip
    PATTERNS = ("n_frequency_pattern",)

    @field_validator("wavelet")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in WAVELETS:
            from budwood import did_you_mean

            near = did_you_mean(value, WAVELETS)
            raise ValueError(f"wavelet '{value}': must be db1 … db38, sym2 … sym20 or coif1 … coif17.{near}")
        return value

    def misfit(self, outputs: int, inputs: int) -> str:
        most = outputs * inputs
        if self.frequencies > most and not self.proportional:
            return f"frequencies {self.frequencies} is above its {most} elements"
        return ""

    def misfit_of_all(self, shapes: Sequence[tuple[int, int]]) -> str:
        mean = sum(outputs * inputs for outputs, inputs in shapes) / len(shapes)
        if self.proportional and self.frequencies > mean:
            return f"frequencies {self.frequencies} is above the {mean:.0f} elements of a module on average"
        return ""


class SupertuningOptions(MethodOptions):
    """Options of `supertuning`; names in brackets are those in PEFT's SupertuningConfig."""

    sparsity: float = Field(0.99, ge=0, lt=1, description="share of the weights that stay as they are")
    select_top: bool = Field(True, description="train the largest weights; false: the smallest")
    rank: int | None = Field(None, ge=1, le=RANK, description="rank of a LoRA update beside them (r); absent: none")
    alpha: float | None = Field(
        None, gt=0, description="scale of the LoRA update: alpha / rank (lora_alpha); absent: 2 × rank"
    )
    dropout: float = dropout_of("the LoRA update's input (lora_dropout)")

    FIELDS = {
        "sparsity": "sparsity", "select_top": "select_top", "rank": "r", "alpha": "lora_alpha",
        "dropout": "lora_dropout",
    }  # fmt: skip
    TRAINING = frozenset({"dropout"})
    ONLY = {"save_precomputed_indices": (True, "positions found anew in a quantised or rounded base would be others")}

    @model_validator(mode="after")
    def _together(self) -> SupertuningOptions:
        if self.rank is None and self.alpha is not None:
            raise ValueError("alpha is that of a LoRA update: give rank too")
        return self

    def misfit(self, outputs: int, inputs: int) -> str:
        if self.rank is None and self.dropout:
            return "dropout is that of a LoRA update: give rank too"
        if int(outputs * inputs * (1 - self.sparsity)) < 1:
            return f"sparsity {self.sparsity} leaves none of its {outputs * inputs} weights to train"
        return ""


class TinyLoRAOptions(MethodOptions):
    """Options of `tinylora`; names in brackets are those in PEFT's TinyLoraConfig."""

    rank: int = Field(2, ge=1, le=RANK, description="number of the weight's singular directions (r)")
    size: int = Field(64, ge=1, le=SIZE, description="number of trained values of a group of modules (u)")
    tying: float = Field(
        0.0, ge=0, le=1, description="0: each module has its own values; 1: all share them (weight_tying)"
    )
    seed: int = Field(42, ge=0, description="seed of the projections (projection_seed)")
    save_projection: bool = Field(True, description="save the projections with the adapter: they can differ elsewhere")
    dropout: float = dropout_of("the adapter's input (tinylora_dropout)")

    FIELDS = {
        "rank": "r", "size": "u", "tying": "weight_tying", "seed": "projection_seed",
        "save_projection": "save_projection", "dropout": "tinylora_dropout",
    }  # fmt: skip
    TRAINING = frozenset({"dropout"})
    INIT = {"init_weights": True, "init_v_bound": 0.02}

    def misfit(self, outputs: int, inputs: int) -> str:
        most = min(outputs, inputs)
        return f"rank {self.rank} is above its {most} singular directions" if self.rank > most else ""


class PEANuTOptions(MethodOptions):
    """Options of `peanut`; names in brackets are those in PEFT's PeanutConfig."""

    rank: int = Field(32, ge=1, le=RANK, description="width of the network that maps the weight to its update (r)")
    depth: int = Field(0, ge=0, le=64, description="its hidden layers on each side")
    activation: Literal[
        "relu", "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
        "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu2", "relu6",
        "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh",
    ] = Field("relu", description="its activation, by its name in transformers (act_fn)")  # fmt: skip
    scaling: float = Field(1.0, gt=0, description="scale of the update")

    FIELDS = {"rank": "r", "depth": "depth", "activation": "act_fn", "scaling": "scaling"}


class GLoRAOptions(MethodOptions):
    """Options of `glora`; names in brackets are those in PEFT's GloraConfig."""

    rank: int = Field(8, ge=1, le=RANK, description="rank of the parts that are lora (r)")
    weight: Literal["lora", "vector", "constant", "none"] = Field(
        "lora", description="what scales and shifts the weight: low-rank, per output, or one number (config_A_B)"
    )
    coupling: Literal["lora", "vector", "none"] = Field(
        "lora", description="what adds a product with the weight to the bias (config_C)"
    )
    bias: Literal["vector", "constant", "none"] = Field(
        "constant", description="what scales and shifts the bias (config_D_E)"
    )

    FIELDS = {"rank": "r", "weight": "config_A_B", "coupling": "config_C", "bias": "config_D_E"}

    @model_validator(mode="after")
    def _trains(self) -> GLoRAOptions:
        if (self.weight, self.coupling, self.bias) == ("none", "none", "none"):
            raise ValueError("weight, coupling and bias are all none: nothing would train")
        return self

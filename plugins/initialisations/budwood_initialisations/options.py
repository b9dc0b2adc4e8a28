"""The options of the initialisations."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from budwood import Options


class PiSSAOptions(Options):
    """Options of `pissa`."""

    iterations: int = Field(
        0, ge=0, le=64, description="power iterations of a randomised SVD (pissa_niter_N in PEFT); 0: the exact SVD"
    )


class SampleOptions(Options):
    """Options of an initialisation that looks at training examples."""

    examples: int = Field(64, ge=1, le=65536, description="training examples that it looks at, drawn with the seed")


class CorDAOptions(SampleOptions):
    """Options of `corda`; names in brackets are those in PEFT's CordaConfig."""

    mode: Literal["ipm", "kpm"] = Field(
        "ipm",
        description="ipm: train the directions that the data uses most; kpm: those that it uses least, which keeps "
        "what the base knows about the data (corda_method)",
    )


class EVAOptions(SampleOptions):
    """Options of `eva`; names in brackets are those in PEFT's EvaConfig."""

    rho: float = Field(
        2.0, ge=1, le=64, description="largest rank of a linear, as a multiple of lora.rank; 1: all keep lora.rank"
    )
    labels_only: bool = Field(
        True, description="look only at the positions whose outputs are scored, not at prompts (use_label_mask)"
    )
    whiten: bool = Field(False, description="divide each direction by the root of its singular value")


class LoRAGAOptions(SampleOptions):
    """Options of `lora-ga`; names are those in PEFT's LoraGAConfig."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = Field(
        "ArB2r", description="which singular vectors of the gradient A and B take: alternating, the second or first r"
    )
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = Field("stable", description="scale of the start")
    stable_gamma: int = Field(16, ge=1, description="gamma of scale: stable")


class LoftQOptions(Options):
    """Options of `loftq`."""

    examples: int = Field(
        4, ge=0, le=4096, description="training examples on which the outputs' error is measured; 0: not measured"
    )

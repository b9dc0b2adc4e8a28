"""PEFT's methods other than LoRA as strategies, computed by PEFT's own layers."""

from budwood_peft_methods.later import GLoRA, PEANuT, Supertuning, TinyLoRA, VBLoRA, WaveFT
from budwood_peft_methods.parts import LNTuning, TrainableTokens
from budwood_peft_methods.strategies import (
    BOFT,
    C3A,
    HRA,
    IA3,
    OFT,
    DeLoRA,
    FourierFT,
    GraLoRA,
    HiRA,
    LoHa,
    LoKr,
    MiSS,
    RandLoRA,
    RoAd,
    ShiRA,
    VeRA,
)

__all__ = [
    "BOFT",
    "C3A",
    "HRA",
    "IA3",
    "OFT",
    "DeLoRA",
    "FourierFT",
    "GraLoRA",
    "HiRA",
    "LNTuning",
    "LoHa",
    "LoKr",
    "MiSS",
    "RandLoRA",
    "RoAd",
    "ShiRA",
    "TrainableTokens",
    "GLoRA",
    "PEANuT",
    "Supertuning",
    "TinyLoRA",
    "VBLoRA",
    "WaveFT",
    "VeRA",
]

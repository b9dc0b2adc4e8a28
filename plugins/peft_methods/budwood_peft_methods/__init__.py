"""PEFT's methods other than LoRA as strategies, computed by PEFT's own layers."""

from budwood_peft_methods.parts import LNTuning, TrainableTokens
from budwood_peft_methods.strategies import (
    BOFT,
    C3A,
    HRA,
    IA3,
    OFT,
    FourierFT,
    GraLoRA,
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
    "FourierFT",
    "GraLoRA",
    "LNTuning",
    "LoHa",
    "LoKr",
    "MiSS",
    "RandLoRA",
    "RoAd",
    "ShiRA",
    "TrainableTokens",
    "VeRA",
]

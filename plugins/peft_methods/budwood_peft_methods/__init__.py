"""PEFT's methods other than LoRA as strategies, computed by PEFT's own layers."""

from budwood_peft_methods.strategies import (
    BOFT,
    C3A,
    HRA,
    IA3,
    OFT,
    FourierFT,
    LNTuning,
    LoHa,
    LoKr,
    MiSS,
    RandLoRA,
    ShiRA,
    TrainableTokens,
    VeRA,
)

__all__ = [
    "BOFT",
    "C3A",
    "HRA",
    "IA3",
    "OFT",
    "FourierFT",
    "LNTuning",
    "LoHa",
    "LoKr",
    "MiSS",
    "RandLoRA",
    "ShiRA",
    "TrainableTokens",
    "VeRA",
]

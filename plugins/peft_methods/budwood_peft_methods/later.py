"""PEFT's later methods as strategies; see strategies.py."""

from __future__ import annotations

from budwood_peft_methods import later_options as own
from budwood_peft_methods.strategies import PeftMethod


class VBLoRA(PeftMethod):
    """VB-LoRA: low-rank updates composed of vectors from one bank (Li et al., 2024)."""

    Options = own.VBLoRAOptions
    adapter_types = ("VBLORA",)
    peft_config = "VBLoRAConfig"
    transposed = True
    decays = False
    learning_rate_scale = 50.0  # Li et al. train the logits with 1e-2, and the vectors with 1e-3
    RATIOS = {"vector_bank": 0.1}


class WaveFT(PeftMethod):
    """WaveFT: a few coefficients of the update's wavelet transform (Bilican et al., 2025)."""

    Options = own.WaveFTOptions
    adapter_types = ("WAVEFT",)
    peft_config = "WaveFTConfig"
    transposed = True


class Supertuning(PeftMethod):
    """Super-Tuning: the largest of the weights, and a LoRA update beside them (Supra) on request."""

    Options = own.SupertuningOptions
    adapter_types = ("SUPERTUNING",)
    peft_config = "SupertuningConfig"


class TinyLoRA(PeftMethod):
    """TinyLoRA: a few numbers that mix random matrices between the weight's largest singular directions."""

    Options = own.TinyLoRAOptions
    adapter_types = ("TINYLORA",)
    peft_config = "TinyLoraConfig"
    transposed = True


class PEANuT(PeftMethod):
    """PEANuT: a small network whose input is the weight and whose output is its update (Zhong et al., 2024)."""

    Options = own.PEANuTOptions
    adapter_types = ("PEANUT",)
    peft_config = "PeanutConfig"


class GLoRA(PeftMethod):
    """GLoRA: low-rank scales and shifts of weights and biases (Chavan et al., 2023)."""

    Options = own.GLoRAOptions
    adapter_types = ("GLORA",)
    peft_config = "GloraConfig"

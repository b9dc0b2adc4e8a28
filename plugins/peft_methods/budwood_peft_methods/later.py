"""PEFT's later methods as strategies; see strategies.py."""

from __future__ import annotations

from budwood_peft_methods import later_options as own
from budwood_peft_methods.rules import COLUMNS, LINEAR, POSITIONS, ROWS, SAME, Sum
from budwood_peft_methods.strategies import PeftMethod, Summable


class VBLoRA(PeftMethod):
    """VB-LoRA: low-rank updates composed of vectors from one bank (Li et al., 2024)."""

    Options = own.VBLoRAOptions
    adapter_types = ("VBLORA",)
    peft_config = "VBLoRAConfig"
    transposed = True
    decays = False
    learning_rate_scale = 50.0  # Li et al. train the logits with 1e-2, and the vectors with 1e-3
    RATIOS = {"vector_bank": 0.1}


class WaveFT(Summable):
    """WaveFT: a few coefficients of the update's wavelet transform (Bilican et al., 2025)."""

    Options = own.WaveFTOptions
    adapter_types = ("WAVEFT",)
    peft_config = "WaveFTConfig"
    SUM = Sum({"waveft_spectrum": LINEAR})
    transposed = True


class Supertuning(Summable):
    """Super-Tuning: the largest of the weights, and a LoRA update beside them (Supra) on request."""

    Options = own.SupertuningOptions
    adapter_types = ("SUPERTUNING",)
    peft_config = "SupertuningConfig"
    SUM = Sum(
        {
            "supertuning_lora_A": ROWS,
            "supertuning_lora_B": COLUMNS,
            "supertuning_values": POSITIONS,
            "supertuning_indices": POSITIONS,
        },
        free=("r", "lora_alpha", "sparsity", "select_top"),
    )


class TinyLoRA(Summable):
    """TinyLoRA: a few numbers that mix random matrices between the weight's largest singular directions."""

    Options = own.TinyLoRAOptions
    adapter_types = ("TINYLORA",)
    peft_config = "TinyLoraConfig"
    SUM = Sum({"tinylora_v": LINEAR, "tinylora_A": SAME, "tinylora_B": SAME, "tinylora_P": SAME}, same_targets=True)
    transposed = True


class PEANuT(PeftMethod):
    """PEANuT: a small network whose input is the weight and whose output is its update (Zhong et al., 2024)."""

    Options = own.PEANuTOptions
    adapter_types = ("PEANUT",)
    peft_config = "PeanutConfig"


class GLoRA(Summable):
    """GLoRA: low-rank scales and shifts of weights and biases (Chavan et al., 2023)."""

    Options = own.GLoRAOptions
    adapter_types = ("GLORA",)
    peft_config = "GloraConfig"
    SUM = Sum({"Xd": COLUMNS, "Xu": ROWS, "zeros": SAME, "X": LINEAR}, free=("r",))

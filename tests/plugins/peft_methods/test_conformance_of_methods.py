"""The conformance kit on PEFT's methods: two in `make test`, all in `make combinations`."""

from __future__ import annotations

import os
from typing import Any

from budwood.testing import StrategyConformance
from budwood_peft_methods import (
    BOFT,
    C3A,
    HRA,
    IA3,
    OFT,
    DeLoRA,
    FourierFT,
    GLoRA,
    GraLoRA,
    HiRA,
    LNTuning,
    LoHa,
    LoKr,
    MiSS,
    PEANuT,
    RandLoRA,
    RoAd,
    ShiRA,
    Supertuning,
    TinyLoRA,
    TrainableTokens,
    VBLoRA,
    VeRA,
    WaveFT,
)

from .methods import EVERYTHING

QUICK = (LoHa, LNTuning)
"""One of each way in which a method is built."""
OPTIONS: dict[Any, dict[str, Any]] = {
    LoHa: {"rank": 2, "alpha": 4},
    LNTuning: {},
    LoKr: {"rank": 2, "alpha": 4},
    OFT: {"block_size": 8},
    BOFT: {},
    IA3: {},
    VeRA: {"rank": 8},
    FourierFT: {"frequencies": 50},
    HRA: {"rank": 4},
    MiSS: {"rank": 8},
    RandLoRA: {"rank": 8, "alpha": 16},
    ShiRA: {"rank": 2},
    C3A: {"block_size": 8},
    RoAd: {"group_size": 8},
    GraLoRA: {"rank": 2},
    DeLoRA: {"rank": 2},
    HiRA: {"rank": 2},
    VBLoRA: {"vectors": 16, "vector_length": 8},
    WaveFT: {"frequencies": 50},
    Supertuning: {"sparsity": 0.98},
    TinyLoRA: {"size": 5},
    PEANuT: {"rank": 4, "depth": 1},
    GLoRA: {"rank": 4},  # with 2, an element's gradient is nearly zero in step 2, and Adam makes a whole step of it
    TrainableTokens: {"tokens": [1, 74, 75, 76]},
}

ELSEWHERE = {
    "two_processes_equal_one": "`make combinations` runs it; make test checks the order in which parameters are drawn"
}

for cls, options in OPTIONS.items():
    if cls in QUICK or os.environ.get(EVERYTHING):
        waived = {} if os.environ.get(EVERYTHING) else ELSEWHERE
        name = f"Test{cls.__name__}"
        globals()[name] = type(
            name, (StrategyConformance,), {"strategy": cls, "options": options, "does_not_apply": waived}
        )
del cls, options

"""The conformance kit on the initialisations: one in `make test`, all in `make combinations`."""

from __future__ import annotations

import os

from budwood.testing import StrategyConformance
from budwood_initialisations import EVA, CorDA, LoRAGA, OLoRA, PiSSA

EVERYTHING = "BUDWOOD_COMBINATIONS"
ELSEWHERE = {"two_processes_equal_one": "`make combinations` runs it"}
COMPANIONS = [{"lora": {"rank": 2, "alpha": 4}}]

for cls, options in {
    PiSSA: {},
    OLoRA: {},
    CorDA: {"examples": 8},
    EVA: {"examples": 8},
    LoRAGA: {"examples": 8},
}.items():
    if cls is PiSSA or os.environ.get(EVERYTHING):
        globals()[f"Test{cls.__name__}"] = type(
            f"Test{cls.__name__}",
            (StrategyConformance,),
            {
                "strategy": cls,
                "options": options,
                "companions": COMPANIONS,
                "does_not_apply": {} if os.environ.get(EVERYTHING) else ELSEWHERE,
            },
        )
del cls, options

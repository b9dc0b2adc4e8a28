"""The conformance kit on every first-party strategy."""

from __future__ import annotations

from typing import Any

from budwood import installed
from budwood.testing import Files, StrategyConformance
from budwood.testing.bench import FIRST_PARTY
from budwood_adalora import AdaLoRA
from budwood_adversarial import Adversarial
from budwood_averaging import EMA, SWA
from budwood_distillation import Distillation
from budwood_grpo import GRPO
from budwood_lora import LoRA
from budwood_optimizers import AdamW8bit
from budwood_preference import CPO, DPO, KTO, ORPO, SimPO

LOW_RANK = {"rank": 2, "alpha": 4}
ELSEWHERE = {
    "composes_with": "`make combinations` trains every combination of adapter, adversary and teacher; averages see none"
}
"""Waiver for the combinations covered there: all adversarial methods, and both tasks."""
TOGETHER = {"composes_with": "`make combinations` trains the objectives with the other strategies"}
SHARED = dict.fromkeys(
    ("two_processes_equal_one", "runs_on", "same_seed_same_bytes", "base_unchanged"),
    "DPO and ORPO are tested, and the objective differs from them only in a function of the log-probabilities",
)


class TestLoRA(StrategyConformance):
    strategy = LoRA
    options = LOW_RANK


class TestDoRA(StrategyConformance):
    strategy = LoRA
    options = {**LOW_RANK, "dora": True, "rslora": True, "init": "gaussian"}


class TestLoRAClassifier(StrategyConformance):
    strategy = LoRA
    options = LOW_RANK
    task = "sequence-classification"
    does_not_apply = ELSEWHERE


class TestAdaLoRA(StrategyConformance):
    strategy = AdaLoRA

    @classmethod
    def make_options(cls, files: Files) -> dict[str, Any]:
        return FIRST_PARTY["adalora"](files)


class TestFGM(StrategyConformance):
    strategy = Adversarial
    options = {"method": "fgm", "epsilon": 0.5}


class TestPGD(StrategyConformance):
    strategy = Adversarial
    options = {"method": "pgd", "epsilon": 0.5, "steps": 2}
    does_not_apply = ELSEWHERE


class TestFreeLB(StrategyConformance):
    strategy = Adversarial
    options = {"method": "freelb", "epsilon": 0.5, "steps": 2}
    does_not_apply = ELSEWHERE


class TestSMART(StrategyConformance):
    strategy = Adversarial
    options = {"method": "smart", "epsilon": 0.01}
    does_not_apply = ELSEWHERE


class TestVAT(StrategyConformance):
    strategy = Adversarial
    options = {"method": "vat", "epsilon": 0.5}
    does_not_apply = ELSEWHERE


class TestNEFTune(StrategyConformance):
    strategy = Adversarial
    options = {"method": "neftune"}
    does_not_apply = ELSEWHERE


class TestDistillation(StrategyConformance):
    strategy = Distillation

    @classmethod
    def make_options(cls, files: Files) -> dict[str, Any]:
        return {"teacher": str(files.teacher), "temperature": 2.0, "weight": 0.4, "hidden_weight": 0.1}


class TestSelfDistillation(StrategyConformance):
    """The teacher is the run's base with the adapter disabled."""

    strategy = Distillation
    options = {"teacher": "base"}


class TestEMA(StrategyConformance):
    strategy = EMA
    options = {"decay": 0.9}


class TestSWA(StrategyConformance):
    """The average is of steps 1 and 3."""

    strategy = SWA
    options = {"start": 0, "every": 2}


class TestAdamW8bit(StrategyConformance):
    strategy = AdamW8bit
    options = {"min_elements": 128}
    does_not_apply = {
        "composes_with": "it sees no other strategy but AdaLoRA, with which it is tested",
        "two_processes_equal_one": "it begins when the gradients of all processes are summed",
    }


class TestDPO(StrategyConformance):
    strategy = DPO
    options = {"sft": 0.2}


class TestDPOCached(StrategyConformance):
    """The reference's log-probabilities are computed before the first step."""

    strategy = DPO
    options = {"loss": "ipo", "reference": "cached"}
    does_not_apply = TOGETHER


class TestKTO(StrategyConformance):
    strategy = KTO


class TestORPO(StrategyConformance):
    strategy = ORPO
    does_not_apply = TOGETHER


class TestSimPO(StrategyConformance):
    strategy = SimPO
    does_not_apply = {**TOGETHER, **SHARED}


class TestCPO(StrategyConformance):
    strategy = CPO
    does_not_apply = {**TOGETHER, **SHARED}


class TestGRPO(StrategyConformance):
    strategy = GRPO
    options = {
        "rewards": [{"length": {"target": 9, "unit": "characters"}}], "samples": 3, "max_new_tokens": 4, "kl": 0.1,
        "iterations": 2,
    }  # fmt: skip


def test_the_kit_composes_with_first_party_strategies() -> None:
    first_party = {
        name for name, entries in installed().items() if any(entry.distribution == "budwood" for entry in entries)
    }
    assert set(FIRST_PARTY) <= first_party

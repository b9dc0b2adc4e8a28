"""The conformance kit on every first-party strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from budwood import installed
from budwood.testing import Files, StrategyConformance, TaskConformance, tiny_decoder, tiny_encoder
from budwood.testing.bench import FIRST_PARTY
from budwood_adalora import AdaLoRA
from budwood_adversarial import Adversarial
from budwood_averaging import EMA, SWA
from budwood_distillation import Distillation
from budwood_grpo import GRPO
from budwood_lora import LoRA
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


WORDS = "games files data model small runtime section terminal library headers".split()  # noqa: SIM905
SENTENCES = [" ".join(WORDS[(3 * i + j) % 10] for j in range(4)) for i in range(12)]


class TestCausalLM(TaskConformance):
    task = "causal-lm"
    rows = [{"prompt": text[:8], "completion": text[8:20]} for text in SENTENCES]


class TestSequenceClassification(TaskConformance):
    task = "sequence-classification"
    rows = [{"text": text[:16], "label": "ab"[i % 2]} for i, text in enumerate(SENTENCES)]


class TestRewardModel(TaskConformance):
    task = "reward-model"
    rows = [{"prompt": text[:8], "chosen": text[8:16], "rejected": text[10:18]} for text in SENTENCES]


class EncoderConformance(TaskConformance):
    __test__ = False
    text = SENTENCES[0]

    @classmethod
    def make_base(cls, folder: Path) -> Path:
        return tiny_encoder(folder, WORDS)


class TestSequenceClassificationOfAnEncoder(EncoderConformance):
    __test__ = True
    task = "sequence-classification"
    rows = TestSequenceClassification.rows


class TestEmbedding(EncoderConformance):
    __test__ = True
    task = "embedding"
    options = {"matryoshka": [8], "temperature": 0.5}
    rows = [
        {"anchor": text, "positive": SENTENCES[i - 1], **({"negative": SENTENCES[i - 2]} if i % 2 else {})}
        for i, text in enumerate(SENTENCES)
    ]


class TestEmbeddingOfADecoder(TaskConformance):
    task = "embedding"
    rows = [{"query": text[:12], "document": text[8:20]} for text in SENTENCES]


def tagged(text: str) -> dict[str, list[str]]:
    """Tag "model" and the word after it as an entity, and "files" as another."""
    words, tags = text.split(), []
    for number, word in enumerate(words):
        after = number and words[number - 1] == "model"
        tags.append("B-M" if word == "model" else "I-M" if after else "B-F" if word == "files" else "O")
    return {"tokens": words, "tags": tags}


class TestTokenClassification(EncoderConformance):
    __test__ = True
    task = "token-classification"
    rows = [tagged(text) for text in SENTENCES]


class TestTokenClassificationOfADecoder(TaskConformance):
    task = "token-classification"
    rows = [tagged(text[:20]) for text in SENTENCES]
    text = "files model data"


class TestSequenceRegression(EncoderConformance):
    __test__ = True
    task = "sequence-regression"
    rows = [{"text": text, "score": (i % 3) / 2} for i, text in enumerate(SENTENCES)]


class TestMaskedLM(EncoderConformance):
    __test__ = True
    task = "masked-lm"
    options = {"share": 0.4}
    rows = [{"text": text} for text in SENTENCES]
    text = "games [MASK] data"


class TestSequenceToSequence(TaskConformance):
    task = "sequence-to-sequence"
    rows = [{"prompt": text[:10], "completion": text[10:18]} for text in SENTENCES]

    @classmethod
    def make_base(cls, folder: Path) -> Path:
        from transformers import T5Config, T5ForConditionalGeneration

        tiny_decoder(folder)  # for its tokenizer
        config = T5Config(
            vocab_size=261, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
            pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, initializer_factor=1.0,
        )  # fmt: skip
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(folder)
        return folder


def test_the_kit_composes_with_first_party_strategies() -> None:
    first_party = {
        name for name, entries in installed().items() if any(entry.distribution == "budwood" for entry in entries)
    }
    assert set(FIRST_PARTY) <= first_party

"""The conformance kit on every first-party task, on encoders, decoders and an encoder-decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.plugins.vision.conformance import (  # noqa: F401  their processes start with those of the tasks below
    TestImageClassification,
    TestMaskedAutoencoder,
    TestMaskedImage,
)

from budwood.testing import TaskConformance, tiny_decoder, tiny_encoder

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


class TestEmbeddingOfPairsWithScores(EncoderConformance):
    __test__ = True
    task = "embedding"
    options = {"temperature": 0.5}
    rows = [{"sentence1": text, "sentence2": SENTENCES[i - 3], "score": i % 5} for i, text in enumerate(SENTENCES)]


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

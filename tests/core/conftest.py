"""Fixtures: plugin distributions that the registry finds, small tokenizers, data files and recipes."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from budwood.recipe.schema import Recipe
from budwood.training.report import Report

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello there, how are you?\n\nI am fine.\n",
    "user assistant system prompt completion question answer yes no maybe\n\n",
    "Question: what is the capital of France?\nAnswer: Paris\n",
] * 3
SPECIAL = [
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|end|>", "<|user|>", "<|assistant|>",
]  # fmt: skip

STRATEGIES = Path(__file__).parents[1] / "strategies"
WORDS = "games section library terminal description runtime shared files data model tokens small headers".split()  # noqa: SIM905

HEAD = "from budwood import Options, Strategy, hookimpl\nfrom pydantic import Field\n"


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Function `distribution(name, source, strategies={"name": "Class"}, …)` -> the folder put on sys.path.

    It makes the module NAME (dashes to underscores) and NAME-1.0.dist-info, as an installer would.
    """
    before = set(sys.modules)

    def make(
        name: str,
        source: str = "",
        strategies: dict[str, str] | None = None,
        group: str = "budwood",
        version: str = "1.0",
    ) -> Path:
        folder = tmp_path / "site" / name
        module = name.replace("-", "_")
        info = folder / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(HEAD + dedent(source), encoding="utf-8")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [f"{key} = {module}:{value}" for key, value in (strategies or {}).items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
        monkeypatch.syspath_prepend(folder)
        return folder

    yield make
    for name in set(sys.modules) - before:
        if "site" in (getattr(sys.modules[name], "__file__", None) or ""):
            module_file = Path(sys.modules[name].__file__ or "")
            if tmp_path in module_file.parents:
                del sys.modules[name]


def _byte_level(bos: bool, template: str | None, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session")
def byte_level() -> Callable[..., PreTrainedTokenizerFast]:
    """Function (bos, template, eos) -> a byte-level BPE tokenizer, like those of GPT-2, Llama 3 and Qwen."""
    made: dict[Any, PreTrainedTokenizerFast] = {}

    def make(bos: bool = True, template: str | None = None, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
        key = (bos, template, eos)
        if key not in made:
            made[key] = _byte_level(bos, template, eos)
        return made[key]

    return make


@pytest.fixture(scope="session")
def sentencepiece() -> PreTrainedTokenizerFast:
    """A BPE tokenizer that prepends a space to every text, like those of Llama 2 and Mistral 7B."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    # SentencePiece never merges across a space, so train on words that each begin with one.
    tokenizer.train_from_iterator([word for text in CORPUS for word in text.split()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def word_piece() -> PreTrainedTokenizerFast:
    """A tokenizer that wraps a text in [CLS] and [SEP], like BERT's; it has no end-of-sequence token."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Function (rows, name) -> path of a JSONL file with these rows."""

    def make(rows: list[Any], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return make


@pytest.fixture
def test_strategies(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put the test strategies' distribution on the path; returns their module."""
    monkeypatch.syspath_prepend(str(STRATEGIES))
    module = importlib.import_module("budwood_test_strategies")
    module.SEEN.clear()
    yield module
    sys.modules.pop("budwood_test_strategies", None)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that runs print with `run.say`."""
    lines: list[str] = []
    monkeypatch.setattr(Report, "say", lambda self, text: lines.append(text))
    return lines


def write_rows(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Write prompt-completion rows of different lengths; the completion depends on the prompt's first word."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.choices(WORDS, k=draw.randint(2, 14))
        rows.append({"prompt": " ".join(words) + ":", "completion": f" {words[0]}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make_recipe(tiny_base: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Function that makes a recipe of a few fp32 steps; `train`, `base`, `strategies`, … replace parts of it."""

    def make(
        output: str = "run", strategies: list[Any] | None = None, evaluate: bool = False, **sections: Any
    ) -> Recipe:
        train = {
            "steps": 4, "batch_examples": 8, "micro_tokens": 512, "learning_rate": 1e-2, "precision": "fp32",
            "schedule": "constant", "warmup": 0, "eval_generate": 0,
        }  # fmt: skip
        data: dict[str, Any] = {
            "train": str(write_rows(tmp_path / "train.jsonl")),
            "max_length": 128,
        }
        if evaluate:
            data["eval"] = str(write_rows(tmp_path / "eval.jsonl", 8, seed=1))
        changes = sections.pop("train", {})
        if "epochs" in changes:
            train.pop("steps")
        if "batch_tokens" in changes:
            train.pop("batch_examples")
        return Recipe.from_dict(
            {
                "base": {"model": str(tiny_base), "quantization": "none", **sections.pop("base", {})},
                "data": {**data, **sections.pop("data", {})},
                "strategies": strategies or [{"lora": {"rank": 4}}],
                "train": {**train, **changes},
                "output": str(tmp_path / output),
            }
        )

    return make

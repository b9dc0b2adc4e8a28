"""Generates the files of the kit's runs: a tiny base, a teacher, and data, for each task."""

from __future__ import annotations

import atexit
import functools
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_lowercase

import torch

from budwood.data.preference import PAIRS
from budwood.data.prompts import PROMPTS

LONGEST = 12
"""Tokens of the longest example; even three of the shortest exceed twice this."""
LABELS = ("a", "b", "c")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Files:
    """Paths for options.

    Attributes:
        folder: temporary folder of this session, removed when the session ends.
        base: a random fp32 Llama with two layers and hidden size 32; its tokenizer has one token per byte.
        teacher: a model of the same shape with different weights and the same tokenizer; for classification it has a
            head.
        train, eval: JSONL files with rows of 9 to 12 tokens.
    """

    folder: Path
    base: Path
    teacher: Path
    train: Path
    eval: Path


@functools.cache
def session_folder() -> Path:
    """Return the temporary folder of this session; it is removed when Python exits."""
    folder = Path(tempfile.mkdtemp(prefix="budwood-testing-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def kind_for(trains_on: Sequence[str]) -> str:
    """Return the kind of data to test a strategy with: answers to learn, if it trains on them; see `trains_on`."""
    return "" if "" in trains_on else next(iter(trains_on), "")


@functools.cache
def make_files(task: str, kind: str = "") -> Files:
    """Generate, once per session, the files for a task: causal-lm or sequence-classification.

    Args:
        kind: of the data: "preference pairs", "judged answers" or "prompts without answers"; "": answers to learn.
    """
    if kind:
        files = make_files(task)
        return replace(files, train=_write_answers(files.train, kind, 12), eval=_write_answers(files.eval, kind, 4))
    folder = session_folder() / task
    classify = task == "sequence-classification"
    tiny_decoder(folder / "base")
    tiny_decoder(folder / "teacher", seed=1, labels=LABELS if classify else ())
    draw = random.Random(0)
    for name, count in (("train", 12), ("eval", 4)):
        texts = ["".join(draw.choices("bcdfghjklmnp", k=7 + number % 3)) for number in range(count)]
        rows: list[dict[str, str]] = [
            {"text": text, "label": LABELS[number % len(LABELS)]}
            if classify
            else {"prompt": text[:-3], "completion": text[-3 + number % 2 :]}
            for number, text in enumerate(texts)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Files(session_folder(), *(folder / name for name in ("base", "teacher", "train.jsonl", "eval.jsonl")))


def tiny_decoder(folder: Path, seed: int = 0, labels: Sequence[str] = ()) -> Path:
    """Save a random fp32 Llama with two layers and hidden size 32, whose tokenizer has one token per byte.

    Args:
        labels: names of classes, for a model with a classification head; else it is a language model.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    from transformers.utils import logging

    config = LlamaConfig(
        vocab_size=256 + len(SPECIAL), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=False,
        initializer_range=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.update({"classifier_dropout": 0.0})  # of a head for each token, which would have some
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: torch.nn.Module = (LlamaForSequenceClassification if labels else LlamaForCausalLM)(config)
    model.save_pretrained(folder)  # type: ignore[operator]
    save_tokenizer(folder)
    return folder


def tiny_encoder(folder: Path, texts: Sequence[str] = ()) -> Path:
    """Save a random fp32 BERT with two layers and hidden size 32, without dropout, and a masked-language head.

    Args:
        texts: texts whose words are tokens of its tokenizer; other words are spelt with lower-case letters.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for text in texts for word in text.split()} - {*ascii_lowercase})
    vocabulary = [*special, *ascii_lowercase, *(f"##{letter}" for letter in ascii_lowercase), *words]
    known = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(known, unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name[1:-1].lower()}_token": name for name in special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForMaskedLM(config).save_pretrained(folder)
    return folder


def _write_answers(path: Path, kind: str, count: int) -> Path:
    """Write as many rows of pairs or of judged answers beside a file; each example has 9 to 12 tokens."""
    draw = random.Random(path.name)
    rows: list[dict[str, object]] = []
    for number in range(count):
        prompt, *answers = ("".join(draw.choices("bcdfghjklmnp", k=k)) for k in (4 + number % 3, 3, 4))
        if kind == PAIRS:
            rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
        elif kind == PROMPTS:
            rows.append({"prompt": prompt})
        else:
            rows.append({"prompt": prompt, "completion": answers[number % 2], "label": number % 2 == 0})
    written = path.with_name(f"{path.stem}-{kind.replace(' ', '-')}.jsonl")
    written.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return written


def save_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate([*SPECIAL, *alphabet])}, []))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=512
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)

"""The tasks of `benchmarks.real`: rows, the order in which all arms train on them, useful work, and the score.

A row is a prompt and its completion, messages, or a text and its label. The score of a causal model is the share of
answers whose tokens, end token included, are each the most probable one after the true text before them, which is what
greedy decoding would answer; that of a classifier is its accuracy.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.evidence import draw
from benchmarks.real_arms import Row, encode, load

RANK, ALPHA, CLIP = 8, 16, 1.0
SCORED = 16
"""Rows scored at once."""
TURNS = 2
PROMPT = "{text}\nSection:"
QUESTION = "Is this sentence negative, neutral or positive?\n{text}"
CLASSES = ("negative", "neutral", "positive")


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and for how long.

    Attributes:
        kind: completion, chat or classification.
        base: fetches the base's folder.
        rows: returns the rows to train on and those to score, before a seed draws from them.
        arms: names of the arms, in the order of the first seed.
        targets: the linears that get an adapter: a regular expression for their full names.
        seeds: number of seeds.
        train: rows that a seed draws; a multiple of `batch`.
        score: rows to score.
        epochs: passes over the rows.
        batch: rows of an optimizer step.
        rate: learning rate, constant after the warm-up.
        warmup: steps of the warm-up, as a share of all.
        quick: what a quick run replaces; None: it leaves the task out.
        quantization: none or nf4.
    """

    name: str
    title: str
    kind: str
    base: Callable[[], Path]
    rows: Callable[[], tuple[list[Row], list[Row]]]
    arms: tuple[str, ...]
    targets: str
    seeds: int
    train: int
    score: int
    epochs: int
    batch: int
    rate: float
    quick: dict[str, int] | None
    quantization: str = "none"
    warmup: float = 0.0

    @property
    def classifies(self) -> bool:
        """Whether it is a classification."""
        return self.kind == "classification"

    def draw(self, seed: int) -> tuple[list[Row], list[Row]]:
        """Return the rows to train on, which the seed draws, and the rows to score, the same for every seed."""
        train, held = self.rows()
        held = random.Random(f"{self.name} held out").sample(held, min(self.score, len(held)))
        if self.classifies:  # a row of every class
            return draw(train, self.train, f"{self.name} {seed}"), held
        return random.Random(f"{self.name} {seed}").sample(train, self.train), held

    def order(self, seed: int) -> list[int]:
        """Return the indices of the rows in the order in which Budwood trains on them, epoch after epoch."""
        import numpy as np

        from budwood.data.packing import plan_epoch

        epochs = [plan_epoch(np.ones(self.train), seed, epoch, None, self.batch) for epoch in range(self.epochs)]
        return [int(i) for steps in epochs for step in steps for i in step]


def _sections() -> tuple[list[Row], list[Row]]:
    return models.sections("train"), models.sections("eval")


def _section_completions() -> tuple[list[Row], list[Row]]:
    train, held = _sections()
    return [_completion(row) for row in train], [_completion(row) for row in held]


def _completion(row: Row) -> Row:
    return {"prompt": PROMPT.format(text=row["text"]), "completion": f" {row['label']}"}


def _tweets() -> tuple[list[Row], list[Row]]:
    return models.vader_parts("tweets")


def _film() -> tuple[list[Row], list[Row]]:
    return models.vader_parts("film")


def _product_chats() -> tuple[list[Row], list[Row]]:
    train, held = models.vader_parts("products")
    return list(_chats(train)), list(_chats(held))


def _chats(rows: list[Row]) -> Iterator[Row]:
    """Yield conversations of up to `TURNS` consecutive sentences of a review, each with its label as the answer."""
    for _, group in itertools.groupby(rows, key=lambda row: row["group"]):
        sentences = list(group)
        for start in range(0, len(sentences), TURNS):
            messages = []
            for number, row in enumerate(sentences[start : start + TURNS]):
                asked = QUESTION.format(text=row["text"]) if number == 0 else row["text"]
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": row["label"]}]
            yield {"messages": messages}


CAUSAL = ("budwood", "trainer", "trl", "trl-packed")
CLASSIFIERS = ("budwood", "trainer")
LLAMA = r".*\.(q|k|v|o|gate|up|down)_proj"
BERT = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
TASKS = {
    task.name: task
    for task in (
        Task(
            "encoder-sections", "an encoder classifies: sections of Debian packages", "classification",
            models.minilm, _sections, CLASSIFIERS, BERT, seeds=5, train=1024, score=900, epochs=4, batch=16,
            rate=1.2e-3, quick={"train": 256, "score": 450}, warmup=0.1,
        ),
        Task(
            "completion", "prompt and completion: sections of Debian packages", "completion", models.smollm2,
            _section_completions, CAUSAL, LLAMA, seeds=3, train=768, score=300, epochs=1, batch=16, rate=2e-3,
            quick={"train": 128, "score": 150},
        ),
        Task(
            "encoder-tweets", "an encoder classifies: ratings of tweets", "classification",
            models.minilm, _tweets, CLASSIFIERS, BERT, seeds=5, train=1024, score=800, epochs=3, batch=16,
            rate=1.2e-3, quick={"train": 256, "score": 400}, warmup=0.1,
        ),
        Task(
            "nf4", "as completion, with the base in NF4", "completion", models.smollm2,
            _section_completions, CAUSAL, LLAMA, seeds=3, train=384, score=300, epochs=1, batch=16, rate=2e-3,
            quick={"train": 64, "score": 150, "seeds": 1}, quantization="nf4",
        ),
        Task(
            "chat", "messages, loss on the assistant's turns: ratings of product reviews", "chat", models.smollm2,
            _product_chats, CAUSAL, LLAMA, seeds=3, train=384, score=150, epochs=1, batch=8, rate=2e-3,
            quick={"train": 32, "score": 50},
        ),
        Task(
            "causal-film", "a causal model classifies: ratings of film reviews", "classification",
            models.smollm2, _film, CLASSIFIERS, LLAMA, seeds=3, train=512, score=300, epochs=1, batch=16, rate=1e-3,
            quick=None,
        ),
    )
}  # fmt: skip
"""Tasks by name, in the order in which they run."""


def write_rows(rows: list[Row], columns: tuple[str, ...], file: Path) -> None:
    """Write a JSONL file with some columns of the rows."""
    lines = (json.dumps({name: row[name] for name in columns}, ensure_ascii=False) + "\n" for row in rows)
    file.write_text("".join(lines), encoding="utf-8")


def columns(kind: str) -> tuple[str, ...]:
    """Return the columns of a kind of task's rows."""
    return {"completion": ("prompt", "completion"), "chat": ("messages",), "classification": ("text", "label")}[kind]


class Work:
    """The floating-point operations that training a LoRA adapter needs at least."""

    def __init__(self, task: Task, base: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(base)
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        self.causal = config.model_type != "bert"
        self.layers, self.width = config.num_hidden_layers, config.hidden_size
        self.head = 0 if task.classifies else config.vocab_size * config.hidden_size
        self.frozen = self.adapter = self.first = 0
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and re.fullmatch(task.targets, f"model.{name}"):
                self.frozen += module.weight.numel()
                self.adapter += RANK * sum(module.weight.shape)
                reads_embeddings = re.search(r"\.0\..*(q_proj|k_proj|v_proj|query|key|value)$", name)
                self.first += module.weight.numel() if reads_embeddings else 0

    def flops(self, length: int, labels: int) -> float:
        """Return the operations for one example: `length` tokens, of which `labels` have a loss.

        Per token 2P forward and 2P for the gradient of the input of P frozen weights, without the latter where the
        input is the embeddings; 6 for each of the adapter's; 12·T·d for attention in each layer, half if it is causal;
        and 4 for each weight of the language model's head where a token has a loss.
        """
        attention = self.layers * self.width * length * (6 if self.causal else 12)
        return (
            length * (4.0 * self.frozen - 2.0 * self.first + 6.0 * self.adapter + attention) + labels * 4.0 * self.head
        )


def score(task: Task, adapter: Path, rows: list[Row], classes: list[str]) -> dict[str, float]:
    """Return the score and the loss of an adapter in PEFT's layout on the rows, with stock PEFT, in fp32 on its base.

    Args:
        task: the task.
        adapter: folder of the adapter.
        rows: rows to score.
        classes: names of a classifier's classes, in the order of its outputs.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    base = task.base()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load(str(base), task.quantization, torch.float32, classes)
    model = PeftModel.from_pretrained(model, adapter).eval()
    examples = [(*encode(task.kind, row, tokenizer), row) for row in rows]
    examples.sort(key=lambda example: len(example[0]))
    right = count = tokens = 0
    loss = 0.0
    for start in range(0, len(examples), SCORED):
        batch = examples[start : start + SCORED]
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(ids) for ids, _, _ in batch], batch_first=True, padding_value=tokenizer.pad_token_id
        )
        lengths = torch.tensor([len(ids) for ids, _, _ in batch])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        with torch.inference_mode():
            if task.classifies:
                logits = model(input_ids=ids, attention_mask=mask).logits
                truth = torch.tensor([classes.index(row["label"]) for _, _, row in batch])
                hits, answers = int((logits.argmax(1) == truth).sum()), len(batch)
            else:
                labels = torch.nn.utils.rnn.pad_sequence(
                    [torch.tensor(labels) for _, labels, _ in batch], batch_first=True, padding_value=-100
                )
                hidden = model.base_model.model.model(input_ids=ids, attention_mask=mask).last_hidden_state
                at = labels[:, 1:] != -100
                logits, truth = model.base_model.model.lm_head(hidden[:, :-1][at]), labels[:, 1:][at]
                hits, answers = _answers(at, logits.argmax(1) == truth)
            loss += float(torch.nn.functional.cross_entropy(logits, truth, reduction="sum"))
        right, count, tokens = right + hits, count + answers, tokens + len(truth)
    return {"score": right / count, "loss": loss / tokens}


def _answers(at: Any, hits: Any) -> tuple[int, int]:
    """Return the number of right answers and of answers.

    Args:
        at: [rows, positions] whether a position has a label; adjacent ones are an answer.
        hits: [labels] whether each label is right, row by row.
    """
    import torch

    starts = at & ~torch.nn.functional.pad(at, (1, 0))[:, :-1]
    answer = starts[at].cumsum(0) - 1
    misses = torch.bincount(answer, weights=(~hits).double())
    return int((misses == 0).sum()), len(misses)

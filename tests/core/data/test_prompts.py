"""Prompts without answers, and columns that strategies read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from budwood.data.build import build_examples
from budwood.data.encoder import encode_chat
from budwood.data.prompts import PROMPTS
from budwood.data.recognition import check_rows
from budwood.errors import InputError
from budwood.model.checks import load_tokenizer

Write = Callable[..., Path]
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "And?"},
]


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(str(tiny_base))


def build(path: Path, tokenizer: Any, **options: Any) -> Any:
    return build_examples(path, tokenizer, "causal-lm", 64, **options)


def test_a_text_is_tokenised_as_in_generation_and_has_no_labels(write: Write, tokenizer: Any) -> None:
    examples = build(write([{"prompt": "games files:", "id": 1}, {"prompt": " "}]), tokenizer)
    assert (examples.format, examples.holds) == ("prompts", PROMPTS)
    (example,) = examples
    assert example.inputs["input_ids"].tolist() == tokenizer("games files:")["input_ids"]
    assert not len(example.labels) and not len(example.label_positions) and not len(example.weights)
    assert "columns ignored: id" in examples.describe() and "empty prompt 1" in examples.describe()
    assert "with a loss" not in examples.describe()
    assert examples.stop_ids == [tokenizer.eos_token_id]
    again = build(examples.data, tokenizer)
    assert again.from_cache and again[0].inputs["input_ids"].tolist() == example.inputs["input_ids"].tolist()


def test_messages_end_with_the_generation_prompt(write: Write, tokenizer: Any) -> None:
    path = write([{"prompt": TALK, "system": "Be brief."}, {"prompt": TALK[:1]}])
    examples = build(path, tokenizer)
    expected = encode_chat(tokenizer, [{"role": "system", "content": "Be brief."}, *TALK])
    assert examples[0].inputs["input_ids"].tolist() == expected
    assert examples.stop_ids == sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")})
    alone = build(write([{"prompt": " Hi\n"}], "text.jsonl"), tokenizer, as_chat=True)
    assert alone[0].inputs["input_ids"].tolist() == examples[1].inputs["input_ids"].tolist()
    assert alone.stop_ids == examples.stop_ids and alone.rendered


def test_a_column_that_a_strategy_reads_is_neither_ignored_nor_refused(write: Write, tokenizer: Any) -> None:
    path = write([{"prompt": "a", "context": "b", "answer": "c"}])
    with pytest.raises(InputError, match=r"train\.jsonl:1: prompt does not read column 'context'"):
        check_rows(path, "causal-lm")
    read = {"context": "strategy 'mine'"}
    assert check_rows(path, "causal-lm", read).name == "prompts"
    examples = build(path, tokenizer, read=read)
    assert "columns ignored: answer" in examples.describe()
    assert examples.rows[examples[0].row]["context"] == "b"
    assert "columns ignored" not in build(path, tokenizer, read={**read, "answer": "strategy 'mine'"}).describe()
    with pytest.raises(
        InputError, match=r"train\.jsonl:1: field 'anser' is missing; strategy 'mine' reads it\. Did you"
    ):
        build(path, tokenizer, read={**read, "anser": "strategy 'mine'"})
    null = write([{"prompt": "a", "answer": None}, {"prompt": "b", "answer": 0}], "null.jsonl")
    some = build(null, tokenizer, read={"answer": "strategy 'mine'"}, skip_bad_rows=True)
    assert len(some) == 1 and some.stats.skipped


def test_one_kind_of_data(write: Write, tokenizer: Any) -> None:
    paths = [write([{"prompt": "a"}], "a.jsonl"), write([{"prompt": "a", "completion": "b"}], "b.jsonl")]
    from budwood.recipe.schema import default_recipe

    recipe = default_recipe([{"path": str(path)} for path in paths], "base")
    with pytest.raises(InputError, match="one kind of data, not on prompts without answers .* and answers to learn"):
        check_rows(recipe.data.train, "causal-lm")

"""`budwood data` shows which tokens have a loss, with and without colour."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from budwood.data.build import build_examples
from budwood.data.display import make_report, show_report
from budwood.model.text_tasks import CausalLM, SequenceClassification

ROWS = [{"prompt": f"Question: {i} é\nAnswer:", "completion": " 你好" + " yes" * i} for i in range(20)]


def shown(report: dict[str, Any], colour: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=colour, color_system="standard" if colour else None, width=80)
    show_report(report, console)
    return console.file.getvalue()


@pytest.fixture
def report(write: Any, byte_level: Any) -> dict[str, Any]:
    rows = [*ROWS, {"prompt": "x", "completion": ""}]
    train = build_examples(write(rows), byte_level(), "causal-lm", 64)
    held_out = build_examples(write(rows[:2], "eval.jsonl"), byte_level(), "causal-lm", 64)
    return make_report(train, held_out, CausalLM(), byte_level(), samples=3, steps=7)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_pieces_spell_out_every_token(request: pytest.FixtureRequest, kind: str, write: Any) -> None:
    made = request.getfixturevalue(kind)
    tokenizer = made() if kind == "byte_level" else made
    examples = build_examples(write(ROWS), tokenizer, "causal-lm", 512)
    for example, row in zip(examples, ROWS, strict=True):
        pieces = CausalLM().show(example, tokenizer)
        assert [supervised for _, supervised in pieces] == [False, True]
        spelled = "".join(text for text, _ in pieces).replace("<s> ", "<s>")  # SentencePiece adds a space
        assert spelled == f"<s>{row['prompt']}{row['completion']}</s>"


def test_report_is_json_and_adds_up(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report
    train = report["train"]
    assert sum(bar["examples"] for bar in train["histogram"]) == train["examples"] == 20
    assert train["histogram"][0]["from"] == train["lengths"]["min"]
    assert train["histogram"][-1]["to"] >= train["lengths"]["max"]
    assert train["dropped"] == {"empty completion": 1}
    assert report["eval"]["overlap"] == 2
    assert 0 < report["padding"] < 1
    assert [sample["where"].rpartition(":")[2] for sample in report["samples"]] == ["1", "11", "20"]


def test_brackets_mark_losses_without_colour(report: dict[str, Any]) -> None:
    text = shown(report, colour=False)
    assert "\x1b" not in text
    assert "Answer:⟦ 你好</s>⟧" in text
    assert "<s>Question: 0 é↵" in text
    assert "dropped: 1 empty completion (first " in text
    assert "2 also in the training data (100.0%)" in text
    assert "7 optimizer steps per epoch. Packed rows have no padding" in text


def test_colours_mark_losses(report: dict[str, Any]) -> None:
    text = shown(report, colour=True)
    assert "⟦" not in text
    assert "\x1b[1;32m 你好</s>" in text
    assert "\x1b[2m<s>Question" in text


def test_data_cannot_control_the_terminal(write: Any, byte_level: Any) -> None:
    rows = [{"text": "\x1b[31mred [bold]\u202e" + "x" * 2000, "label": name} for name in ("[a]", "\x07b")]
    examples = build_examples(write(rows), byte_level(), "sequence-classification", 4096)
    text = shown(make_report(examples, None, SequenceClassification(), byte_level(), 9, 1), colour=False)
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert r"\x1b[31mred [bold]\u202e" in " ".join(text.split())
    assert "→ ⟦[a]⟧" in text
    assert r"→ ⟦\x07b⟧" in text
    assert "characters…]" in text
    assert "[a] 1" in text


def test_no_samples(write: Any, byte_level: Any) -> None:
    examples = build_examples(write(ROWS[:1]), byte_level(), "causal-lm", 64)
    report = make_report(examples, None, CausalLM(), byte_level(), samples=0, steps=1)
    assert report["samples"] == []
    assert "eval:" not in shown(report, colour=False)


def test_examples_of_split_conversations_are_counted(write, byte_level):
    """A template that drops what it wrote before earlier answers gives one example per answer."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if loop.last and m.role == 'assistant' %}{{ '!' }}"
        "{% endif %}{{ m.content + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant' }}{% endif %}"
    )
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    tokenizer = byte_level(True, template)
    examples = build_examples(write([{"messages": turns}]), tokenizer, "causal-lm", 64)
    report = make_report(examples, None, CausalLM(), tokenizer, 2, 1)
    console = Console(file=io.StringIO(), width=200)
    show_report(report, console)
    assert "2 examples from 1 row," in console.file.getvalue()
    assert [sample["where"].rpartition(":")[2] for sample in report["samples"]] == ["1", "1"]
    assert [example.key for example in examples] == ["0.0", "0.1"]

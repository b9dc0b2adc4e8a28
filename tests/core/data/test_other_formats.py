"""Files from other tools are recognised by their columns and read accordingly, or refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from budwood.data.build import build_examples
from budwood.data.recognition import check_rows, recognise
from budwood.errors import InputError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LM = "causal-lm"


def shown(rows: list[Any], write: Any, byte_level: Any, **options: Any) -> tuple[str, str, Any]:
    """Return the first example's prompt and its text with a loss, and all examples."""
    tokenizer = byte_level(True, CHATML)
    examples = build_examples(write(rows), tokenizer, LM, 512, **options)
    example = examples[0]
    at = example.label_positions + 1
    ids = example.inputs["input_ids"]
    return tokenizer.decode(ids[: at[0]].tolist()), tokenizer.decode(ids[at].tolist()), examples


def turns(*contents: str, roles: tuple[str, str] = ("user", "assistant")) -> list[dict[str, str]]:
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


ASKED, ANSWER = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello<|im_end|>"
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.mark.parametrize(
    ("row", "format_name"),
    [
        ({"conversations": SHAREGPT}, "sharegpt"),
        ({"conversations": turns("Hi", "Hello")}, "sharegpt"),
        ({"conversation": turns("Hi", "Hello")}, "conversation"),
        ({"messages": turns("Hi", "Hello")}, "messages"),
        ({"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
                       for m in turns("Hi", "Hello")]}, "messages"),
        ({"messages": [m | dict.fromkeys(["tool_calls", "name", "weight"]) for m in turns("Hi", "Hello")]}, "messages"),
        ({"instruction": "Hi", "output": "Hello"}, "alpaca"),
        ({"instruction": "Hi", "input": "", "output": "Hello", "system": ""}, "alpaca"),
        ({"instruction": "", "input": "Hi", "output": "Hello"}, "alpaca"),
        ({"instruction": "Hi", "context": "", "response": "Hello"}, "dolly"),
        ({"prompt": turns("Hi"), "completion": [{"role": "assistant", "content": "Hello"}]}, "prompt-completion"),
        ({"prompt": turns("Hi"), "completion": "Hello"}, "prompt-completion"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_one_question_and_its_answer(row: Any, format_name: str, write: Any, byte_level: Any) -> None:
    prompt, answer, examples = shown([row], write, byte_level)
    assert (prompt, answer, examples.format) == (ASKED, ANSWER, format_name)
    assert examples.reference(0) == "Hello"


def test_what_stands_beside_a_question(write: Any, byte_level: Any) -> None:
    row = {"instruction": "Add", "input": "2 2", "output": "4", "system": "Be brief", "history": [["Hi", "Hello"]]}
    prompt, answer, _ = shown([row], write, byte_level)
    assert prompt == "<|im_start|>system\nBe brief<|im_end|>\n" + ASKED
    assert answer == "Hello<|im_end|>4<|im_end|>"
    prompt, _, _ = shown([{"conversations": SHAREGPT, "system": "Be kind"}], write, byte_level)
    assert prompt == "<|im_start|>system\nBe kind<|im_end|>\n" + ASKED
    prompt, _, _ = shown([{"instruction": "Add", "context": "2 2", "response": "4"}], write, byte_level)
    assert prompt == "<|im_start|>user\nAdd\n\n2 2<|im_end|>\n<|im_start|>assistant\n"


def test_only_the_completion_of_messages_has_a_loss(write: Any, byte_level: Any) -> None:
    row = {"prompt": turns("Hi", "Hello", "How?"), "completion": [{"role": "assistant", "content": "Fine"}]}
    prompt, answer, _ = shown([row], write, byte_level)
    assert answer == "Fine<|im_end|>"
    assert prompt.startswith(ASKED + "Hello<|im_end|>")


def test_text_parts_are_joined_by_line_ends(write: Any, byte_level: Any) -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c", "image_url": None}]
    prompt, _, _ = shown([{"messages": [{"role": "user", "content": parts}, *turns("", "x")[1:]]}], write, byte_level)
    assert prompt == "<|im_start|>user\na\nb\nc<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["id", "tokens", "ner_tags"], "a tag for each token"),
        (["mesages"], "Did you mean 'messages' by 'mesages'"),
    ],
)
def test_what_cannot_be_trained_on_is_named(columns: list[str], message: str) -> None:
    with pytest.raises(InputError, match=f"^a.jsonl: columns .*{message}"):
        recognise(columns, LM, "a.jsonl")


@pytest.mark.parametrize("columns", [["dialogue"], ["utterances"], ["src", "tgt"], ["question"]])
def test_no_guess_is_better_than_a_wrong_one(columns: list[str]) -> None:
    with pytest.raises(InputError, match="match no data format. Accepted: ") as caught:
        recognise(columns, LM, "a.jsonl")
    assert "Did you mean" not in str(caught.value)


def test_a_third_party_format_for_the_same_columns_is_used(distribution: Any) -> None:
    source = "from budwood import DataFormat\nclass Tags(DataFormat):\n    api = 2\n    name = 'tags'\n"
    source += "    columns = ('tokens', 'tags')\n    tasks = ('causal-lm',)\n"
    distribution("tags-form", source, {"tags": "Tags"}, "budwood.formats")
    assert recognise(["tags", "id", "tokens"], LM, "a.jsonl").name == "tags"


def test_columns_that_are_not_read_are_named(write: Any, byte_level: Any) -> None:
    rows = [{"id": 1, "source": "web", "messages": turns("Hi", "Hello")}, {"messages": turns("a", "b"), "score": 3}]
    _, _, examples = shown(rows, write, byte_level)
    assert "columns ignored: id, source, score" in examples.describe()
    assert examples.columns == ["messages"]
    _, _, examples = shown([{"messages": turns("Hi", "Hello")}], write, byte_level)
    assert "ignored" not in examples.describe()


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "a", "completion": "b", "context": "c"}, "context"),
        ({"prompt": "a", "completion": "b", "reasoning": "c"}, "reasoning"),
        ({"messages": turns("Hi", "Hello"), "images": ["a.png"]}, "images"),
        ({"text": "a", "tools": [{"name": "f"}]}, "tools"),
    ],
)
def test_columns_that_say_something_are_not_left_out(row: Any, name: str, write: Any, byte_level: Any) -> None:
    path = write([{**row, name: None}, row])
    with pytest.raises(InputError, match=rf"train.jsonl:2: .* does not read column '{name}', which would be left out"):
        build_examples(path, byte_level(True, CHATML), LM, 512)
    with pytest.raises(InputError, match=rf"train.jsonl:2: .* does not read column '{name}'"):
        check_rows(path, LM)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "completion": "b", "tools": [{"name": "f"}]},
            "field 'tools' needs a chat template, but 'prom",
        ),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "field 'history' must be a list of pairs of texts"),
        ({"conversations": [{"from": "human", "value": 3}]}, "message 1: 'value' must be text, not an int"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "message 1: unknown role 'narrator'"),
        ({"conversations": [{"from": "function_call", "value": "weather(x)"}]}, "'tool_calls' is not JSON: weather"),
    ],
)
def test_malformed_rows(row: Any, message: str, write: Any) -> None:
    with pytest.raises(InputError, match=f"train.jsonl:1: .*{message}"):
        check_rows(write([row]), LM)

"""Preference pairs and judged answers: how rows become examples, and rows that cannot be compared are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from budwood.data.build import build_examples
from budwood.data.display import make_report
from budwood.data.recognition import check_rows
from budwood.errors import InputError
from budwood.model.text_tasks import CausalLM

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_TOOLS = "{% if tools %}{{ tools[0].function.name }}{% endif %}" + CHATML
REWRITES = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content if loop.last or m.role != 'assistant' else "
    "m.content|upper) + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
LM = "causal-lm"
ASKED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def said(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def answer(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def build(rows: list[Any], write: Any, byte_level: Any, length: int = 512, template: str = CHATML, **more: Any) -> Any:
    return build_examples(write(rows), byte_level(True, template), LM, length, **more)


def pieces(examples: Any, byte_level: Any) -> list[tuple[str, str]]:
    """Return the text before the first label and the text of the labels, of each example."""
    tokenizer = byte_level(True, CHATML)
    prompts = [e.inputs["input_ids"][: e.label_positions[0] + 1] for e in examples]
    return [
        (tokenizer.decode(prompt.tolist()), tokenizer.decode(e.labels.tolist()))
        for prompt, e in zip(prompts, examples, strict=True)
    ]


def answers(examples: Any, byte_level: Any) -> list[str]:
    return [text for _, text in pieces(examples, byte_level)]


PAIR_OF_CHATS = [
    {"prompt": said("Hi"), "chosen": answer("Good"), "rejected": answer("Bad")},
    {"prompt": said("Hi"), "chosen": "Good", "rejected": "Bad"},
    {"prompt": "Hi", "chosen": said("Hi", "Good"), "rejected": said("Hi", "Bad")},
    {"prompt": "Hi", "chosen": answer("Good"), "rejected": answer("Bad")},
    {"prompt": said("Hi"), "chosen": said("Hi", "Good"), "rejected": said("Hi", "Bad")},
    {"chosen": said("Hi", "Good"), "rejected": said("Hi", "Bad")},
    {"input": {"messages": said("Hi"), "tools": [], "parallel_tool_calls": True},
     "preferred_output": answer("Good"), "non_preferred_output": answer("Bad")},
]  # fmt: skip


@pytest.mark.parametrize(
    "row", PAIR_OF_CHATS, ids=lambda row: " ".join(f"{k}-{type(v).__name__}" for k, v in row.items())
)
def test_a_pair_of_conversations_is_a_group_of_two_examples(row: Any, write: Any, byte_level: Any) -> None:
    examples = build([row, {**row, "weight": 0.5}], write, byte_level)
    assert pieces(examples, byte_level) == [(ASKED, "Good<|im_end|>"), (ASKED, "Bad<|im_end|>")] * 2
    assert [e.group for e in examples] == [0, 0, 1, 1]
    assert [float(e.columns["desirable"].values) for e in examples] == [1, 0, 1, 0]
    assert [set(e.weights.tolist()) for e in examples] == [{1.0}, {1.0}, {0.5}, {0.5}]
    assert [e.key for e in examples] == ["0.0", "0.1", "1.0", "1.1"]
    assert examples.holds == "preference pairs"


def test_text_pairs_have_the_tokens_of_prompts_and_completions(write: Any, byte_level: Any) -> None:
    rows = [{"prompt": "Question: a?", "chosen": " b c", "rejected": "\nno"}]
    examples = build(rows, write, byte_level)
    alone = [
        build([{"prompt": rows[0]["prompt"], "completion": rows[0][name]}], write, byte_level)[0]
        for name in ("chosen", "rejected")
    ]
    for example, expected in zip(examples, alone, strict=True):
        np.testing.assert_array_equal(example.inputs["input_ids"], expected.inputs["input_ids"])
        np.testing.assert_array_equal(example.label_positions, expected.label_positions)
    as_chat = build([{"prompt": "Hi", "chosen": " Good", "rejected": "Bad "}], write, byte_level, as_chat=True)
    assert pieces(as_chat, byte_level) == [(ASKED, "Good<|im_end|>"), (ASKED, "Bad<|im_end|>")]


def test_a_shared_prompt_ends_where_the_answers_begin(write: Any, byte_level: Any) -> None:
    """HH-RLHF's texts share words of the answers too, which are part of both."""
    start = "\n\nHuman: Hi\n\nAssistant: Well\n\nHuman: So?\n\nAssistant:"
    examples = build([{"chosen": start + " I do", "rejected": start + " I don't"}], write, byte_level)
    assert pieces(examples, byte_level) == [("<s>" + start, " I do</s>"), ("<s>" + start, " I don't</s>")]
    chats = [
        {"chosen": said("Hi", "Well", "So?", "Yes"), "rejected": said("Hi", "Well", "So?", "No")},
        {"chosen": said("Hi", "Yes", "So?", "Yes"), "rejected": said("Hi", "No", "Why?", "No")},
    ]
    longer, branched = build(chats[:1], write, byte_level), build(chats[1:], write, byte_level)
    assert answers(longer, byte_level) == ["Yes<|im_end|>", "No<|im_end|>"]
    assert answers(branched, byte_level) == [
        "Yes<|im_end|>Yes<|im_end|>",
        "No<|im_end|>No<|im_end|>",
    ]
    last = build(chats[1:], write, byte_level, loss_on="last")
    assert answers(last, byte_level) == ["Yes<|im_end|>", "No<|im_end|>"]


def test_system_prompts_and_tools_are_rendered_on_both_sides(write: Any, byte_level: Any) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    row = {**PAIR_OF_CHATS[0], "system": "Be kind", "tools": [tool]}
    openai = {
        **PAIR_OF_CHATS[-1],
        "input": {"messages": [{"role": "system", "content": "Be kind"}, *said("Hi")], "tools": [tool]},
    }
    for case in (row, openai):
        examples = build([case], write, byte_level, template=WITH_TOOLS)
        assert {prompt for prompt, _ in pieces(examples, byte_level)} == {
            "look<|im_start|>system\nBe kind<|im_end|>\n" + ASKED
        }


@pytest.mark.parametrize(
    ("label", "value"), [(True, 1), (False, 0), (1, 1), (0, 0), ("true", 1), ("False", 0), ("1", 1), ("0", 0)]
)
def test_judged_answers(label: Any, value: int, write: Any, byte_level: Any) -> None:
    rows = [
        {"prompt": "Hi", "completion": " Good", "label": label},
        {"prompt": "Hi", "completion": " Good", "label": label, "weight": 2},
    ]
    examples = build(rows, write, byte_level)
    assert [float(e.columns["desirable"].values) for e in examples] == [value, value]
    assert [e.group for e in examples] == [0, 1]
    assert examples[1].weights[0] == 2
    assert examples.holds == "judged answers"
    chat = build([{"prompt": said("Hi"), "completion": answer("Good"), "label": label}], write, byte_level)
    assert pieces(chat, byte_level) == [(ASKED, "Good<|im_end|>")]


def test_nothing_of_a_pair_or_a_judged_answer_is_truncated(write: Any, byte_level: Any) -> None:
    """A pair is dropped if either side is too long; the truncated sides could compare the other way round."""
    short, long = "a b", "a b c d e f g h i j k l m n o p"
    rows = [
        {"prompt": "Hi", "chosen": short, "rejected": long},
        {"prompt": "Hi", "chosen": long, "rejected": short},
        {"prompt": "Hi", "chosen": short, "rejected": "c d"},
    ]
    examples = build(rows, write, byte_level, length=20)
    assert (len(examples), examples.stats.dropped, examples.stats.truncated) == (
        2,
        {"longer than max_length allows": 2},
        0,
    )
    assert "2 dropped (longer than max_length allows 2, first at" in examples.describe()
    judged = [{"prompt": "Hi", "completion": text, "label": True} for text in (short, long)]
    assert build(judged, write, byte_level, length=20).stats.dropped == {"longer than max_length allows": 1}
    with pytest.raises(
        InputError, match=r"its only row was dropped: longer than max_length allows 1. Raise data.max_length"
    ):
        build(rows[:1], write, byte_level, length=20)


def test_columns_of_examples_survive_the_cache_and_selection(write: Any, byte_level: Any, tmp_path: Any) -> None:
    path = write([{"prompt": "Hi", "chosen": f"a {i}", "rejected": "b"} for i in range(4)])
    built = [build_examples(path, byte_level(True), LM, 64, cache_dir=tmp_path / "cache") for _ in range(2)]
    assert [examples.from_cache for examples in built] == [False, True]
    for examples in (*built, built[1].select(np.array([2, 3]))):
        column = examples[1].columns["desirable"]
        assert (column.values.shape, column.values.dtype, float(column.values), column.axis) == (
            (),
            np.float32,
            0,
            "example",
        )


ANSWER = answer("Good")
REFUSED = {
    "equal": (
        {"prompt": "Hi", "chosen": "a", "rejected": "a"},
        "'chosen' and 'rejected' are equal, so neither is prefer",
    ),
    "equal messages": (
        {"prompt": "Hi", "chosen": ANSWER, "rejected": [{**ANSWER[0], "id": 1}]},
        "'chosen' and 'rejected' are equal",
    ),
    "equal conversations": ({"chosen": said("Hi", "a"), "rejected": said("Hi", "a")}, "'rejected' are equal"),
    "equal texts": ({"chosen": "Human: Hi\nAssistant: a", "rejected": "Human: Hi\nAssistant: a"}, "are equal"),
    "empty": (
        {"prompt": "Hi", "chosen": "a", "rejected": " "},
        "'rejected' is empty. Give an answer, or remove the row",
    ),
    "empty list": ({"prompt": "Hi", "chosen": [], "rejected": ANSWER}, "'chosen' is empty"),
    "empty message": (
        {"prompt": "Hi", "chosen": ANSWER, "rejected": [{"role": "assistant", "content": ""}]},
        "'rejected' is empty",
    ),
    "null": (
        {"prompt": "Hi", "chosen": None, "rejected": "a"},
        "field 'chosen' must be text or a list of messages, not null",
    ),
    "no prompt": (
        {"prompt": None, "chosen": "b", "rejected": "a"},
        "field 'prompt' must be text or a list of .*not null",
    ),
    "text and messages": ({"prompt": "Hi", "chosen": "b", "rejected": ANSWER}, "must both be text, or both lists"),
    "nothing shared": (
        {"chosen": "A good day", "rejected": "A bad day"},
        "share no beginning that ends with the assist",
    ),
    "other prompts": (
        {"chosen": said("Hi", "a"), "rejected": said("Ho", "b")},
        "differ in message 1, before the assist",
    ),
    "prompts that part later": (
        {"chosen": said("Hi", "a", "So?", "b"), "rejected": said("Hi", "a", "Why?", "b")},
        "differ in message 3",
    ),
    "a beginning": (
        {"chosen": said("Hi", "a"), "rejected": said("Hi", "a", "b", "c")},
        "one is the beginning of the other",
    ),
    "another prompt repeated": (
        {"prompt": "Hello", "chosen": said("Hi", "a"), "rejected": said("Hi", "b")},
        "'chosen' begins neither with the",
    ),
    "a prompt repeated once": (
        {"prompt": "Hi", "chosen": said("Hi", "a"), "rejected": ANSWER},
        "'rejected' begins neither with the",
    ),
    "ends with the user": (
        {"prompt": "Hi", "chosen": [*ANSWER, *said("Bye")], "rejected": answer("b")},
        "'chosen' must end with",
    ),
    "a message's weight": (
        {"prompt": "Hi", "chosen": [{**ANSWER[0], "weight": 0.5}], "rejected": answer("b")},
        "a message's weight must be 0 or 1; the row's is in the column 'weight'",
    ),
    "tools beside text": (
        {"prompt": "Hi", "chosen": "a", "rejected": "b", "tools": [{"name": "f"}]},
        "field 'tools' needs a chat template",
    ),
    "a question beside": (
        {"question": "Hi", "chosen": said("x", "a"), "rejected": said("x", "b")},
        "rename it to 'prompt'",
    ),
    "OpenAI's extra key": (
        {
            "input": {"messages": said("Hi"), "system": "x"},
            "preferred_output": ANSWER,
            "non_preferred_output": answer("b"),
        },
        "field 'input' has 'system', which would be left out",
    ),
    "OpenAI's missing messages": (
        {"input": {}, "preferred_output": ANSWER, "non_preferred_output": answer("b")},
        "field 'input' must have a list 'messages', not missing",
    ),
    "a label of another kind": (
        {"prompt": "a", "completion": "b", "label": "good"},
        "true or false .or 1 or 0., not 'good'",
    ),
    "a label of 2": ({"prompt": "a", "completion": "b", "label": 2}, "field 'label' must be true or false .*not '2'"),
    "no label": ({"prompt": "a", "completion": "b", "label": None}, "field 'label' must be true or false .*not null"),
    "a judged answer that is empty": ({"prompt": "a", "completion": "", "label": True}, "'completion' is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_cannot_be_compared_is_refused_before_the_tokenizer_loads(name: str, write: Any) -> None:
    row, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as caught:
        check_rows(write([row]), LM)
    assert "train.jsonl:1: " in str(caught.value)


def test_rows_that_only_the_tokenizer_shows_to_be_wrong(write: Any, byte_level: Any) -> None:
    same = {"prompt": "Hi", "chosen": " a", "rejected": "a "}
    with pytest.raises(InputError, match=r"train.jsonl:2: both answers are the same tokens, so neither is preferred"):
        build([{**same, "chosen": "b"}, same], write, byte_level, as_chat=True)
    skipped = build([{**same, "chosen": "b"}, same], write, byte_level, as_chat=True, skip_bad_rows=True)
    assert (len(skipped), sum(skipped.stats.skipped.values())) == (2, 1)
    with pytest.raises(InputError, match="jsonl:1: data.loss_on: all: answers are compared without their prompts"):
        build([{**same, "chosen": "b"}], write, byte_level, loss_on="all")
    long = {"chosen": said("Hi", "a", "b", "c"), "rejected": said("Hi", "d", "e", "f")}
    with pytest.raises(InputError, match="train.jsonl:1: the chat template rewrites the earlier turns of an answer"):
        build([long], write, byte_level, template=REWRITES)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "weight": 0}, "weight 0"),
        ({"prompt": ANSWER, "chosen": ANSWER, "rejected": answer("b")}, "begins with the assistant"),
    ],
)
def test_rows_without_anything_to_compare_are_dropped(row: Any, reason: str, write: Any) -> None:
    with pytest.raises(InputError, match=f"its only row was dropped: {reason} 1"):
        check_rows(write([row]), LM)


def test_kinds_of_data_are_not_mixed(write: Any) -> None:
    write([{"prompt": "Hi", "chosen": "a", "rejected": "b"}], "a.jsonl")
    pattern = write([{"prompt": "Hi", "completion": "b"}], "b.jsonl").parent / "*.jsonl"
    with pytest.raises(InputError, match=r"one kind of data, not on preference pairs \(.*a.jsonl\) and"):
        check_rows(pattern, LM)


def test_the_report_shows_both_answers_of_a_pair(write: Any, byte_level: Any) -> None:
    examples = build([{"prompt": "Hi", "chosen": f"a {i}", "rejected": "b"} for i in range(3)], write, byte_level)
    report = make_report(examples, None, CausalLM(), byte_level(True, CHATML), samples=2, steps=1)
    assert [sample["where"].rpartition("/")[2] for sample in report["samples"]] == [
        f"train.jsonl:{row}, {side}" for row in (1, 3) for side in ("chosen", "rejected")
    ]

"""Answers are trained exactly as they are generated, whatever a chat template does to earlier turns."""

from __future__ import annotations

from typing import Any

import pytest

from budwood.data import turns
from budwood.data.chat_formats import Messages
from budwood.data.encoder import Encoder, Request
from budwood.data.formats import Dropped
from budwood.data.text import Tokens, tokenise
from budwood.errors import InputError

TURN = "{{ '<|im_start|>' + m.role + '\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + PROMPT
# Renders reasoning only in answers after the last question, or an empty thought if there is none, as Qwen3 does.
FORGETS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}" + TURN + "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}" + PROMPT + "{% if add_generation_prompt and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
# Ends the last answer with a different token than earlier ones, as gpt-oss does.
OTHER_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|eot_id|>' if loop.last and m.role == 'assistant' else '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
# Writes no end token: the header of the next turn ends an answer, as in GLM.
NO_END = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Opens a thought in the generation prompt, and strips thoughts from answers, as DeepSeek R1 does.
OPENS = (
    "{% for m in messages %}" + TURN + "{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}" + PROMPT
    + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
)  # fmt: skip
# Writes an empty thought, in different tokens, only in the generation prompt, as Gemma 4 does.
EMPTY_THOUGHT = CHATML + "{% if add_generation_prompt %}{{ '<|user|>thought\n<|end|>' }}{% endif %}"
# Marks the assistant's turns, including their headers, as SmolLM3 does.
MARKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}" + TURN + "{{ m.content + '<|im_end|>\n' }}"
    "{% endgeneration %}{% else %}" + TURN + "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + PROMPT
)
# Marks the answer, but neither the thought before it nor the end token.
MARKS_LESS = (
    "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' %}{{ '<think></think>' }}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
# Writes two tokens after each answer, as Command R does.
TWO_ENDS = CHATML.replace("m.content + '<|im_end|>\n'", "m.content + '<|end|><|im_end|>'")
# Accepts content only as a list of parts, as vision models do.
PARTS = CHATML.replace("m.content +", "m.content[0].text +")
# Writes a mark before the answer's words, and an empty thought only in the generation prompt, as Command A does.
MARKED = EMPTY_THOUGHT.replace("m.content +", "('<|end|>' if m.role == 'assistant' else '') + m.content +")
# Writes the beginning of a thought, in words of its own, only in the generation prompt, as Apriel does.
WORDS = CHATML + "{% if add_generation_prompt %}{{ 'Here is why:\n' }}{% endif %}"
# Drops the thoughts of earlier calls as soon as an answer follows, as gpt-oss and Kimi K2 do.
DROPS_LATE = (
    "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' and (messages[-1].role == 'user' or loop.last) %}"
    "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}" + PROMPT
)
# Writes the system prompt only before a question that waits for its answer, as Mistral Nemo does.
LATE_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ '<|user|>' }}"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}"
    "{{ m.content + '<|assistant|>' }}{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
)
# Writes the generation prompt after every conversation, and begins each turn with the same mark, as Command R7B does.
ALWAYS = (
    "{% for m in messages %}{{ '<|im_start|><|' + m.role + '|>' + m.content + '<|end|></s>' }}{% endfor %}"
    "{{ '<|im_start|><|assistant|>' }}"
)
# Renders tools, calls and results, as Qwen2.5 does.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    + TURN + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ '<call>' + (c.function | tojson) + '</call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
)  # fmt: skip
# Concatenates arguments as text, and writes an answer after calls unless content is null, as DeepSeek V3 does.
TEXT_CALLS = (
    "{{ tools | length if tools else '' }}{% if tools %}{{ tools[0].function.name }}{% endif %}{% for m in messages %}"
    + TURN + "{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + c.function.arguments + '<|im_end|>' }}"
    "{% endfor %}{% if m.content is not none %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}" + PROMPT
)  # fmt: skip

TWO = [
    {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello there"},
    {"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "I am fine."},
]  # fmt: skip
THOUGHT = [
    m | ({"reasoning_content": f"thought {n}"} if m["role"] == "assistant" else {}) for n, m in enumerate(TWO, 1)
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
CALLS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "7", **CALL}]},
    {"role": "tool", "tool_call_id": "7", "content": '{"degrees": 21}'}, {"role": "assistant", "content": "Fine, 21."},
]  # fmt: skip
TOOL = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def encode(template: str, row: Any, byte_level: Any, **options: Any) -> tuple[list[Tokens], Encoder, Any]:
    """Encode one row; check that every prompt equals that of generation, token by token."""
    row = {"messages": row} if isinstance(row, list) else row
    loss_on = options.pop("loss_on", "assistant")
    encoder = Encoder(byte_level(True, template), 512, options, loss_on=loss_on)
    item = Messages().item(row, "a:1")
    assert not isinstance(item, Dropped)
    return tokenise([item], ["a:1"], encoder)[0], encoder, item


def said(rows: list[Tokens], encoder: Encoder) -> list[str]:
    return [encoder.tokenizer.decode(row.ids[start:stop]) for row in rows for start, stop in row.spans]


def prompts(rows: list[Tokens], encoder: Encoder) -> list[str]:
    return [encoder.tokenizer.decode(row.ids[:start]) for row in rows for start, _ in row.spans]


def generated_from(item: Any, encoder: Encoder) -> list[str]:
    at = [n for n, m in enumerate(item.messages) if m["role"] == "assistant"]
    return [str(t) for t in encoder.chat(Request(item.messages[:n], item.tools, prompt=True) for n in at)]


EMPTY = "<think>\n\n</think>\n\n"
CASES: dict[str, tuple[str, list[Any], int, list[str]]] = {
    "nothing is rewritten": (CHATML, TWO, 1, ["Hello there<|im_end|>", "I am fine.<|im_end|>"]),
    "an empty thought before the last answer": (
        FORGETS, TWO, 2, [EMPTY + "Hello there<|im_end|>", EMPTY + "I am fine.<|im_end|>"],
    ),
    "earlier thoughts are dropped": (
        FORGETS, THOUGHT, 2,
        [f"<think>\nthought {n}\n</think>\n\n{text}<|im_end|>" for n, text in ((2, "Hello there"), (4, "I am fine."))],
    ),
    "earlier answers end differently": (OTHER_END, TWO, 2, ["Hello there<|eot_id|>", "I am fine.<|eot_id|>"]),
    "the next turn ends an answer": (NO_END, TWO, 1, ["Hello there<|user|>", "I am fine.<|user|>"]),
    "two tokens end an answer": (TWO_ENDS, TWO, 1, ["Hello there<|end|><|im_end|>", "I am fine.<|end|><|im_end|>"]),
    "the prompt opens a thought": (
        OPENS, TWO, 2, ["\n</think>\n\nHello there<|im_end|>", "\n</think>\n\nI am fine.<|im_end|>"],
    ),
    "the prompt opens a thought that the message has": (
        OPENS, THOUGHT, 2,
        ["thought 2\n</think>\n\nHello there<|im_end|>", "thought 4\n</think>\n\nI am fine.<|im_end|>"],
    ),
    "the prompt has an empty thought": (EMPTY_THOUGHT, TWO, 2, ["Hello there<|im_end|>", "I am fine.<|im_end|>"]),
    "a mark, and an empty thought in the prompt": (
        MARKED, TWO, 2, ["<|end|>Hello there<|im_end|>", "<|end|>I am fine.<|im_end|>"],
    ),
    "the prompt has words of its own": (WORDS, TWO, 2, ["Hello there<|im_end|>", "I am fine.<|im_end|>"]),
    "earlier thoughts are dropped once an answer follows": (
        DROPS_LATE, THOUGHT, 2,
        [f"<think>thought {n}</think>{text}<|im_end|>" for n, text in ((2, "Hello there"), (4, "I am fine."))],
    ),
    "the prompt is always written": (ALWAYS, TWO, 1, ["Hello there<|end|></s>", "I am fine.<|end|></s>"]),
    "the system prompt is only in the prompt": (
        LATE_SYSTEM, [{"role": "system", "content": "Be kind."}, *TWO], 2,
        ["Hello there<|end|>", "I am fine.<|end|>"],
    ),
    "marks around turns": (MARKS, TWO, 1, ["Hello there<|im_end|>", "I am fine.<|im_end|>"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_answers_as_they_are_generated(case: str, byte_level: Any) -> None:
    template, messages, examples, expected = CASES[case]
    rows, encoder, item = encode(template, messages, byte_level)
    assert len(rows) == examples
    assert said(rows, encoder) == expected
    assert prompts(rows, encoder) == generated_from(item, encoder)
    assert all(encoder.plain([encoder.tokenizer.decode(row.ids[:s])])[0] == row.ids[:s] for row in rows
               for s, _ in row.spans[:1])  # fmt: skip


def test_a_split_is_reported_and_so_is_what_the_template_adds(byte_level: Any) -> None:
    _, encoder, _ = encode(FORGETS, TWO, byte_level)
    assert encoder.remarks == {
        "answers begin with '<think>\\n\\n</think>', which the chat template writes and which has a loss": 2,
        "conversations split, since the chat template rewrites earlier turns": 1,
    }
    rows, encoder, _ = encode(FORGETS, TWO, byte_level, enable_thinking=False)
    assert said(rows, encoder) == ["Hello there<|im_end|>", "I am fine.<|im_end|>"]
    assert prompts(rows, encoder)[0].endswith(EMPTY)
    with pytest.raises(InputError, match="a:1: message 2: .*the generation prompt has something else. Set data.templ"):
        encode(FORGETS, THOUGHT, byte_level, enable_thinking=False)


def test_only_marked_text_and_the_end_token_have_a_loss(byte_level: Any) -> None:
    rows, encoder, _ = encode(MARKS_LESS, TWO, byte_level)
    assert said(rows, encoder) == ["Hello there<|im_end|>", "I am fine.<|im_end|>"]
    assert prompts(rows, encoder)[0].endswith("assistant\n<think></think>")


def test_content_as_parts(byte_level: Any) -> None:
    rows, encoder, _ = encode(PARTS, TWO, byte_level)
    assert said(rows, encoder) == ["Hello there<|im_end|>", "I am fine.<|im_end|>"]


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'], ids=["object", "text"])
@pytest.mark.parametrize("template", [TOOLS, TEXT_CALLS], ids=["objects", "texts"])
def test_calls_have_a_loss_and_their_results_none(template: str, arguments: Any, byte_level: Any) -> None:
    messages = [dict(m) for m in CALLS]
    messages[1]["tool_calls"] = [
        {"id": "7", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    ]
    rows, encoder, _ = encode(template, {"messages": messages, "tools": TOOL}, byte_level)
    call = '<call>{"name": "weather", "arguments": {"city": "Paris"}}</call>' if template == TOOLS else (
        'weather {"city": "Paris"}')  # fmt: skip
    assert said(rows, encoder) == [call + "<|im_end|>", "Fine, 21.<|im_end|>"]
    assert '{"degrees": 21}' in prompts(rows, encoder)[1]
    assert "weather" in prompts(rows, encoder)[0]
    assert (
        encoder.remarks["conversations with 'tool_call_id' in tool messages, which the chat template leaves out"] == 1
    )


@pytest.mark.parametrize("template", ["None of it. " + TOOLS, TOOLS.replace("m.content or ''", "m.content")])
def test_missing_content_is_not_written_as_none(template: str, byte_level: Any) -> None:
    rows, encoder, _ = encode(template, {"messages": CALLS, "tools": TOOL}, byte_level)
    call = '<call>{"name": "weather", "arguments": {"city": "Paris"}}</call>'
    assert said(rows, encoder) == [call + "<|im_end|>", "Fine, 21.<|im_end|>"]


def test_a_text_and_calls_of_sharegpt_are_one_turn(byte_level: Any) -> None:
    """Its roles allow no message with both; the model must not end its turn before the calls."""
    call = '{"name": "weather", "arguments": {"city": "%s"}}'
    row = [
        {"from": "human", "value": "Weather?"}, {"from": "gpt", "value": "I will look."},
        {"from": "function_call", "value": call % "Paris"}, {"from": "function_call", "value": call % "Rome"},
        {"from": "observation", "value": "sun"}, {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains in Rome."},
    ]  # fmt: skip
    rows, encoder, _ = encode(TOOLS, {"messages": row, "tools": TOOL}, byte_level)
    calls = "".join(f"<call>{call % city}</call>" for city in ("Paris", "Rome"))
    assert said(rows, encoder) == [f"I will look.{calls}<|im_end|>", "It rains in Rome.<|im_end|>"]


def test_legacy_functions_are_tools(byte_level: Any) -> None:
    row = {"messages": CALLS, "tools": TOOL}
    legacy = [dict(m) for m in CALLS]
    legacy[1] = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "weather", "arguments": '{"city": "Paris"}'},
    }
    legacy[2] = {"role": "function", "name": "weather", "content": '{"degrees": 21}'}
    old, _, _ = encode(TOOLS, {"messages": legacy, "functions": [TOOL[0]["function"]]}, byte_level)
    assert old == encode(TOOLS, row, byte_level)[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": TWO, "tools": TOOL}, "the chat template leaves out the column 'tools'. Remove it, or"),
        ({"messages": THOUGHT}, "message 2: the chat template leaves out or changes 'reasoning_content' of it"),
        ({"messages": CALLS}, "message 2: the chat template leaves out 'weather' of its tool calls"),
        ({"messages": [TWO[0] | {"name": "Ann"}, *TWO[1:]]}, "leaves out 'name' of message 1 .user.. Remove it"),
        ({"messages": [*TWO[:3], TWO[3] | {"refusal": "no"}]}, "leaves out 'refusal' of message 4 .assistant."),
        ({"messages": TWO, "chat_template_kwargs": "no"}, "field 'chat_template_kwargs' is not JSON"),
        ({"messages": TWO, "tools": [{}]}, "tool 1 has no name"),
        ({"messages": [{"role": "system", "content": "a"}, *TWO], "system": "b"}, "both column 'system' and message 1"),
        ({"messages": [TWO[0] | {"train": True}, *TWO[1:]]}, "message 1: 'train' is true, but only an assistant"),
        ({"messages": [*TWO[:3], TWO[3] | {"loss": "yes"}]}, "message 4: 'loss' must be true or false, not 'yes'"),
        ({"messages": [TWO[0] | {"tool_calls": [CALL]}, *TWO[1:]]}, "only an assistant message may have tool calls"),
        (
            {"messages": [TWO[0], {"role": "assistant", "content": "", "tool_calls": [CALL | {"cost": 3}]}]},
            "message 2: tool call 1: 'cost' is not supported",
        ),
        (
            {"messages": [TWO[0], {"role": "assistant", "function_call": {"name": "f", "arguments": "{"}}]},
            "message 2: tool call 1: 'arguments' is not JSON",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_neither_used_nor_rendered_is_refused(row: dict[str, Any], message: str, byte_level: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        encode(CHATML, row, byte_level)
    assert str(caught.value).startswith("a:1: ")


@pytest.mark.parametrize("key", ["train", "training", "trainable", "loss", "loss_mask", "weight"])
def test_an_answer_without_a_loss_is_context(key: str, byte_level: Any) -> None:
    messages = [TWO[0], TWO[1] | {key: 0 if key == "weight" else False}, *TWO[2:]]
    rows, encoder, _ = encode(CHATML, messages, byte_level)
    assert said(rows, encoder) == ["I am fine.<|im_end|>"]
    assert "Hello there<|im_end|>" in prompts(rows, encoder)[0]


def test_metadata_of_messages_is_ignored_and_named(byte_level: Any) -> None:
    rows, encoder, _ = encode(CHATML, [m | {"timestamp": 3, "annotations": None} for m in TWO], byte_level)
    assert said(rows, encoder) == ["Hello there<|im_end|>", "I am fine.<|im_end|>"]
    assert encoder.remarks == {"conversations with 'timestamp' in messages, which is ignored": 1}


def test_a_row_sets_variables_of_the_template(byte_level: Any) -> None:
    row = {"messages": TWO[:2], "chat_template_kwargs": {"enable_thinking": False}}
    rows, encoder, _ = encode(FORGETS, row, byte_level)
    assert said(rows, encoder) == ["Hello there<|im_end|>"]


def test_loss_on_the_last_answer_or_on_everything(byte_level: Any) -> None:
    rows, encoder, _ = encode(CHATML, TWO, byte_level, loss_on="last")
    assert said(rows, encoder) == ["I am fine.<|im_end|>"]
    rows, encoder, _ = encode(CHATML, TWO, byte_level, loss_on="all")
    (whole,) = encoder.chat([Request(TWO)])
    assert said(rows, encoder) == [whole]
    assert encoder.tokenizer.convert_tokens_to_ids("<|im_end|>") in encoder.stop_ids
    with pytest.raises(InputError, match="data.loss_on: all, messages cannot have weights of their own"):
        encode(CHATML, [TWO[0], TWO[1] | {"weight": 0}, *TWO[2:]], byte_level, loss_on="all")
    rows, encoder, _ = encode(FORGETS, TWO, byte_level, loss_on="last")
    assert said(rows, encoder) == [EMPTY + "I am fine.<|im_end|>"]


def test_tokenising_is_linear_in_the_number_of_turns(byte_level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(True, CHATML)
    messages = TWO * 50
    (item,) = [Messages().item({"messages": messages}, "a:1")]
    encoder = Encoder(tokenizer, 1 << 20)
    sizes = []
    plain = encoder._call
    monkeypatch.setattr(encoder, "_call", lambda texts, **o: sizes.append(sum(map(len, texts))) or plain(texts, **o))
    ((row,),) = tokenise([item], ["a:1"], encoder)
    text = next(encoder.chat([Request(messages)]))
    assert sum(sizes) < 2 * len(text)
    for (start, stop), end in zip(row.spans, (len(t) for t in generated_from(item, encoder)), strict=True):
        assert plain([text[:end]], add_special_tokens=False)[0] == row.ids[:start]
        assert tokenizer.decode(row.ids[start:stop]).endswith("<|im_end|>")


def test_tokens_are_those_of_the_prefixes_with_any_tokenizer(sentencepiece: Any) -> None:
    """Text between marks is tokenised on its own: a tokenizer that puts spaces before texts changes nothing."""
    sentencepiece.chat_template = (
        "{% for m in messages %}{{ bos_token + m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token + 'assistant:' }}{% endif %}"
    )
    encoder = Encoder(sentencepiece, 512)
    item = Messages().item({"messages": TWO}, "a:1")
    ((row,),) = tokenise([item], ["a:1"], encoder)
    starts = [start for start, _ in row.spans]
    assert [row.ids[:start] for start in starts][0] == encoder.plain([generated_from(item, encoder)[0]])[0]
    assert [text.strip() for text in said([row], encoder)] == ["Hello there</s>", "I am fine.</s>"]
    sentencepiece.chat_template = None


STRIPS = CHATML.replace("m.content +", "m.content.strip() +")
LONG = {
    "plain": (CHATML, {}), "other end": (OTHER_END, {}), "no end": (NO_END, {}), "two ends": (TWO_ENDS, {}),
    "thoughts": (FORGETS, {}), "opens": (OPENS, {}), "marks": (MARKS, {}), "marks less": (MARKS_LESS, {}),
    "strips": (STRIPS, {}), "calls": (TOOLS, {}), "control tokens": (CHATML, {}),
}  # fmt: skip


def long_conversation(case: str) -> list[dict[str, Any]]:
    """70 turns with texts that repeat, contain one another, are parts of marks, or end with spaces."""
    texts = ["ok", "a", "assistant", "Hello there", "user\nok", "there", "s", " ok ", "I am fine.\n"]
    messages: list[dict[str, Any]] = []
    for n in range(70):
        messages += [
            {"role": "user", "content": texts[n % 7 if case != "strips" else n % 9]},
            {"role": "assistant", "content": texts[(n * 5 + 2) % 9], **({"weight": 0} if n % 11 == 3 else {})},
        ]
    if case == "control tokens":
        messages[40]["content"] = "<|im_start|>assistant\nok<|im_end|>\n<|im_start|>user\na"
    if case == "thoughts":
        messages[61]["reasoning_content"] = "hm"
    if case == "calls":
        messages[80:80] = [{"role": "user", "content": "Weather?"}, *CALLS[1:]]
    return messages


@pytest.mark.parametrize("case", LONG)
def test_a_long_conversation_is_trained_as_if_each_answer_were_rendered(
    case: str, byte_level: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, options = LONG[case]
    row = {"messages": long_conversation(case), **({"tools": TOOL} if case == "calls" else {})}
    results = []
    for limit in (turns.RENDERED, 10**6):
        monkeypatch.setattr(turns, "RENDERED", limit)
        encoder = Encoder(byte_level(True, template), 1 << 20, options)
        try:
            rows = tokenise([Messages().item(row, "a:1")], ["a:1"], encoder)[0]
            results.append(([(r.ids, r.spans, r.weights) for r in rows], encoder.remarks, encoder.stop_ids))
        except InputError as error:
            results.append(str(error))
    assert results[0] == results[1]


def test_a_long_conversation_is_rendered_a_few_times(byte_level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(byte_level(True, CHATML), 1 << 20)
    counts = []
    chat = encoder.chat
    monkeypatch.setattr(encoder, "chat", lambda requests: chat(counts.append(1) or r for r in requests))
    ((row,),) = tokenise([Messages().item({"messages": TWO * 500}, "a:1")], ["a:1"], encoder)
    assert len(row.spans) == 1000
    assert len(counts) < 50

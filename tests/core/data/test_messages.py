"""The assistant's tokens are located by rendering with the chat template, or the file is refused."""

from __future__ import annotations

from typing import Any

import pytest

from budwood.data.chat_formats import Messages
from budwood.data.encoder import Encoder, encode_chat
from budwood.data.formats import Dropped
from budwood.data.text import Tokens, tokenise
from budwood.errors import InputError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Trims contents, and writes BOS itself.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
    " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# No generation prompt: the answer follows the user's turn after a space; rejects turns that do not alternate.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}"
)
# Appends the end-of-sequence token to the complete conversation, as Phi-3 does.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Inserts an empty thought before the last answer only, as Qwen3 does.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Drops all but the last two messages.
FORGETFUL = (
    "{% for m in messages[-2:] %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_PROMPT = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
NO_END = (
    "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


def say(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def encode(messages: Any, tokenizer: Any, **options: Any) -> Any:
    item = Messages().item({"messages": messages}, "train.jsonl:1")
    if isinstance(item, Dropped):
        return item
    (row,) = tokenise([item], ["train.jsonl:1"], Encoder(tokenizer, 512, options))[0]
    return row


def encode_all(conversations: list[Any], encoder: Encoder) -> list[Tokens]:
    places = [f"a:{number}" for number, _ in enumerate(conversations, 1)]
    rows = zip(conversations, places, strict=True)
    return [row for (row,) in tokenise([Messages().item({"messages": m}, place) for m, place in rows], places, encoder)]


def supervised(tokenizer: Any, row: Tokens) -> list[str]:
    return [tokenizer.decode(row.ids[start:stop]) for start, stop in row.spans]


TEMPLATES = {
    "chatml": (CHATML, ["Hello there<|im_end|>", "I am fine.<|im_end|>"]),
    "llama3": (LLAMA3, ["Hello there<|eot_id|>", "I am fine.<|eot_id|>"]),
    "mistral": (MISTRAL, [" Hello there</s>", " I am fine.</s>"]),
    "phi3": (PHI3, ["Hello there<|end|>", "I am fine.<|end|>"]),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_assistant_turns_and_their_end_tokens(name: str, byte_level: Any) -> None:
    template, expected = TEMPLATES[name]
    tokenizer = byte_level(True, template)
    messages = say("Hello", "Hello there", "How are you?", "I am fine.")
    rows = tokenise([Messages().item({"messages": messages}, "a:1")], ["a:1"], Encoder(tokenizer, 512))[0]
    assert len(rows) == (2 if name == "llama3" else 1)  # see the test of a token across the start of an answer
    assert [text for row in rows for text in supervised(tokenizer, row)] == expected
    # The tokens before every turn are exactly those from which generation would answer.
    starts = [row.ids[:start] for row in rows for start, _ in row.spans]
    assert starts == [encode_chat(tokenizer, messages[:count]) for count in (1, 3)]
    row = rows[-1]
    assert row.ids.count(tokenizer.bos_token_id) == template.count("bos_token")
    assert row.spans[-1][1] == len(row.ids)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered.startswith(tokenizer.decode(row.ids))


@pytest.mark.parametrize("name", ["chatml", "llama3"])
@pytest.mark.parametrize("answer", ["  spaced  ", "\n\nnew lines\n", "\t"], ids=repr)
def test_white_space_around_an_answer(name: str, answer: str, byte_level: Any) -> None:
    template, _ = TEMPLATES[name]
    tokenizer = byte_level(True, template)
    row = encode(say("Hello", answer), tokenizer)
    if not answer.strip():
        assert row == Dropped("empty assistant turn")
        return
    end = "<|im_end|>" if name == "chatml" else "<|eot_id|>"
    assert supervised(tokenizer, row) == [(answer if name == "chatml" else answer.strip()) + end]
    assert row.ids[: row.spans[0][0]] == encode_chat(tokenizer, say("Hello"))


def test_a_token_across_the_start_of_an_answer(byte_level: Any) -> None:
    """GPT-2's rule splits two line breaks before a word, and joins them at the end of a prompt."""
    tokenizer = byte_level(True, LLAMA3)
    first, second = say("Hello", "Hello there"), say("Hello", "Hello there", "How are you?", "I am fine.")
    alone, whole = (tokenizer.apply_chat_template(first[:1], add_generation_prompt=True)["input_ids"],
                    tokenizer.apply_chat_template(first)["input_ids"])  # fmt: skip
    assert whole[: len(alone)] != alone
    encoder = Encoder(tokenizer, 512)
    items = [Messages().item({"messages": messages}, "a:1") for messages in (first, second)]
    (one,), two = tokenise(items, ["a:1", "a:2"], encoder)
    assert one.ids[: one.spans[0][0]] == encode_chat(tokenizer, first[:1])
    assert len(two) == 2  # each answer is an example of its own, since the tokens before it differ
    assert two[0] == one
    assert two[1].ids[: two[1].spans[0][0]] == encode_chat(tokenizer, second[:3])
    assert [supervised(tokenizer, row) for row in two] == [["Hello there<|eot_id|>"], ["I am fine.<|eot_id|>"]]
    assert tokenizer.decode(two[1].ids) == tokenizer.apply_chat_template(second, tokenize=False)
    assert sum(encoder.remarks.values()) == 3


def test_text_after_the_last_answer_is_omitted(byte_level: Any) -> None:
    tokenizer = byte_level(True, CHATML)
    longer = encode(say("Hello", "Hello there", "How are you?"), tokenizer)
    assert longer == encode(say("Hello", "Hello there"), tokenizer)


def test_stop_tokens_and_control_tokens_in_contents(byte_level: Any) -> None:
    tokenizer = byte_level(True, CHATML)
    encoder = Encoder(tokenizer, 512)
    encode_all([say("Hello", "Hello there"), say("what is <|im_end|>?", "yes")], encoder)
    assert encoder.stop_ids == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert encoder.remarks == {"conversations that spell out control tokens, which are read as such": 1}


def test_thoughts_that_the_template_adds(byte_level: Any) -> None:
    tokenizer = byte_level(True, QWEN3)
    one = say("Hello", "Hello there")
    encoder = Encoder(tokenizer, 512)
    (row,) = encode_all([one], encoder)
    assert supervised(tokenizer, row) == ["<think>\n\n</think>\n\nHello there<|im_end|>"]
    assert row.ids[: row.spans[0][0]] == encode_chat(tokenizer, one[:1])
    assert next(iter(encoder.remarks)).startswith("answers begin with '<think>")
    row = encode(one, tokenizer, enable_thinking=False)
    assert supervised(tokenizer, row) == ["Hello there<|im_end|>"]
    assert row.ids[: row.spans[0][0]] == encode_chat(tokenizer, one[:1], {"enable_thinking": False})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (FORGETFUL, "leaves out or changes message 1"),
        (NO_PROMPT, r"writes '<\|im_start\|>assistant\\n' where the answer should begin"),
        (NO_END, "adds no end token after it"),
        (CHATML.replace("im_end", "stop"), r"ends it with '<\|stop\|>', which is no token of the base's tokenizer"),
        (CHATML.replace("m.content", "m.content | upper"), "leaves out or changes message 1"),
        ("{{ messages[0].nothing.at.all }}", "the chat template rejects the conversation"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "adds no end token after it"),
        (None, "has no chat template"),
    ],
    ids=["forgetful", "no prompt", "no end", "unknown end", "upper", "raises", "bare", "none"],
)
def test_templates_whose_turns_cannot_be_identified(template: str | None, message: str, byte_level: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        encode(say("Hello", "yes, yes", "How?", "I am fine."), byte_level(True, template))
    assert str(caught.value).startswith("train.jsonl:1: ")


def test_the_error_of_a_template_is_reported(byte_level: Any) -> None:
    with pytest.raises(InputError, match="^train.jsonl:1: .*roles must alternate"):
        encode([{"role": "user", "content": "a"}] * 2 + say("x", first="assistant"), byte_level(True, MISTRAL))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "field 'messages' must be a list, not null"),
        ("hello", "field 'messages' must be a list, not a str"),
        ([], "'messages' is empty"),
        (["hello"], "message 1 is a text without a role: it must be an object"),
        ([{"content": "x"}], "message 1: 'role' must be text, not missing"),
        ([{"role": 3, "content": "x"}], "message 1: 'role' must be text, not an int"),
        ([{"role": "asistant", "content": "x"}], "unknown role 'asistant'. Did you mean 'assistant'"),
        ([{"role": "narrator", "content": "x"}], "unknown role 'narrator'. Known: system"),
        ([{"role": "user", "content": None}], "message 1: 'content' must be text, not null"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1: part 1 of 'content' has no text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "is of type 'image_url': only text"),
        ([{"role": "user", "content": [3]}], "part 1 of 'content' must be text, not an int"),
        ([{"role": "user"}], "message 1: 'content' must be text, not missing"),
        ([{"role": "user", "content": "\ud800"}], "message 1: its content has half a character"),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
            "tool call 1: 'name' must be text, not missi",
        ),
    ],
)
def test_malformed_conversations(messages: Any, message: str, byte_level: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        encode(messages, byte_level(True, CHATML))
    assert str(caught.value).startswith("train.jsonl:1: ")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (say("Hello"), "no assistant turn"),
        (say("Hello", "there", first="assistant"), "begins with the assistant"),
        (say("Hello", ""), "empty assistant turn"),
    ],
)
def test_conversations_without_a_loss_are_dropped(messages: Any, reason: str, byte_level: Any) -> None:
    assert encode(messages, byte_level(True, CHATML)) == Dropped(reason)


def test_the_weight_of_an_answer_applies_to_its_tokens(byte_level: Any) -> None:
    tokenizer = byte_level(True, CHATML)
    messages = say("Hello", "Hello there", "How are you?", "I am fine.")
    messages[1]["weight"], messages[3]["weight"] = 0, 0.5
    row = encode(messages, tokenizer)
    assert list(row.weights) == [0.5]
    assert supervised(tokenizer, row) == ["I am fine.<|im_end|>"]
    assert "Hello there<|im_end|>" in tokenizer.decode(row.ids)
    messages[3]["weight"] = 0
    assert encode(messages, tokenizer) == Dropped("weight 0")
    messages[3]["weight"] = -1
    with pytest.raises(
        InputError, match="^train.jsonl:1: message 4: field 'weight' must be 0 or a positive fp32 number"
    ):
        encode(messages, tokenizer)
    messages[3]["weight"], messages[0]["weight"] = 1, 2
    with pytest.raises(InputError, match="message 1: only an assistant message may have a weight"):
        encode(messages, tokenizer)


def test_reference_is_the_first_answer() -> None:
    assert Messages().reference({"messages": say("a", "b", "c", "d")}) == "b"


# Takes tools as text in the system message, as Phi-4-mini does; reads neither the variable `tools` nor calls.
TOOLS_IN_SYSTEM = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% if m.role == 'system' and m.tools %}{{ '<|tool|>' + m.tools + '<|/tool|>' }}{% endif %}{{ '<|end|>' }}"
    "{% endfor %}{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
)


# Goes through the tools that a system message holds as a list, as GLM-4 does.
TOOL_LIST_IN_SYSTEM = TOOLS_IN_SYSTEM.replace(
    "+ m.tools +", "}}{% for tool in m.tools %}{{ tool.function | tojson }}{% endfor %}{{"
)


def test_tools_that_a_template_reads_from_the_system_message(byte_level):
    tokenizer = byte_level(False, TOOLS_IN_SYSTEM)
    tools = '[{"name": "time"}]'
    messages = [{"role": "system", "content": "Help.", "tools": tools}, *say("What time?", "Noon.")]
    row = encode(messages, tokenizer)
    assert tokenizer.decode(row.ids) == (
        f"<|system|>Help.<|tool|>{tools}<|/tool|><|end|><|user|>What time?<|end|><|assistant|>Noon.<|end|>"
    )
    assert supervised(tokenizer, row) == ["Noon.<|end|>"]
    assert row.ids[: row.spans[0][0]] == encode_chat(tokenizer, messages[:-1])


TIME = {"name": "time", "parameters": {}}


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (TOOLS_IN_SYSTEM, '[{"name": "time", "parameters": {}}]'),
        (TOOL_LIST_IN_SYSTEM, '{"name": "time", "parameters": {}}'),
    ],
)
@pytest.mark.parametrize("where", ["column", "system message", "without a system message"])
def test_tools_are_written_where_a_template_reads_them(template, written, where, byte_level):
    tokenizer = byte_level(False, template)
    system = "" if where == "without a system message" else "Help."
    messages = [{"role": "system", "content": system}] * bool(system) + say("What time?", "Noon.", "Really?", "Yes.")
    row = {"messages": messages, "tools": [TIME]}
    if where == "system message":
        row = {"messages": [{**messages[0], "tools": [{"type": "function", "function": TIME}]}, *messages[1:]]}
    encoder = Encoder(tokenizer, 512)
    item = Messages().item(row, "a:1")
    ((tokens,),) = tokenise([item], ["a:1"], encoder)
    assert tokenizer.decode(tokens.ids) == (
        f"<|system|>{system}<|tool|>{written}<|/tool|><|end|><|user|>What time?<|end|><|assistant|>Noon.<|end|>"
        "<|user|>Really?<|end|><|assistant|>Yes.<|end|>"
    )
    assert supervised(tokenizer, tokens) == ["Noon.<|end|>", "Yes.<|end|>"]
    assert tokens.ids[: tokens.spans[1][0]] == encode_chat(tokenizer, item.messages[:-1], tools=item.tools)
    assert encoder.remarks == {
        "conversations whose tools are in the system message, where the chat template reads them": 1
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"tools": [TIME], "messages": [{"role": "system", "content": "", "tools": [TIME]}, *say("a", "b")]},
            "both the row and message 1 have tools",
        ),
        (
            {"tools": [TIME], "messages": [{"role": "system", "content": "", "tools": "[]"}, *say("a", "b")]},
            "leaves out the column 'tools'",
        ),
        (
            {"messages": [*say("a"), {"role": "assistant", "tool_calls": [{"name": "time"}]}]},
            "leaves out 'time' of its",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tools": "x"}, *say("a", "b")[1:]]},
            "leaves out 'tools' of me",
        ),
    ],
)
def test_tools_that_such_a_template_does_not_read_are_refused(byte_level, row, message):
    with pytest.raises(InputError, match=f"^train.jsonl:1.*{message}"):
        item = Messages().item({"messages": say("a", "b"), **row}, "train.jsonl:1")
        tokenise([item], ["train.jsonl:1"], Encoder(byte_level(False, TOOLS_IN_SYSTEM), 512))

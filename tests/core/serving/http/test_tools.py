"""Tool calls: their form is read off the chat template, and they are found in answers as templates write them."""

from __future__ import annotations

import json

import pytest
from starlette.testclient import TestClient
from tests.core.serving.http.conftest import HELLO, ask, client, open_service

from budwood.data.encoder import Encoder
from budwood.serving.http import generation
from budwood.serving.http.tools import CallForm, CallReader, find_call_form

HEAD = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
TAIL = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HERMES = (
    HEAD + "<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n" + TAIL
)
LLAMA = (
    HEAD + "<|im_start|>{{ m.role }}\n{% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n" + TAIL
)
MISTRAL = (
    HEAD + "<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% if m.tool_calls %}<|end|>["
    '{% for c in m.tool_calls %}{{ ", " if not loop.first }}{"name": "{{ c.function.name }}", "arguments": '
    '{{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}{% endfor %}]{% endif %}<|im_end|>\n' + TAIL
)
PLAIN = HEAD + "<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}" \
    "{{ c.function.name }}({{ c.function.arguments.values() | join }}){% endfor %}<|im_end|>\n" + TAIL  # fmt: skip
TOOL = {"type": "function", "function": {
    "name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}},
}}  # fmt: skip
CALL = '{"name": "weather", "arguments": {"city": "Köln"}}'


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (HERMES, CallForm("<tool_call>", "</tool_call>", "arguments")),
        (LLAMA, CallForm("", "", "parameters")),
        (MISTRAL, CallForm("", "", "arguments")),  # its mark is a special token, which is no part of a text
        (PLAIN, None),
    ],
    ids=["hermes", "llama", "mistral", "plain"],
)
def test_the_form_of_calls_is_read_off_the_template(byte_level, template, form):
    assert find_call_form(Encoder(byte_level(template=template))) == form


@pytest.mark.parametrize(
    ("start", "text", "content", "cities"),
    [
        ("<tool_call>", f"<tool_call>\n{CALL}\n</tool_call>", "", ["Köln"]),
        (
            "<tool_call>",
            f"I look.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call> So.",
            "I look.\nSo.",
            2,
        ),
        ("<tool_call>", "a <tool_ b < c <tool_call> of a kind", "a <tool_ b < c <tool_call> of a kind", []),
        ("<tool_call>", '<tool_call>{"name": "other", "arguments": {}}</tool_call>', None, []),
        ("<tool_call>", '<tool_call>{"name": "weather", "argum', None, []),
        ("", f"{CALL}", "", ["Köln"]),
        ("", f"[{CALL}, {CALL}]", "", 2),
        ("", f"{CALL}; {CALL}", "", 2),
        ("", "[1] is a citation.", "[1] is a citation.", []),
        ("", "Plain text {1}", "Plain text {1}", []),
    ],
)
def test_calls_are_separated_from_text_in_pieces_of_any_size(start, text, content, cities):
    content = text if content is None else content
    for size in (1, 3, 1000):
        reader = CallReader(CallForm(start, "</tool_call>" if start else "", "arguments"), ["weather"])
        said = "".join(reader.add(text[i : i + size]) for i in range(0, len(text), size))
        rest, calls = reader.end()
        assert said + rest == content and "<tool_call>{" not in said
        found = [json.loads(call["function"]["arguments"])["city"] for call in calls]
        assert found == (["Köln"] * cities if isinstance(cities, int) else cities)
        assert len({call["id"] for call in calls}) == len(calls)


@pytest.fixture(scope="module")
def hermes(tiny_base) -> TestClient:
    """A client of a base whose template takes tools."""
    service = open_service(tiny_base)
    service.engine.tokenizer.chat_template = HERMES
    return client(service)


def test_an_answer_with_calls_is_whole_or_streamed_as_openai_does(hermes, monkeypatch):
    """The tiny base calls no tools, so its text is put in the place of its answer."""

    class Said(CallReader):
        def end(self):
            self._text, self._sent = f"I look. <tool_call>\n{CALL}\n</tool_call>", 0
            return super().end()

        def add(self, piece):
            return ""

    monkeypatch.setattr(generation, "CallReader", Said)
    whole = ask(hermes, model="tiny", tools=[TOOL]).json()["choices"][0]
    assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] == "I look."
    [call] = whole["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Köln"} and call["type"] == "function"
    lines = ask(hermes, model="tiny", tools=[TOOL], stream=True).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if "{" in line]
    deltas = [chunk["delta"] for chunk in chunks]
    assert [delta["tool_calls"][0]["index"] for delta in deltas if "tool_calls" in delta] == [0]
    assert chunks[-1]["finish_reason"] == "tool_calls"
    # What the client sends back afterwards is rendered, arguments and all.
    turn = [*HELLO, whole["message"], {"role": "tool", "tool_call_id": call["id"], "content": "rain"}]
    more = ask(hermes, model="tiny", tools=[TOOL], messages=turn).json()["usage"]["prompt_tokens"]
    fewer = ask(hermes, model="tiny", tools=[TOOL], tool_choice="none", messages=turn).json()["usage"]["prompt_tokens"]
    assert more > fewer > 40


def test_a_template_without_a_known_form_of_calls_is_said(hermes):
    hermes.app.service.engine.tokenizer.chat_template = PLAIN
    answer = ask(hermes, model="tiny", tools=[TOOL]).json()
    assert "stay in the text" in answer["warnings"][0]
    assert "warnings" not in ask(hermes, model="tiny").json()

"""The forms in which chat templates expect messages, and whether a rendering has all of their words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Form = Callable[[Message], Message]


def _plain(message: Message) -> Message:
    return message


def _no_content(message: Message) -> Message:
    """Write no content beside calls: some templates otherwise write an empty answer after them."""
    return message if message.get("content") or not message.get("tool_calls") else {**message, "content": None}


def _text_arguments(message: Message) -> Message:
    """Write the arguments of calls as JSON: some templates join them to a text."""
    if not message.get("tool_calls"):
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [{**f, "arguments": json.dumps(f["arguments"], ensure_ascii=False)} for f in functions]
    calls = [{**call, "function": text} for call, text in zip(message["tool_calls"], texts, strict=True)]
    return {**message, "tool_calls": calls}


def _parts(message: Message) -> Message:
    """Write content as a list of parts: templates of models that see images may expect it."""
    if not isinstance(message.get("content"), str):
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


FORMS: Sequence[Form] = (
    _no_content, lambda message: _no_content(_text_arguments(message)), _plain, _text_arguments, _parts,
)  # fmt: skip
"""In the order in which they are tried; the first that a template renders whole is used."""


def find_left_out(messages: Sequence[Message], text: str, everyone: bool = False) -> int | None:
    """Return the index of the first message whose words are not in a rendering; None if there is none.

    Earlier answers may be shortened, as they are in generation, so they are only looked for if `everyone`.
    """
    position = 0
    for index, message in enumerate(messages):
        content = message.get("content") or ""
        if not isinstance(content, str) or message["role"] == "assistant" and not everyone:
            continue
        content = content.strip()
        at = text.find(content, position)
        if at >= 0:
            position = at
        elif content not in text and not any(form in text for form in _json_forms(content)):
            return index
    return None


def says_none(messages: Sequence[Message], text: str) -> bool:
    """Return whether a template may have written "None" for content that is not there."""
    absent = any(message.get("content", "") is None for message in messages)
    return absent and "None" in text and "None" not in str(_plain_values(messages))


def _plain_values(value: Any) -> Any:
    """Return a value with its nulls left out."""
    if isinstance(value, Mapping):
        return {key: _plain_values(item) for key, item in value.items() if item is not None}
    return [_plain_values(item) for item in value if item is not None] if isinstance(value, list | tuple) else value


def _json_forms(content: str) -> Iterator[str]:
    """Yield how a template may write a tool's result: as a JSON text, or as the object that its JSON describes."""
    for ascii_only in (False, True):
        yield json.dumps(content, ensure_ascii=ascii_only)[1:-1]
        try:
            yield json.dumps(json.loads(content), ensure_ascii=ascii_only)
        except ValueError:
            continue

"""Tool calls in an answer's text, found by the form in which the chat template itself writes them."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from budwood.data.encoder import Encoder, Request
from budwood.data.forms import FORMS
from budwood.errors import InputError

NAME, KEY, VALUE = "probe_tool", "probe_key", "probe_value"
ARGUMENTS = ("arguments", "parameters")
_TOOL = {"type": "function", "function": {
    "name": NAME, "description": "Probes.",
    "parameters": {"type": "object", "properties": {KEY: {"type": "string", "description": "A text."}}},
}}  # fmt: skip
_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}}
_MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Probe?"}, {"role": "assistant", "content": "", "tool_calls": [_CALL]},
]  # fmt: skip


@dataclass(frozen=True)
class CallForm:
    """How a template writes calls: as JSON objects with name and arguments, each after `start`, or a list of them.

    Attributes:
        start: the text before a call, such as `<tool_call>`; "": the answer is nothing but the calls.
        end: the text after it; "": none.
        arguments: the name of the field with the arguments.
    """

    start: str
    end: str
    arguments: str


def find_call_form(encoder: Encoder) -> CallForm | None:
    """Return how a template writes tool calls; None if it does not, or not as JSON."""
    for form in FORMS:
        written = [form(message) for message in _MESSAGES]
        prompt = next(encoder.chat([Request(written[:1], [_TOOL], prompt=True)]))
        text = next(encoder.chat([Request(written, [_TOOL])]))
        if isinstance(text, InputError) or isinstance(prompt, InputError) or VALUE not in text:
            continue
        answer = text[len(prompt) :] if text.startswith(prompt) else text[text.rfind("Probe?") + 6 :]
        for at in (match.start() for match in re.finditer(r"\{", answer)):
            call, length = _parse(answer[at:])
            name = next((name for name in ARGUMENTS if isinstance(call, dict) and name in call), None)
            if name is None or call.get("name") != NAME:
                continue
            line = answer[:at].rstrip("[ \n").rpartition("\n")[2]
            after = answer[at + length :].lstrip("] \n").partition("\n")[0]
            start, end = (
                encoder.end_marks.sub(lambda m: "" if _is_special(encoder, m[0]) else m[0], part).strip()
                for part in (line, after)
            )
            return CallForm(start, end if start else "", name)
    return None


def _is_special(encoder: Encoder, mark: str) -> bool:
    """Return whether a token is left out of a text that is decoded."""
    return mark in encoder.tokenizer.all_special_tokens or any(
        str(token) == mark and token.special for token in encoder.tokenizer.added_tokens_decoder.values()
    )


def _parse(text: str) -> tuple[Any, int]:
    """Return the JSON value at the start of a text and its end; None if there is none."""
    try:
        return json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None, 0


class CallReader:
    """Separates the calls from the text of an answer, as it is written."""

    def __init__(self, form: CallForm, names: Sequence[str]) -> None:
        self.form, self.names = form, set(names)
        self._text = ""
        self._sent = 0

    def add(self, piece: str) -> str:
        """Add a piece of the answer, and return what is text for certain."""
        self._text += piece
        return self._send(len(self._text[: self._certain()].rstrip()))

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """Return the rest of the text, and the calls; if they are not calls of the tools, they are text."""
        start = self._start()
        calls, rest = self._calls(self._text[start:]) if start is not None else ([], "")
        if not calls or start is None:
            return self._send(len(self._text)), []
        said = self._send(start).rstrip()
        return said + (f"\n{rest}" if rest else ""), calls

    def _send(self, end: int) -> str:
        piece = self._text[self._sent : end]
        self._sent = max(end, self._sent)
        return piece

    def _start(self) -> int | None:
        """Return where the calls may begin."""
        if self.form.start:
            at = self._text.find(self.form.start)
            return at if at >= 0 else None
        text = self._text.lstrip()
        return len(self._text) - len(text) if text[:1] in ("{", "[") else None

    def _certain(self) -> int:
        start = self._start()
        if start is not None:
            return start
        if not self.form.start:
            return len(self._text) if self._text.strip() else 0
        for count in range(min(len(self.form.start) - 1, len(self._text)), 0, -1):
            if self.form.start.startswith(self._text[-count:]):
                return len(self._text) - count
        return len(self._text)

    def _calls(self, text: str) -> tuple[list[dict[str, Any]], str]:
        """Return the calls in a text and what else it has; no calls if one of them is malformed."""
        found: list[dict[str, Any]] = []
        rest = []
        while text.strip(" \n;,"):
            at = text.find(self.form.start) if self.form.start else 0
            if at < 0:
                break
            rest.append(text[:at])
            text = text[at + len(self.form.start) :].lstrip(" \n;,")
            value, end = _parse(text)
            values = value if isinstance(value, list) else [value]
            if not end or not all(self._is_call(one) for one in values):
                return [], ""
            found += [self._call(one) for one in values]
            text = text[end:]
            if self.form.end and text.lstrip().startswith(self.form.end):
                text = text.lstrip().removeprefix(self.form.end)
        return found, "".join([*rest, text]).strip()

    def _is_call(self, value: Any) -> bool:
        name = value.get("name") if isinstance(value, dict) else None
        return isinstance(name, str) and name in self.names and isinstance(value.get(self.form.arguments, {}), dict)

    def _call(self, value: dict[str, Any]) -> dict[str, Any]:
        arguments = json.dumps(value.get(self.form.arguments, {}), ensure_ascii=False)
        function = {"name": value["name"], "arguments": arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}

"""Turns messages and texts into tokens, as training does. Renders in the templates' own processes; never in the event
loop's thread."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from budwood.adapters.manifest import ChatRecord
from budwood.adapters.store import SavedAdapter
from budwood.data.encoder import Encoder, Request, check_template, encode_prompt
from budwood.data.messages import read_messages
from budwood.data.template import Template
from budwood.errors import BudwoodError, InputError
from budwood.model.base import Base
from budwood.serving.http.errors import ApiError
from budwood.serving.http.schema import Chat
from budwood.serving.http.tools import CallForm, find_call_form
from budwood.untrusted.chat_template import today

FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "refusal")
"""Fields of a message; `refusal` and `name` may be null, and templates use what they know."""

ENCODERS = 64
"""Encoders kept, one per template, its options and the date."""


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens, what ends the answer beside the end-of-sequence tokens, and how its calls are written."""

    ids: list[int]
    stop_ids: tuple[int, ...] = ()
    template: str = ""
    calls: CallForm | None = None


class Prompts:
    """Makes prompts for a base and its adapters; what it finds out about a template is kept."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._known: dict[tuple[str, bool], tuple[tuple[int, ...], CallForm | None]] = {}
        self._encoders: OrderedDict[str, Encoder] = OrderedDict()

    def warm(self) -> None:
        """Start the process of the base's template, which takes a second, before the first request needs it."""
        with suppress(BudwoodError, ApiError):
            self._encoder(ChatRecord(), {}).prompt(Request([{"role": "user", "content": "Ping?"}]))

    def text(self, prompt: str | Sequence[int], adapters: Sequence[SavedAdapter]) -> Prompt:
        """Return the tokens of a text, or token ids as they are.

        Raises:
            ApiError: the prompt is empty.
        """
        ids = encode_prompt(self.base.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        if not prompt:
            raise ApiError(400, "prompt: is empty.", param="prompt")
        return Prompt(ids, _stop_ids(adapters))

    def chat(self, body: Chat, adapters: Sequence[SavedAdapter]) -> Prompt:
        """Render messages as the first adapter was trained on them, without one as the base's template says.

        Raises:
            ApiError: the messages or tools are malformed, or the template rejects or changes them.
        """
        manifest = adapters[0].manifest if adapters else None
        record = (manifest.chat if manifest else None) or ChatRecord()
        tools = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in body.tools or ()]
        tools = [] if body.tool_choice == "none" else tools
        try:
            messages = _messages(body.messages)
            encoder = self._encoder(record, body.chat_template_kwargs or {})
            text = encoder.prompt(Request(messages, tools))
            if isinstance(text, InputError):
                raise text
        except InputError as error:
            raise ApiError(400, str(error), param="messages") from error
        missing = [tool["function"]["name"] for tool in tools if tool["function"]["name"] not in text]
        if missing:
            raise ApiError(400, "tools: this model's chat template does not take tools.", param="tools")
        template = self._source(record)
        ends, calls = self._facts(encoder, template, bool(tools))
        return Prompt(encoder.plain([text])[0], tuple({*_stop_ids(adapters), *ends}), template, calls)

    def _source(self, record: ChatRecord) -> str:
        return record.template or json.dumps(self.base.tokenizer.chat_template)

    def _encoder(self, record: ChatRecord, options: Mapping[str, Any]) -> Encoder:
        if record.template is None:
            check_template(self.base.tokenizer, "messages")
        for name in options:
            if name not in self._source(record):
                text = f"chat_template_kwargs: '{name[:64]}' is no variable of the chat template."
                raise ApiError(400, text, param="chat_template_kwargs")
        date = record.date or today()
        key = json.dumps([record.template, record.options, date])
        if options or key not in self._encoders:
            encoder = Encoder(self.base.tokenizer, template_options={**record.options, **options}, date=date)
            encoder.chat_template = record.template
            if options:
                return encoder
            self._encoders[key] = encoder
            if len(self._encoders) > ENCODERS:
                self._encoders.popitem(last=False)
        return self._encoders[key]

    def _facts(self, encoder: Encoder, template: str, tools: bool) -> tuple[tuple[int, ...], CallForm | None]:
        """Return the token that ends the template's answers, and how it writes calls."""
        key = template, tools
        if key not in self._known:
            closing = Template(encoder).closing
            marks = [match[0] for match in encoder.end_marks.finditer(closing)]
            ends = tuple(encoder.plain(marks[-1:])[0]) if marks else ()
            self._known[key] = ends, find_call_form(encoder) if tools else None
        return self._known[key]


def _stop_ids(adapters: Sequence[SavedAdapter]) -> tuple[int, ...]:
    return tuple({token for saved in adapters if saved.manifest is not None for token in saved.manifest.stop_ids})


def _messages(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for number, message in enumerate(given, 1):
        unknown = [key for key in message if key not in FIELDS]
        if unknown or message.get("refusal") is not None:
            name = unknown[0] if unknown else "refusal"
            raise InputError(f"messages: message {number}: '{name[:64]}' is no field of a message.")
    known = [{key: value for key, value in message.items() if key != "refusal"} for message in given]
    return read_messages(known, "field 'messages'", True, "messages")[0]

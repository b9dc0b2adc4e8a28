"""The data format of prompts without answers, for objectives that generate the answers during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from budwood.data.fields import string
from budwood.data.formats import CAUSAL_LM, DataFormat, Dropped
from budwood.data.messages import read_messages, with_columns
from budwood.data.rows import Row
from budwood.errors import InputError

PROMPTS = "prompts without answers"
BESIDE = ("system", "tools", "functions", "chat_template_kwargs")
"""Optional columns beside a prompt of messages."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to answer: a text, or messages for the chat template with its tools and variables."""

    text: str = ""
    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


class Prompts(DataFormat):
    """A prompt, a text or messages, without an answer; other columns are for rewards."""

    api = 2
    name = "prompts"
    columns: ClassVar[tuple[str, ...]] = ("prompt",)
    optional: ClassVar[tuple[str, ...]] = BESIDE
    tasks = (CAUSAL_LM,)
    holds = PROMPTS
    instead = "To train on answers, give them in the column 'completion'."

    def item(self, row: Row, where: str) -> Prompt | Dropped:
        """See `DataFormat.item`."""
        value = row.get("prompt")
        if not isinstance(value, list):
            text = string(row, "prompt", where)
            for name in BESIDE:
                if row.get(name):
                    raise InputError(
                        f"{where}: field '{name}' needs a chat template, but 'prompt' is text: give 'prompt' as a list "
                        f"of messages, or remove '{name}'."
                    )
            return Prompt(text) if text.strip() else Dropped("empty prompt")
        messages, weights, ignored = read_messages(value, "field 'prompt'", True, where)
        read = with_columns(row, messages, weights, ignored, where)
        if read.messages[-1]["role"] == "assistant":
            raise InputError(f"{where}: 'prompt' ends with an assistant's message: end it with the question.")
        return Prompt(messages=read.messages, tools=read.tools, options=read.options)

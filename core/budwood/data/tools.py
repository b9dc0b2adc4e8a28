"""How a chat template takes the definitions of tools: as its variable `tools`, or with the system message."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from budwood.errors import InputError

Message = Mapping[str, Any]
ToolForm = Callable[[Sequence[Any]], Any]
"""What the key `tools` of the system message holds."""
_NAME = "budwood_probe"
_PARAMETERS = {"type": "object", "properties": {"x": {"type": "string", "description": "X."}}, "required": ["x"]}
PROBE = [{"type": "function", "function": {"name": _NAME, "description": "Probes.", "parameters": _PARAMETERS}}]
"""A tool with everything that templates read of one."""
_ASKED: list[Message] = [{"role": "system", "content": "Help."}, {"role": "user", "content": "Ping?"}]


def _functions_as_text(tools: Sequence[Any]) -> str:
    """Write the functions as JSON, as Phi-4-mini takes them."""
    return json.dumps([tool["function"] for tool in tools], ensure_ascii=False)


FORMS: Sequence[ToolForm] = (_functions_as_text, list)


def find_form(render: Callable[[Sequence[Message], Sequence[Any]], str | InputError]) -> ToolForm | None:
    """Return how a template reads tools from the system message; None if it reads the variable, or no tools at all.

    Args:
        render: renders messages with the variable `tools`.
    """
    read = render(_ASKED, PROBE)
    if isinstance(read, InputError) or _NAME in read:
        return None
    for form in FORMS:
        value = form(PROBE)
        text = render(with_tools(_ASKED, PROBE, form), ())
        if not isinstance(text, InputError) and (value if isinstance(value, str) else _NAME) in text:
            return form
    return None


def with_tools(messages: Sequence[Message], tools: Sequence[Any], form: ToolForm) -> list[Message]:
    """Return messages whose system message has the tools; one is put first if there is none."""
    has_system = bool(messages) and messages[0]["role"] == "system"
    system: Message = messages[0] if has_system else {"role": "system", "content": ""}
    return [{"tools": form(tools), **system}, *messages[has_system:]]

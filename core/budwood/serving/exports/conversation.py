"""Renders conversations with a chat template, as training does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from budwood.errors import InputError
from budwood.untrusted.chat_template import render


def rendered(
    template: str,
    tokenizer: Any,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    prompts: bool = True,
    options: Mapping[str, Any] | None = None,
) -> list[str | None]:
    """Return the text of each conversation; None if the template rejects it.

    Args:
        prompts: whether the text ends where the assistant's answer begins.
        options: variables of the template.
    """
    variables = {**tokenizer.special_tokens_map, **(options or {}), "add_generation_prompt": prompts}
    texts = render(template, [(messages, variables) for messages in conversations])
    return [None if isinstance(text, InputError) else str(text) for text in texts]

"""Suggests what to rename in data that matches no format but has well-known columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence

_PAIRS = (
    ("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer"),
    ("problem", "solution"), ("problem", "answer"), ("input", "output"), ("inputs", "targets"), ("source", "target"),
    ("dialogue", "summary"), ("document", "summary"), ("article", "highlights"), ("prompt", "response"),
    ("prompt", "answer"), ("prompt", "output"), ("prompt", "canonical_solution"), ("instruction", "completion"),
    ("instruction", "answer"), ("user", "assistant"),
)  # fmt: skip
"""Columns that hold a question and its answer."""
_OTHERS = (
    (("query", "tools", "answers"),
     "Write 'query' as the user's message and 'answers' as the assistant's tool_calls in a list 'messages'; 'tools' "
     "is read."),
    (("system", "chat"), "'chat' is one text: split it into a list 'messages' of objects with role and content."),
    (("question", "answers"), "Rename 'question' to 'instruction', and write the text of 'answers' as 'response'; "
                              "'context' is read."),
    *((pair, f"A text has one label; join '{pair[0]}' and '{pair[1]}' into 'text'.")
      for pair in (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"))),
    (("sentence", "label"), "Rename 'sentence' to 'text'."),
    (("text", "labels"), "Write 'labels' as 'label', with one class per row."),
    (("text", "intent"), "Rename 'intent' to 'label'."),
)  # fmt: skip
"""Other columns, and the remedy."""


def suggest(columns: Sequence[str], accepted: Collection[str] | None = None) -> str:
    """Return " Rename …" for well-known columns that match no data format, "" for others.

    Args:
        accepted: the columns of the task's data formats; None: of all.
    """
    for names, remedy in _OTHERS:
        if set(names) <= set(columns):
            return f" {remedy}"
    for asked, answered in _PAIRS:
        if {asked, answered} <= set(columns) and (accepted is None or {"prompt", "completion"} <= set(accepted)):
            chat = _renamed((asked, "instruction"), (answered, "output"))
            plain = _renamed((asked, "prompt"), (answered, "completion"))
            if accepted is not None and "instruction" not in accepted:
                return f" Rename {plain}."
            system = ", and 'system_prompt' to 'system'" if "system_prompt" in columns else ""
            return f" Rename {chat}{system}, for a chat model; or {plain}, for plain text."
    return ""


def _renamed(*pairs: tuple[str, str]) -> str:
    changes = [f"'{old}' to '{new}'" for old, new in pairs if old != new]
    return " and ".join(changes)

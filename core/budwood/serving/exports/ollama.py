"""A Modelfile for Ollama, with the chat template as a Go template if that is provably the same.

Ollama renders conversations with Go templates (`template/template.go`). A jinja template cannot be put there. Recent
versions render a GGUF's own tokenizer.chat_template if the Modelfile has no TEMPLATE; older ones pass the bare text.
A template that writes each message between fixed texts of its role is the same in Go, and is written as one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from budwood.serving.exports.conversation import rendered

_ROLES = ("system", "user", "assistant")
_MARKS = ("Aq7", "Bw8", "Cx9")
_CONTENTS = ("x", " padded\n", "two\nlines", '{{ braces }} "quoted"', "")


@dataclass(frozen=True)
class Frames:
    """A chat template that writes each message between two fixed texts.

    Attributes:
        start: text before the first message of a conversation without a system message.
        system_start: text before the system message of one that has it.
        before, after: fixed texts by role.
        prompt: text after the last message, where the assistant's answer begins.
    """

    start: str
    system_start: str
    before: dict[str, str]
    after: dict[str, str]
    prompt: str

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Return the text of a conversation."""
        start = self.system_start if messages and messages[0]["role"] == "system" else self.start
        parts = [self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in messages]
        return start + "".join(parts) + self.prompt


def frames_of(template: str, tokenizer: Any, options: dict[str, Any]) -> Frames | None:
    """Return a chat template as frames; None if it renders any of many conversations differently.

    Args:
        template: jinja source.
        options: its variables in the adapter's run.
    """
    a, b, c = _MARKS
    user, assistant = {"role": "user", "content": a}, {"role": "assistant", "content": b}
    later, system = {"role": "user", "content": c}, {"role": "system", "content": c}
    ended = rendered(template, tokenizer, [[user], [user, assistant]], False, options)
    open_ended = rendered(template, tokenizer, [[user], [user, assistant, later], [system, user]], True, options)
    texts = [*ended, *open_ended]
    if any(text is None or any(text.count(mark) > 1 for mark in _MARKS) for text in texts):
        return None
    one, two, asked, three, told = (str(text) for text in texts)
    try:
        start, after_user = one.split(a)
        between, after_assistant = two.split(a)[1].split(b)
        again = three.split(b)[1].split(c)[0]
        to_system, from_system = told.split(c)[0], told.split(c)[1].split(a)[0]
    except (ValueError, IndexError):
        return None
    prompt = asked.removeprefix(one)
    before = {"user": again.removeprefix(after_assistant), "assistant": between.removeprefix(after_user)}
    before["system"] = ""
    after = {
        "user": after_user,
        "assistant": after_assistant,
        "system": from_system.removesuffix(before["user"]),
    }
    frames = Frames(start.removesuffix(before["user"]), to_system, before, after, prompt)
    return frames if _agrees(frames, template, tokenizer, options) else None


def _agrees(frames: Frames, template: str, tokenizer: Any, options: dict[str, Any]) -> bool:
    conversations = []
    for number, (system, turns) in enumerate(itertools.product((False, True), (1, 2, 3))):
        for shift in range(len(_CONTENTS)):
            said = itertools.cycle(_CONTENTS[shift:] + _CONTENTS[:shift])
            messages = [{"role": "system", "content": next(said)}] if system else []
            for turn in range(2 * turns - 1):
                messages.append({"role": _ROLES[1 + turn % 2], "content": f"{next(said)}{number if turn else ''}"})
            conversations.append(messages)
    texts = rendered(template, tokenizer, conversations, True, options)
    return all(text == frames.render(m) for text, m in zip(texts, conversations, strict=True))


def go_template(frames: Frames, bos: str | None) -> str:
    """Return frames as a Go template; the bos token, which llama.cpp adds by itself, is left out."""

    def literal(text: str) -> str:
        return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""

    def cut(text: str) -> str:
        return text.removeprefix(bos) if bos else text

    def branch(role: str) -> str:
        before = literal(frames.before[role])
        start = cut(frames.system_start if role == "system" else frames.start)
        first = f"{{{{ if not $i }}}}{literal(start)}{{{{ end }}}}" if start else ""
        return f'{{{{ if eq .Role "{role}" }}}}{first}{before}{{{{ .Content }}}}{literal(frames.after[role])}'

    branches = "{{ else }}".join(map(branch, _ROLES)) + "{{ end }}" * len(_ROLES)
    return f"{{{{ range $i, $m := .Messages }}}}{branches}{{{{ end }}}}{literal(frames.prompt)}"


def modelfile(model: str, adapter: str | None, template: str | None, stops: Sequence[str]) -> str:
    """Return the text of a Modelfile.

    Args:
        model: the model's file beside it.
        adapter: the adapter's file beside it, if any.
        template: a Go template; None: Ollama takes the GGUF's own.
        stops: texts that end an answer.
    """
    lines = [f"FROM ./{model}", *([f"ADAPTER ./{adapter}"] if adapter else [])]
    lines += [f'TEMPLATE """{template}"""'] if template is not None else []
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join([*lines, ""])

"""Locates an answer in what a chat template writes, and where it ends."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from budwood.data.encoder import Encoder, Request, Span
from budwood.data.forms import Message
from budwood.data.messages import REASONING
from budwood.errors import InputError
from budwood.untrusted.chat_template import Rendered
from budwood.untrusted.redaction import shorten

REMEDY = "Change the message, or give a template that renders it with data.chat_template."
_THOUGHT = re.compile(r"<think>\s*(</think>\s*)?$")
"""The end of a generation prompt that opens a thought, or holds an empty one."""


_TAG = re.compile(r"</?think>")


class Template:
    """What renderings of a fixed conversation show about a template; a template that rejects it shows nothing."""

    def __init__(self, encoder: Encoder, tools: Sequence[Any] = ()) -> None:
        self.encoder, self._tools = encoder, tools
        self.marks = encoder.end_marks

    def _render(self, *requests: tuple[Sequence[Message], bool]) -> list[str]:
        """Render messages, each with or without the generation prompt; one that is rejected is empty."""
        written = self.encoder.chat(Request(messages, self._tools, prompt=prompt) for messages, prompt in requests)
        return ["" if isinstance(text, InputError) else str(text) for text in written]

    @cached_property
    def _probes(self) -> list[str]:
        """The probe's renderings: user; user for generation; with an answer; with a further turn."""
        asked, answer = {"role": "user", "content": "Ping?"}, {"role": "assistant", "content": "Pong."}
        messages = [asked, answer, {"role": "user", "content": "Again?"}]
        return self._render((messages[:1], False), (messages[:1], True), (messages[:2], False), (messages, False))

    @cached_property
    def prompts(self) -> bool:
        """Whether it has a generation prompt."""
        return self._always_prompts or self._probes[0] != self._probes[1]

    @cached_property
    def _always_prompts(self) -> bool:
        """Whether it ends every conversation with the generation prompt; it does not write it between two questions."""
        asked = [{"role": "user", "content": "Ping?"}, {"role": "user", "content": "Again?"}]
        (twice,) = self._render((asked, False))
        return bool(twice) and not twice.startswith(self._probes[0])

    @cached_property
    def generation_prompt(self) -> str:
        """The text that it adds for generation; if it adds none, what it writes after a question."""
        asked, prompt = self._probes[:2]
        added = prompt.removeprefix(asked) if prompt.startswith(asked) else ""
        return added or prompt.rpartition("Ping?")[2]

    @cached_property
    def closing(self) -> str:
        """What it writes after an answer, up to the token that ends it: the same if another turn follows."""
        after, longer = self._after
        common = list(self.marks.finditer(os.path.commonprefix([after, longer])))
        if self._always_prompts:  # what begins the next turn, whosever it is, is in common, too
            ends = [mark for mark in common if mark[0] == self.encoder.tokenizer.eos_token]
            common = ends[:1] or common[:1]
        first = self.marks.search(after)
        return after[: common[-1].end()] if common else after[: first.end()] if first else ""

    @cached_property
    def next_turn(self) -> str:
        """The mark of the next user's turn, which ends an answer where the template writes none of its own (GLM)."""
        return self._first_mark(self._after[1]) if not self.closing else ""

    @cached_property
    def next_result(self) -> str:
        """The same for a call, which a tool's result follows."""
        call: dict[str, Any] = {"type": "function", "function": {"name": "ping", "arguments": {}}}
        messages: list[Message] = [
            {"role": "user", "content": "Ping?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "Again?"},
        ]  # fmt: skip
        alone, longer = self._render((messages[:2], False), (messages, False))
        if not alone or not longer.startswith(alone.rstrip()):
            return ""
        return self._first_mark(longer[len(alone.rstrip()) :].partition("Again?")[0])

    @property
    def _after(self) -> tuple[str, str]:
        return self._probes[2].rpartition("Pong.")[2], self._probes[3].rpartition("Pong.")[2].partition("Again?")[0]

    def _first_mark(self, text: str) -> str:
        mark = self.marks.search(text)
        return text[: mark.end()] if mark else ""

    def locate(self, message: Message, where: str, before: str, text: Rendered) -> tuple[str, list[Span]]:
        """Return the text up to the end of its last answer, and the answer's spans.

        Args:
            message: the answer.
            where: its location.
            before: the messages before it, with the generation prompt.
            text: the messages up to it.
        """
        marks, full, start = text.marks, str(text), len(before)
        if not full.startswith(before):
            written = self._after_prompt(message, before, full)
            shared = os.path.commonprefix([before, full])
            if written is not None:
                full, marks = written, None
                self.encoder.remarks[
                    "answers put after their prompt, which the chat template writes differently later"
                ] += 1
            elif marks is not None:
                start = next((a for a, _ in marks if a >= len(shared)), len(full))
            else:
                shown = full[len(shared) :][:40]
                raise _ambiguous(where, f"writes {shown!r} where the generation prompt has something else")
        stop, addition, extra = self._end(message, where, full[start:])
        full = full[: start + stop] + addition
        if marks is None:
            self._report(extra, "which the chat template writes and which has a loss")
            return full, [(start, len(full))]
        spans: list[Span] = []
        for a, b in ((max(a, start), min(b, len(full))) for a, b in marks if b > start and a < len(full)):
            spans[-1:] = [(spans[-1][0], b)] if spans and spans[-1][1] == a else [*spans[-1:], (a, b)]
        if not spans:
            raise InputError(f"{where}: the chat template marks nothing of it with {{% generation %}}.")
        loss = "has a loss" if spans[0][0] == start else "it marks as not generated, so it has no loss"
        self._report(extra, f"which the chat template writes and which {loss}")
        if not self.marks.sub("", full[spans[-1][1] :]).strip():
            spans[-1] = (spans[-1][0], len(full))  # a model that never learns the end never ends
        return full[: spans[-1][1]], spans

    def _after_prompt(self, message: Message, before: str, text: str) -> str | None:
        """Write an answer after its prompt, of which the template's text lacks the end, or has other earlier turns."""
        generation = self.generation_prompt
        header = _THOUGHT.sub("", generation)
        earlier = before.removesuffix(generation)
        if header.strip() and before.endswith(generation) and not text.startswith(earlier) and header in text:
            text = earlier + text[text.rfind(header) :]
            if text.startswith(before):
                return text if self._begins(message, text[len(before) :]) else None
        opening = _THOUGHT.search(before)
        if opening is None or opening[1]:
            shared = len(os.path.commonprefix([before, text]))
            back = self._boundary(before, shared)
            for at in (shared, back) if generation.endswith(before[back:]) else (shared,):
                head, rest = before[:at], text[at:].lstrip()
                if opening is not None and head.rstrip().endswith(before[: opening.start()].rstrip()):
                    rest = rest.removeprefix("</think>").lstrip()  # the same thought, without its start
                if opening is not None and any(part and part in rest for part in _parts_of(message)[:-1]):
                    return None  # the prompt's thought is over: there can be no second one
                if at == self._boundary(before, at) and rest and self._begins(message, rest):
                    return before + rest
            return None
        if not text.startswith(before[: opening.start()]):
            return None
        answer = text[opening.start() :]
        inner, closed, rest = answer.partition("</think>")
        given = next((message[key] for key in REASONING if key in message), "")
        if not closed:
            inner, rest = message["content"].rpartition("</think>")[0], answer
        thought = inner.replace("<think>", "").strip() or given.strip()
        return f"{before}{thought}\n</think>\n\n{rest.lstrip()}"

    def _boundary(self, before: str, at: int) -> int:
        """Return the last place up to `at` where no token and no word of the prompt is cut."""
        ends = [0, before.rfind("\n", 0, at) + 1]
        for mark in self.marks.finditer(before):
            ends += [place for place in mark.span() if place <= at]
        return max(ends)

    def _begins(self, message: Message, rest: str) -> bool:
        """Return whether a text begins with an answer: with a call, or with its words, perhaps after marks."""
        if message.get("tool_calls"):
            return True
        words = (message["content"].strip(), *_parts_of(message))
        starts = [rest[: rest.find(part)] for part in words if part and part in rest]
        starts = [_TAG.sub("", start).strip() for start in starts]
        marks = [[mark.span() for mark in self.marks.finditer(start)] for start in starts]
        pairs = zip(starts, marks, strict=True)
        return any(not start or at and at[0][0] == 0 and at[-1][1] == len(start) for start, at in pairs)

    def _report(self, extra: str, what: str) -> None:
        if extra:
            self.encoder.remarks[f"answers begin with {shorten(repr(extra))}, {what}"] += 1

    def _end(self, message: Message, where: str, rest: str) -> tuple[int, str, str]:
        """Return where an answer ends in `rest`, which begins with it; what must be written after it; see `_start`."""
        *thoughts, content = _parts_of(message)
        for part in (*thoughts, content):
            if part not in rest:
                key = next((f"'{k}' of " for k in REASONING if k in message and message[k].strip() == part), "")
                raise InputError(f"{where}: the chat template leaves out or changes {key}it. {REMEDY}")
        if message.get("tool_calls"):
            return *self._end_of_calls(message, where, rest), ""
        ends = [mark for mark in self.marks.finditer(rest) if rest[: mark.start()].rstrip().endswith(content)]
        if ends:
            stop = ends[-1].end()
            said = len(rest[: ends[-1].start()].rstrip())
            space = len(rest[said:]) - len(rest[said:].lstrip())
            closing = self.closing.lstrip()
            if closing and rest.startswith(closing, said + space):
                stop = said + space + len(closing)
            return stop, "", self._start(message, where, rest[:said], thoughts)
        if self.next_turn and rest.rstrip().endswith(content):
            return len(rest.rstrip()), self.next_turn, self._start(message, where, rest.rstrip(), thoughts)
        raise _no_end(where, "it", rest.rpartition(content)[2])

    def _start(self, message: Message, where: str, said: str, thoughts: Sequence[str]) -> str:
        """Return what stands before an answer's own words; refuse it where the template has no generation prompt."""
        content = message["content"].strip()
        words = next((thought for thought in thoughts if thought), content)
        own = len(said) - len(content) if said.endswith(content) else said.find(words)
        extra = said[:own].strip()
        if extra and not self.prompts:
            raise _ambiguous(where, f"writes {said[:own]!r} where the answer should begin, and no generation prompt")
        return extra if words == content else ""

    def _end_of_calls(self, message: Message, where: str, rest: str) -> tuple[int, str]:
        for call in message["tool_calls"]:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            for value in (name, *_leaves(arguments)):
                if not any(form in rest for form in _value_forms(value)):
                    raise InputError(f"{where}: the chat template leaves out {shorten(repr(value))} of its tool calls.")
        if self.next_turn and self.next_result:
            return len(rest.rstrip()), self.next_result
        closing = self.closing.strip()
        for end in (closing, str(self.encoder.tokenizer.eos_token) if self._always_prompts else ""):
            if end and end in rest:
                return rest.rfind(end) + len(end), ""
        ends = list(self.marks.finditer(rest))
        if ends and not rest[ends[-1].end() :].strip() and not self._always_prompts:
            return ends[-1].end(), ""
        raise _no_end(where, "its tool calls", "")


def _parts_of(message: Message) -> list[str]:
    """Return the thoughts of an answer and, last, its content; each may be empty."""
    *thoughts, content = [part.strip() for part in _TAG.split(message["content"])]
    return [*thoughts, *(message[key].strip() for key in REASONING if key in message), content]


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the keys and plain values of a call's arguments."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):  # arguments that were written as JSON
            value = parsed
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves_of(inner)


def _leaves_of(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _leaves_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves_of(inner)
    else:
        yield value


def _value_forms(value: Any) -> tuple[str, ...]:
    escaped = [json.dumps(value, ensure_ascii=flag) for flag in (False, True)]
    stripped = [text[1:-1] for text in escaped] if isinstance(value, str) else []
    return str(value), repr(value), *escaped, *stripped


def _no_end(where: str, what: str, after: str) -> InputError:
    if after.strip():
        return _ambiguous(
            where, f"ends {what} with {shorten(repr(after.strip()))}, which is no token of the base's tokenizer"
        )
    return _ambiguous(where, f"adds no end token after {what}")


def _ambiguous(where: str, reason: str) -> InputError:
    return InputError(
        f"{where}: its tokens cannot be identified: the chat template {reason}. Set data.template_options, give "
        "another template with data.chat_template, or give each answer as prompt and completion."
    )

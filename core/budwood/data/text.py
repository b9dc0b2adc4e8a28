"""Items of text as tokens, each with the spans that have a loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from budwood.data.encoder import Encoder, Span, check_template
from budwood.data.formats import Completion, Conversation, Text, read_weight
from budwood.errors import InputError


@dataclass(frozen=True, slots=True)
class Tokens:
    """An item as token ids; `spans` (start, stop) have a loss, each with its weight."""

    ids: list[int]
    spans: Sequence[Span]
    weights: Sequence[float]


def tokenise(items: Sequence[Any], where: Sequence[str], encoder: Encoder) -> list[Tokens]:
    """Tokenise items of one data format: `Completion`, `Text` or `Conversation`; not yet cut to length.

    Raises:
        InputError: the message begins with the item's place, `where`.
    """
    if isinstance(items[0], Completion):
        return _completions(items, where, encoder)
    if isinstance(items[0], Text):
        return _texts(items, where, encoder)
    if isinstance(items[0], Conversation):
        return _conversations(items, where, encoder)
    raise InputError(f"{where[0]}: a {type(items[0]).__name__} is not text to be continued.")


def _completions(items: Sequence[Completion], where: Sequence[str], encoder: Encoder) -> list[Tokens]:
    texts = [item.prompt + item.completion for item in items]
    spans = [[(len(item.prompt), len(text))] for item, text in zip(items, texts, strict=True)]
    found = encoder.split(texts, spans, rendered=False)
    results = []
    for item, place, (ids, ((start, _),)) in zip(items, where, found, strict=True):
        ids = _ended(ids, encoder, place)
        results.append(Tokens(ids, [(start, len(ids))], [item.weight]))
    return results


def _texts(items: Sequence[Text], where: Sequence[str], encoder: Encoder) -> list[Tokens]:
    results = []
    for item, place, ids in zip(items, where, encoder.start([item.text for item in items]), strict=True):
        ids = _ended(ids, encoder, place)
        results.append(Tokens(ids, [(1, len(ids))], [item.weight]))
    return results


def _conversations(items: Sequence[Conversation], where: Sequence[str], encoder: Encoder) -> list[Tokens]:
    """Tokenise conversations.

    Where a turn stands is proved, not guessed. The conversation as rendered must begin with the rendering of the
    messages before the turn, up to the answer; then come the turn's own words; then a token that ends it. A template
    that rewrites what was said before, or that puts words of its own before an answer, is refused.
    """
    check_template(encoder.tokenizer, where[0])
    rendered = encoder.chat(part for item in items for part in _parts(item.messages))
    texts: list[str] = []
    spans: list[list[Span]] = []
    for item, place in zip(items, where, strict=True):
        if any(encoder.end_marks.search(message["content"]) for message in item.messages):
            encoder.remarks["conversations that spell out control tokens, which are read as such"] += 1
        text, found = _find_turns(item.messages, place, encoder, rendered)
        texts.append(text[: found[-1][1]])  # what follows the last turn has no loss and is not needed
        spans.append(found)
    results = []
    for item, (ids, found) in zip(items, encoder.split(texts, spans, rendered=True), strict=True):
        encoder.stop_ids.update(ids[stop - 1] for _, stop in found)
        weights = [read_weight(message, "") for message in item.messages if message["role"] == "assistant"]
        results.append(Tokens(ids, found, weights))
    return results


def _ended(ids: list[int], encoder: Encoder, where: str) -> list[int]:
    end = encoder.end(where)
    if not ids or ids[-1] != end:
        ids.append(end)
    return ids


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Sequence[Mapping[str, Any]], bool]]:
    """What has to be rendered to find a conversation's turns: all of it, and what stands before each answer."""
    yield messages, False
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            yield messages[:at], True


def _find_turns(
    messages: Sequence[Mapping[str, Any]], where: str, encoder: Encoder, rendered: Iterator[str | InputError]
) -> tuple[str, list[Span]]:
    """A conversation's text with (start, stop) in characters of each assistant turn and its end token.

    `rendered` gives the next of its `_parts`.
    """
    text = _next(rendered, where)
    for number, message in enumerate(messages, 1):
        if message["content"].strip() not in text:
            raise InputError(f"{where}: the chat template leaves out or changes message {number} ({message['role']}).")
    spans: list[Span] = []
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        before = _next(rendered, where)
        if not text.startswith(before):
            raise _unproved(where, number, "renders the messages before it differently once it is there")
        content = message["content"].strip()
        rest = text[len(before) :]
        lead = len(rest) - len(rest.lstrip())
        if not rest.startswith(content, lead):
            shown = rest[: rest.find(content)] if content in rest else rest[:40]
            raise _unproved(where, number, f"writes {shown!r} where the answer should begin")
        after = rest[lead + len(content) :]
        space = len(after) - len(after.lstrip())
        mark = encoder.end_marks.match(after, space)
        if mark is None:
            raise _unproved(where, number, "puts no token behind it that ends an answer")
        spans.append((len(before), len(before) + lead + len(content) + mark.end()))
    return text, spans


def _next(rendered: Iterator[str | InputError], where: str) -> str:
    text = next(rendered)
    if isinstance(text, InputError):
        raise InputError(f"{where}: {text}")
    return text


def _unproved(where: str, number: int, reason: str) -> InputError:
    return InputError(
        f"{where}: which tokens are message {number}'s cannot be proved: the chat template {reason}. "
        "Give each answer as prompt and completion, or give the base a template that keeps what was said."
    )

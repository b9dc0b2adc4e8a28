"""Tokenises text items, and marks the spans that have a loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from budwood.data.encoder import Encoder, Span, check_template
from budwood.data.formats import Completion, Conversation, Text, read_weight
from budwood.errors import InputError


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of an item; each of `spans` (start, stop) has a loss, with its own weight."""

    ids: list[int]
    spans: Sequence[Span]
    weights: Sequence[float]


def tokenise(items: Sequence[Any], where: Sequence[str], encoder: Encoder) -> list[Tokens]:
    """Tokenise items of one data format, `Completion`, `Text` or `Conversation`, without truncation.

    Raises:
        InputError: an item cannot be tokenised; the message begins with its location from `where`.
    """
    if isinstance(items[0], Completion):
        return _completions(items, where, encoder)
    if isinstance(items[0], Text):
        return _texts(items, where, encoder)
    if isinstance(items[0], Conversation):
        return _conversations(items, where, encoder)
    raise InputError(f"{where[0]}: a {type(items[0]).__name__} item is not text for a causal language model.")


def _completions(items: Sequence[Completion], where: Sequence[str], encoder: Encoder) -> list[Tokens]:
    texts = [item.prompt + item.completion for item in items]
    spans = [[(len(item.prompt), len(text))] for item, text in zip(items, texts, strict=True)]
    encoded = encoder.split(texts, spans, rendered=False)
    results = []
    for item, place, (ids, ((start, _),)) in zip(items, where, encoded, strict=True):
        ids = _append_end(ids, encoder, place)
        results.append(Tokens(ids, [(start, len(ids))], [item.weight]))
    return results


def _texts(items: Sequence[Text], where: Sequence[str], encoder: Encoder) -> list[Tokens]:
    results = []
    for item, place, ids in zip(items, where, encoder.start([item.text for item in items]), strict=True):
        ids = _append_end(ids, encoder, place)
        results.append(Tokens(ids, [(1, len(ids))], [item.weight]))
    return results


def _conversations(items: Sequence[Conversation], where: Sequence[str], encoder: Encoder) -> list[Tokens]:
    """Tokenise conversations.

    The location of each turn is verified, not guessed. The rendered conversation must begin with the rendering of the
    messages before the turn, up to the answer. The turn's content must follow, and then a token that ends it. A
    template that rewrites earlier messages, or inserts text before an answer, is refused.
    """
    check_template(encoder.tokenizer, where[0])
    rendered = encoder.chat(part for item in items for part in _parts(item.messages))
    texts: list[str] = []
    spans: list[list[Span]] = []
    for item, place in zip(items, where, strict=True):
        if any(encoder.end_marks.search(message["content"]) for message in item.messages):
            encoder.remarks["conversations that spell out control tokens, which are read as such"] += 1
        text, turns = _find_turns(item.messages, place, encoder, rendered)
        texts.append(text[: turns[-1][1]])  # text after the last turn has no loss
        spans.append(turns)
    results = []
    for item, (ids, turns) in zip(items, encoder.split(texts, spans, rendered=True), strict=True):
        encoder.stop_ids.update(ids[stop - 1] for _, stop in turns)
        weights = [read_weight(message, "") for message in item.messages if message["role"] == "assistant"]
        results.append(Tokens(ids, turns, weights))
    return results


def _append_end(ids: list[int], encoder: Encoder, where: str) -> list[int]:
    end = encoder.end(where)
    if not ids or ids[-1] != end:
        ids.append(end)
    return ids


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Sequence[Mapping[str, Any]], bool]]:
    """Yield the renderings that locate a conversation's turns: all messages, then the messages before each answer."""
    yield messages, False
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            yield messages[:at], True


def _find_turns(
    messages: Sequence[Mapping[str, Any]], where: str, encoder: Encoder, rendered: Iterator[str | InputError]
) -> tuple[str, list[Span]]:
    """Return a conversation's text, and (start, stop) in characters of each assistant turn with its end token.

    Args:
        rendered: yields the text of each of the conversation's `_parts`, in order.
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
            raise _ambiguous(where, number, "renders the messages before it differently if it follows")
        content = message["content"].strip()
        rest = text[len(before) :]
        lead = len(rest) - len(rest.lstrip())
        if not rest.startswith(content, lead):
            shown = rest[: rest.find(content)] if content in rest else rest[:40]
            raise _ambiguous(where, number, f"writes {shown!r} where the answer should begin")
        after = rest[lead + len(content) :]
        space = len(after) - len(after.lstrip())
        mark = encoder.end_marks.match(after, space)
        if mark is None:
            raise _ambiguous(where, number, "adds no end token after it")
        spans.append((len(before), len(before) + lead + len(content) + mark.end()))
    return text, spans


def _next(rendered: Iterator[str | InputError], where: str) -> str:
    text = next(rendered)
    if isinstance(text, InputError):
        raise InputError(f"{where}: {text}")
    return text


def _ambiguous(where: str, number: int, reason: str) -> InputError:
    return InputError(
        f"{where}: the tokens of message {number} cannot be identified: the chat template {reason}. "
        "Give each answer as prompt and completion, or use a chat template that does not change earlier messages."
    )

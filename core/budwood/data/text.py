"""Tokenises text items, and marks the spans that have a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from budwood.data.encoder import Encoder, Request, Span, check_template
from budwood.data.formats import Completion, Text
from budwood.data.messages import Conversation
from budwood.data.prompts import Prompt
from budwood.data.template import Template
from budwood.data.turns import find_turns
from budwood.errors import InputError


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of an item; each of `spans` (start, stop) has a loss, with its own weight."""

    ids: list[int]
    spans: Sequence[Span]
    weights: Sequence[float]


def tokenise(items: Sequence[Any], where: Sequence[str], encoder: Encoder) -> list[list[Tokens]]:
    """Tokenise items, each a `Completion`, `Text`, `Conversation` or `Prompt`, without truncation.

    Returns:
        The examples of each item: one, or several of a conversation whose earlier turns the chat template rewrites or
        the tokenizer joins with what is before them.

    Raises:
        InputError: an item cannot be tokenised; the message begins with its location from `where`.
    """
    if encoder.as_chat:
        items = [_as_chat(item) for item in items]
    results: list[list[Tokens]] = [[] for _ in items]
    for kind in dict.fromkeys(map(type, items)):
        at = [index for index, item in enumerate(items) if type(item) is kind]
        if kind not in _KINDS:
            raise InputError(f"{where[at[0]]}: a {kind.__name__} item is not text for a causal language model.")
        found = _KINDS[kind]([items[index] for index in at], [where[index] for index in at], encoder)
        for index, examples in zip(at, found, strict=True):
            results[index] = examples
    return results


def _as_chat(item: Any) -> Any:
    if isinstance(item, Prompt) and not item.messages:
        return Prompt(messages=[{"role": "user", "content": item.text.strip()}])
    return as_conversation(item) if isinstance(item, Completion) else item


def as_conversation(item: Completion) -> Conversation:
    """Return a prompt as the user's message and its completion as the assistant's, without outer white space."""
    pair = (("user", item.prompt), ("assistant", item.completion))
    return Conversation([{"role": role, "content": text.strip()} for role, text in pair], [0.0, item.weight])


def _completions(items: Sequence[Completion], where: Sequence[str], encoder: Encoder) -> list[list[Tokens]]:
    texts = [item.prompt + item.completion for item in items]
    spans = [[(len(item.prompt), len(text))] for item, text in zip(items, texts, strict=True)]
    encoded = encoder.split(texts, spans, rendered=False)
    results = []
    for item, place, ((ids, ((start, _),), _),) in zip(items, where, encoded, strict=True):
        ids = _append_end(ids, encoder, place)
        start = 1 if encoder.loss_on == "all" else start
        results.append([Tokens(ids, [(start, len(ids))], [item.weight])])
    return results


def _texts(items: Sequence[Text], where: Sequence[str], encoder: Encoder) -> list[list[Tokens]]:
    results = []
    for item, place, ids in zip(items, where, encoder.start([item.text for item in items]), strict=True):
        ids = _append_end(ids, encoder, place)
        results.append([Tokens(ids, [(1, len(ids))], [item.weight])])
    return results


def _conversations(items: Sequence[Conversation], where: Sequence[str], encoder: Encoder) -> list[list[Tokens]]:
    """Tokenise conversations, each as one example or several; see `find_turns`."""
    check_template(encoder.tokenizer, where[0])
    found = list(find_turns(items, where, encoder))
    turns = [turn for row in found for turn in row]
    encoded = encoder.split([turn.text for turn in turns], [turn.spans for turn in turns], rendered=True)
    results = []
    for row in found:
        examples = []
        for turn in row:
            for ids, spans, numbers in next(encoded):
                if encoder.loss_on != "all":
                    encoder.stop_ids.update(ids[stop - 1] for _, stop in spans)
                examples.append(Tokens(ids, spans, [turn.weights[number] for number in numbers]))
        results.append(examples)
    return results


def _prompts(items: Sequence[Prompt], where: Sequence[str], encoder: Encoder) -> list[list[Tokens]]:
    """Tokenise prompts; those of messages with the generation prompt, after which the assistant answers."""
    texts = iter(encoder.start([item.text for item in items if not item.messages]))
    chats = [place for item, place in zip(items, where, strict=True) if item.messages]
    if chats:
        check_template(encoder.tokenizer, chats[0])
        template = Template(encoder)
        end = encoder.plain([template.closing or template.next_turn])[0]
        encoder.stop_ids.update(end[-1:])
    results = []
    for item, place in zip(items, where, strict=True):
        if not item.messages:
            ids = next(texts)
        else:
            text = encoder.prompt(Request(item.messages, item.tools, item.options))
            if isinstance(text, InputError):
                raise InputError(f"{place}: {text}")
            ids = encoder.plain([text])[0]
        results.append([Tokens(ids, [], [])])
    return results


def _append_end(ids: list[int], encoder: Encoder, where: str) -> list[int]:
    end = encoder.end(where)
    if not ids or ids[-1] != end:
        ids.append(end)
    return ids


_KINDS: dict[type, Callable[[Any, Sequence[str], Encoder], list[list[Tokens]]]] = {
    Completion: _completions, Text: _texts, Conversation: _conversations, Prompt: _prompts,
}  # fmt: skip

"""Data formats of preference objectives: pairs of a chosen and a rejected answer, and answers judged one by one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from budwood.data.chat_formats import BESIDE
from budwood.data.fields import describe_type, encodable, read_weight
from budwood.data.formats import CAUSAL_LM, REWARD_MODEL, Completion, DataFormat, Dropped
from budwood.data.messages import Conversation, read_messages, with_columns
from budwood.data.rows import Row
from budwood.errors import InputError
from budwood.untrusted.redaction import shorten

PAIRS, JUDGED = "preference pairs", "judged answers"
Answer = Completion | Conversation
"""An answer with its prompt; the loss is on the answer alone."""
Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt."""

    chosen: Answer
    rejected: Answer


@dataclass(frozen=True, slots=True)
class Judged:
    """An answer that was judged desirable or not."""

    answer: Answer
    desirable: bool


class Preference(DataFormat):
    """A prompt with a chosen and a rejected answer, each a text or messages; both have the prompt before them.

    The row's weight is the pair's. A pair with an empty or two equal answers is refused.
    """

    api = 2
    name = "preference"
    columns: ClassVar[tuple[str, ...]] = ("prompt", "chosen", "rejected")
    optional: ClassVar[tuple[str, ...]] = BESIDE
    tasks = (CAUSAL_LM, REWARD_MODEL)
    holds = PAIRS
    instead = "To train on the chosen answers alone, remove 'rejected' and rename 'chosen' to 'completion'."

    def item(self, row: Row, where: str) -> Pair | Dropped:
        """See `DataFormat.item`."""
        return _pair(row, row.get("prompt"), "chosen", "rejected", where)


class SharedPrompt(Preference):
    """A chosen and a rejected conversation, messages or one text, whose prompt is how both begin.

    A text's prompt ends with the last line that both share and that gives the word to the assistant ("Assistant:").
    """

    api = 2
    name = "preference-shared-prompt"
    columns = ("chosen", "rejected")
    instead = "To train on the chosen answers alone, remove 'rejected' and rename 'chosen' to 'messages', or to 'text'."

    def item(self, row: Row, where: str) -> Pair | Dropped:
        """See `DataFormat.item`."""
        asked = next((name for name in _QUESTIONS if row.get(name)), None)
        if asked is not None:
            raise InputError(f"{where}: column '{asked}' would be left out: rename it to 'prompt', or remove it.")
        sides = [row.get(name) for name in self.columns]
        if not all(isinstance(side, str) for side in sides):
            return _pair(row, _SHARED, "chosen", "rejected", where)
        _refuse_equal(sides[0], sides[1], "chosen", "rejected", where)
        size = _shared_text(*map(str, sides))
        if not size:
            raise InputError(
                f"{where}: 'chosen' and 'rejected' share no beginning that ends with the assistant's name, such as "
                "'Assistant:', so their prompt is unknown: give it in a column 'prompt'."
            )
        texts = {name: row[name][size:] for name in self.columns}
        return _pair({**row, **texts}, row["chosen"][:size], "chosen", "rejected", where)


class OpenAIPreference(Preference):
    """OpenAI's preference data: messages (and tools) in `input`, and two lists of the assistant's messages."""

    api = 2
    name = "preference-openai"
    columns = ("input", "preferred_output", "non_preferred_output")
    optional = ("weight",)
    instead = "To train on the preferred answers alone, write input.messages as 'prompt' and preferred_output as "
    instead += "'completion'."

    def item(self, row: Row, where: str) -> Pair | Dropped:
        """See `DataFormat.item`."""
        given = row.get("input")
        if not isinstance(given, Mapping):
            raise InputError(
                f"{where}: field 'input' must be an object with messages, not {describe_type(row, 'input')}."
            )
        unknown = next((key for key, v in given.items() if key not in _OPENAI and v not in (None, [], {})), None)
        if unknown is not None:
            raise InputError(
                f"{where}: field 'input' has '{shorten(str(unknown))}', which would be left out. Remove it."
            )
        beside = {name: given[name] for name in ("tools", "functions") if name in given}
        messages = given.get("messages")
        if not isinstance(messages, list):
            raise InputError(
                f"{where}: field 'input' must have a list 'messages', not {describe_type(given, 'messages')}."
            )
        return _pair({**row, **beside}, messages, "preferred_output", "non_preferred_output", where)


class JudgedAnswer(DataFormat):
    """A prompt, an answer, and whether it is desirable: true or false, 1 or 0 (the data of KTO)."""

    api = 2
    name = "judged"
    columns = ("prompt", "completion", "label")
    optional = BESIDE
    tasks = (CAUSAL_LM,)
    holds = JUDGED
    instead = "To train on the good answers alone, keep their rows and remove 'label'."

    def item(self, row: Row, where: str) -> Judged | Dropped:
        """See `DataFormat.item`."""
        desirable = _desirable(row, where)
        answers = _answers(row, row.get("prompt"), ("completion",), where)
        return answers if isinstance(answers, Dropped) else Judged(answers[0], desirable)


_SHARED = object()
"""Stands for a prompt with which both answers begin."""
_OPENAI = ("messages", "tools", "functions", "parallel_tool_calls")
_QUESTIONS = ("question", "query", "problem", "post", "inputs", "user")
"""Columns that hold the prompt in well-known preference data."""
_SPEAKER = re.compile(
    r"^[ \t]*(?:#+ *)?(?:assistant|response|answer|ai|bot|gpt|a)[ \t]*:", re.IGNORECASE | re.MULTILINE
)
_JUDGEMENTS = {"true": True, "1": True, "false": False, "0": False}


def _desirable(row: Row, where: str) -> bool:
    value = row.get("label")
    if isinstance(value, bool | int | str):
        found = _JUDGEMENTS.get(str(value).strip().lower())
        if found is not None:
            return found
    what = describe_type(row, "label") if not isinstance(value, int | str) else repr(shorten(str(value)))
    raise InputError(f"{where}: field 'label' must be true or false (or 1 or 0), not {what}.")


def _pair(row: Row, prompt: Any, chosen: str, rejected: str, where: str) -> Pair | Dropped:
    _refuse_equal(row.get(chosen), row.get(rejected), chosen, rejected, where)
    answers = _answers(row, prompt, (chosen, rejected), where)
    if isinstance(answers, Dropped):
        return answers
    _refuse_equal(answers[0], answers[1], chosen, rejected, where)
    return Pair(answers[0], answers[1])


def _refuse_equal(one: Any, other: Any, chosen: str, rejected: str, where: str) -> None:
    if one == other and one:
        raise InputError(f"{where}: '{chosen}' and '{rejected}' are equal, so neither is preferred. Remove the row.")


def _answers(row: Row, prompt: Any, names: Sequence[str], where: str) -> Sequence[Answer] | Dropped:
    """Return the answers in the columns `names`, each with the prompt; `_SHARED`: it is what they begin with."""
    for name in names:
        if not isinstance(row.get(name), str | list):
            what = describe_type(row, name)
            raise InputError(f"{where}: field '{name}' must be text or a list of messages, not {what}.")
        if not row[name] or (isinstance(row[name], str) and not row[name].strip()):
            raise InputError(f"{where}: '{name}' is empty. Give an answer, or remove the row.")
    texts = [isinstance(row[name], str) for name in names]
    if len(set(texts)) > 1:
        raise InputError(f"{where}: '{names[0]}' and '{names[1]}' must both be text, or both lists of messages.")
    if prompt is not _SHARED and not isinstance(prompt, str | list):
        what = describe_type(row, "prompt")
        raise InputError(f"{where}: field 'prompt' must be text or a list of messages, not {what}.")
    if isinstance(prompt, str) and not prompt.strip():
        return Dropped("empty prompt")
    weight = read_weight(row, where)
    if isinstance(prompt, str) and texts[0]:
        completions = _completions(row, prompt, names, weight, where)
        return completions if weight else Dropped("weight 0")
    conversations = _conversations(row, prompt, names, weight, where)
    if conversations[0].messages[0]["role"] == "assistant":
        return Dropped("begins with the assistant")
    return conversations if weight else Dropped("weight 0")


def _completions(row: Row, prompt: str, names: Sequence[str], weight: float, where: str) -> list[Completion]:
    for name in BESIDE[1:]:
        if row.get(name):
            raise InputError(
                f"{where}: field '{name}' needs a chat template, but 'prompt' is text: give 'prompt' and the answers "
                f"as lists of messages, or remove '{name}'."
            )
    encodable(prompt, "field 'prompt'", where)
    return [Completion(prompt, encodable(row[name], f"field '{name}'", where), weight) for name in names]


def _conversations(row: Row, prompt: Any, names: Sequence[str], weight: float, where: str) -> list[Conversation]:
    ignored: frozenset[str] = frozenset()
    sides, weights = [], []
    for name in names:
        value = [{"role": "assistant", "content": row[name]}] if isinstance(row[name], str) else row[name]
        messages, own, more = read_messages(value, f"field '{name}'", True, where)
        sides.append(messages)
        weights.append(own)
        ignored |= more
    if prompt is _SHARED:
        asked = _shared_messages(sides, names, where)
        sizes = [len(asked)] * len(sides)
    else:
        asked = [{"role": "user", "content": prompt}]
        if isinstance(prompt, list):
            asked, _, more = read_messages(prompt, "field 'prompt'", True, where)
            ignored |= more
        before = [_repeated(messages, prompt, asked) for messages in sides]
        if None in before or len({len(each or ()) for each in before}) > 1:
            name = names[before.index(None)] if None in before else names[1]
            raise InputError(f"{where}: '{name}' begins neither with the assistant's answer nor with 'prompt'.")
        sizes = [len(each or ()) for each in before]
        asked = before[0] or asked
    conversations = []
    for name, messages, own, size in zip(names, sides, weights, sizes, strict=True):
        _check_answer(messages[size:], own[size:], name, where)
        factors = [0.0] * len(asked) + [factor * weight for factor in own[size:]]
        conversations.append(with_columns(row, asked + messages[size:], factors, ignored, where))
    return conversations


def _repeated(messages: Messages, prompt: Any, asked: Messages) -> Messages | None:
    """Return the part of an answer's messages that repeats the prompt, which may be empty; None if they do not fit."""
    if messages[0]["role"] == "assistant":
        return []
    if isinstance(prompt, list):
        return asked if messages[: len(asked)] == asked else None
    at = (i for i, m in enumerate(messages) if m["role"] == "user" and m["content"].split() == prompt.split())
    size = next(at, -1) + 1
    return messages[:size] or None


def _shared_messages(sides: Sequence[Messages], names: Sequence[str], where: str) -> Messages:
    """Return the messages that both conversations begin with, up to the assistant's answers."""
    size = 0
    while size < min(map(len, sides)) and sides[0][size] == sides[1][size]:
        size += 1
    if size == min(map(len, sides)):
        raise InputError(f"{where}: '{names[0]}' and '{names[1]}': one is the beginning of the other.")
    if not size or any(messages[size]["role"] != "assistant" for messages in sides):
        raise InputError(
            f"{where}: '{names[0]}' and '{names[1]}' differ in message {size + 1}, before the assistant's: the "
            "answers of a pair have the same prompt. Give 'prompt', or remove the row."
        )
    return sides[0][:size]


def _shared_text(one: str, other: str) -> int:
    """Return the length of the prompt that two texts share, up to a line's "Assistant:"; 0 if there is none."""
    shared = os.path.commonprefix([one, other])
    marks = list(_SPEAKER.finditer(shared))
    return marks[-1].end() if marks else 0


def _check_answer(messages: Messages, weights: Sequence[float], name: str, where: str) -> None:
    """Refuse an answer without a text to compare, or with weights of its own."""
    if not messages or messages[-1]["role"] != "assistant":
        raise InputError(f"{where}: '{name}' must end with the assistant's message.")
    if not all(weight in (0, 1) for weight in weights):
        raise InputError(f"{where}: '{name}': a message's weight must be 0 or 1; the row's is in the column 'weight'.")
    scored = [message for message, weight in zip(messages, weights, strict=True) if weight]
    if not all(message["content"].strip() or message.get("tool_calls") for message in scored) or not scored:
        raise InputError(f"{where}: '{name}' is empty. Give an answer, or remove the row.")

"""Data forms: what columns mean, and how rows become tokens. Others come through entry points, group budwood.forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from budwood.contract.discovery import installed
from budwood.contract.loading import create
from budwood.contract.strategy import Plugin
from budwood.data.encoder import Encoder, Span, check_template
from budwood.data.reading import Row, read_rows
from budwood.errors import BudwoodError, InputError, did_you_mean

GROUP = "budwood.forms"
ROLES = ("system", "developer", "user", "assistant")
CAUSAL_LM, CLASSIFICATION = "causal-lm", "sequence-classification"


@dataclass(slots=True)
class Encoded:
    """A row as tokens: `spans` (start, stop) of those with a loss, `label` the class's name; not yet cut to length."""

    input_ids: list[int]
    spans: Sequence[Span] = ()
    prompt_length: int = 0
    label: str | None = None
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that nothing can be learned from, and why, in a few words that are counted."""

    reason: str


class Form(Plugin):
    """What every data form brings: it is recognised when a file has all its columns."""

    group = GROUP
    must_declare = ("name", "columns", "tasks")
    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    tasks: ClassVar[tuple[str, ...]]
    """Tasks whose examples it makes."""

    def encode(self, rows: Sequence[Row], where: Sequence[str], encoder: Encoder) -> list[Encoded | Dropped]:
        """Turn rows into tokens; `where` names each row's place in messages.

        Raises:
            InputError: a field is missing, null or not of its type; the message begins with the row's place.
        """
        raise NotImplementedError

    def check(self, row: Row, where: str) -> str | None:
        """Return why nothing can be learned from a row, or None; looks at its fields alone.

        Raises:
            InputError: as `encode`.
        """
        return None

    def reference(self, row: Row) -> str | None:
        """What a right answer to the row's prompt would be, or None where there is no prompt."""
        return None


class PromptCompletion(Form):
    """A prompt and its completion; the loss is on the completion and the end-of-sequence token."""

    name = "prompt-completion"
    columns = ("prompt", "completion")
    tasks = (CAUSAL_LM,)

    def encode(self, rows: Sequence[Row], where: Sequence[str], encoder: Encoder) -> list[Encoded | Dropped]:
        """See `Form.encode`."""
        results: list[Encoded | Dropped] = []
        pairs: list[tuple[str, str]] = []
        kept: list[int] = []
        for row, place in zip(rows, where, strict=True):
            reason = self.check(row, place)
            if reason is None:
                kept.append(len(results))
                pairs.append((row["prompt"], row["completion"]))
            results.append(Encoded([]) if reason is None else Dropped(reason))
        texts = [prompt + completion for prompt, completion in pairs]
        spans = [[(len(prompt), len(prompt) + len(completion))] for prompt, completion in pairs]
        for at, (ids, ((start, _),)) in zip(kept, encoder.split(texts, spans, rendered=False), strict=True):
            results[at] = Encoded(_ended(ids, encoder, where[at]), [(start, len(ids))], start)
        return results

    def check(self, row: Row, where: str) -> str | None:
        """See `Form.check`."""
        blank = [name for name in self.columns if not string(row, name, where).strip()]
        return f"empty {blank[-1]}" if blank else None

    def reference(self, row: Row) -> str | None:
        """The completion."""
        return str(row["completion"])


class Text(Form):
    """Plain text; the loss is on every token but the first, and on the end-of-sequence token."""

    name = "text"
    columns = ("text",)
    tasks = (CAUSAL_LM,)

    def encode(self, rows: Sequence[Row], where: Sequence[str], encoder: Encoder) -> list[Encoded | Dropped]:
        """See `Form.encode`."""
        texts = [string(row, "text", place) for row, place in zip(rows, where, strict=True)]
        results: list[Encoded | Dropped] = []
        for text, ids, place in zip(texts, encoder.start(texts), where, strict=True):
            ids = _ended(ids, encoder, place)
            results.append(Encoded(ids, [(1, len(ids))]) if text.strip() else Dropped("empty text"))
        return results

    def check(self, row: Row, where: str) -> str | None:
        """See `Form.check`."""
        return None if string(row, "text", where).strip() else "empty text"


class TextLabel(Form):
    """A text and its class."""

    name = "text-label"
    columns = ("text", "label")
    tasks = (CLASSIFICATION,)

    def encode(self, rows: Sequence[Row], where: Sequence[str], encoder: Encoder) -> list[Encoded | Dropped]:
        """See `Form.encode`."""
        texts = [string(row, "text", place) for row, place in zip(rows, where, strict=True)]
        results: list[Encoded | Dropped] = []
        for row, place, text, ids in zip(rows, where, texts, encoder.whole(texts), strict=True):
            reason = self.check(row, place)
            if reason is not None:
                results.append(Dropped(reason))
                continue
            too_long = encoder.max_length is not None and len(ids) > encoder.max_length
            if too_long:
                ids = encoder.cut(text, encoder.max_length or 0)
            results.append(Encoded(ids, label=str(row["label"]), truncated=too_long))
        return results

    def check(self, row: Row, where: str) -> str | None:
        """See `Form.check`."""
        text, label = string(row, "text", where), row.get("label")
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise InputError(f"{where}: field 'label' must be text or a whole number, not {_kind(row, 'label')}.")
        if not text.strip():
            return "empty text"
        return None if str(label).strip() else "empty label"


class Messages(Form):
    """A conversation; the loss is on the assistant's turns and the token that ends each of them.

    Where a turn stands is proved, not guessed. The conversation as rendered must begin with the rendering of the
    messages before the turn, up to the answer; then come the turn's own words; then a token that ends it. A template
    that rewrites what was said before, or that puts words of its own before an answer, is refused.
    """

    name = "messages"
    columns = ("messages",)
    tasks = (CAUSAL_LM,)

    def encode(self, rows: Sequence[Row], where: Sequence[str], encoder: Encoder) -> list[Encoded | Dropped]:
        """See `Form.encode`."""
        reasons = [self.check(row, place) for row, place in zip(rows, where, strict=True)]
        results: list[Encoded | Dropped] = [Dropped(reason) if reason else Encoded([]) for reason in reasons]
        kept = [at for at, reason in enumerate(reasons) if reason is None]
        check_template(encoder.tokenizer, where[0])
        rendered = encoder.chat(part for at in kept for part in _parts(rows[at]["messages"]))
        texts: list[str] = []
        spans: list[list[Span]] = []
        for at in kept:
            messages = rows[at]["messages"]
            if any(encoder.end_marks.search(message["content"]) for message in messages):
                encoder.remarks["conversations that spell out control tokens, which are read as such"] += 1
            text, found = _find_turns(messages, where[at], encoder, rendered)
            texts.append(text[: found[-1][1]])  # what follows the last turn has no loss and is not needed
            spans.append(found)
        for at, (ids, found) in zip(kept, encoder.split(texts, spans, rendered=True), strict=True):
            encoder.stop_ids.update(ids[stop - 1] for _, stop in found)
            results[at] = Encoded(ids, found, found[0][0])
        return results

    def check(self, row: Row, where: str) -> str | None:
        """See `Form.check`."""
        return _unusable(_check_messages(row, where))

    def reference(self, row: Row) -> str | None:
        """The assistant's first turn."""
        return next((str(m["content"]) for m in row["messages"] if m["role"] == "assistant"), None)


def check_rows(path: str | Path, task: str) -> None:
    """Look through a file's fields, without a tokenizer, for what would end a run after a long wait.

    Raises:
        InputError: unreadable, malformed, of no form that the task takes, or without a row to learn from.
    """
    rows = read_rows(path)
    form = recognise(rows.columns, task, str(rows.path))
    reasons = Counter(form.check(row, rows.location(index)) for index, row in enumerate(rows))
    if None not in reasons:
        raise InputError(all_dropped(rows.path, reasons))


def all_dropped(path: Path, reasons: Mapping[Any, int]) -> str:
    """The line that says that no row of a file is left, and why."""
    told = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
    return f"{path}: all of its {sum(reasons.values()):,} rows were dropped: {told}."


def recognise(columns: Sequence[str], task: str, where: str) -> Form:
    """Find the one form of `task` whose columns a file has.

    A form whose columns are part of another recognised one's (text, and text with label) gives way to it.

    Raises:
        InputError: no form, several, or one of another task; the message says what is accepted.
    """
    forms, broken = _installed_forms()
    found = [form for form in forms if set(form.columns) <= set(columns)]
    found = [form for form in found if not any(set(form.columns) < set(other.columns) for other in found)]
    here = ", ".join(f"'{name}'" for name in columns) or "none"
    if len(found) > 1:
        names = " and as ".join(_spell(form) for form in found)
        raise InputError(f"{where}: columns {here} can be read as {names}. Leave the columns of one of them only.")
    if not found:
        accepted = "; ".join(_spell(form) for form in forms)
        raise InputError(
            f"{where}: columns {here} are not understood.{_nearest(columns, forms)} Accepted: {accepted}.{broken}"
        )
    form = found[0]
    if task in form.tasks:
        return form
    remedy = f"Set base.task: {form.tasks[0]}"
    narrower = [other for other in forms if task in other.tasks and set(other.columns) < set(form.columns)]
    if narrower:
        extra = " and ".join(f"'{name}'" for name in form.columns if name not in narrower[0].columns)
        remedy += f", or remove {extra} to train on {_spell(narrower[0])} alone"
    else:
        wanted = "; ".join(_spell(other) for other in forms if task in other.tasks)
        remedy += f", or give {wanted}" if wanted else ""
    raise InputError(f"{where}: {_spell(form)} is data for {form.tasks[0]}, but the task is {task}. {remedy}.")


def _installed_forms() -> tuple[list[Form], str]:
    """Every form that works, and a sentence on those that do not: they matter only where no other form fits."""
    forms: list[Form] = []
    broken = ""
    for name in installed(GROUP):
        try:
            forms.append(create(name, GROUP))
        except BudwoodError as error:
            broken += f" {error}"
    return forms, broken


def _spell(form: Form) -> str:
    return " + ".join(form.columns)


def _nearest(columns: Sequence[str], forms: Sequence[Form]) -> str:
    """Say which column is missing, or is called otherwise, in the form that comes nearest."""
    partly = [(form, [name for name in form.columns if name not in columns]) for form in forms]
    near = [(form, missing) for form, missing in partly if len(missing) < len(form.columns)]
    if near:
        form, missing = min(near, key=lambda pair: len(pair[1]))
        return f" {_spell(form)} lacks '{missing[0]}'."
    guesses = (did_you_mean(name, [known for form in forms for known in form.columns]) for name in columns)
    return next(filter(None, guesses), "")


def string(row: Row, field: str, where: str) -> str:
    """The text of a field.

    Raises:
        InputError: it is missing, null, not text, or text that no encoding can hold.
    """
    value = row.get(field)
    if not isinstance(value, str):
        raise InputError(f"{where}: field '{field}' must be text, not {_kind(row, field)}.")
    return _encodable(value, f"field '{field}'", where)


def _encodable(text: str, what: str, where: str) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: {what} has half a character (\\u{ord(text[error.start]):04x}).") from error
    return text


def _kind(row: Row, field: str) -> str:
    if field not in row:
        return "missing"
    value = row[field]
    return "null" if value is None else f"a {type(value).__name__}"


def _ended(ids: list[int], encoder: Encoder, where: str) -> list[int]:
    end = encoder.end(where)
    if not ids or ids[-1] != end:
        ids.append(end)
    return ids


def _check_messages(row: Row, where: str) -> list[dict[str, Any]]:
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise InputError(f"{where}: field 'messages' must be a list, not {_kind(row, 'messages')}.")
    if not messages:
        raise InputError(f"{where}: field 'messages' is an empty list.")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise InputError(f"{where}: message {number} must be an object with role and content.")
        role = message.get("role")
        if not isinstance(role, str):
            raise InputError(f"{where}: message {number}: 'role' must be text, not {_kind(message, 'role')}.")
        if role not in ROLES:
            hint = did_you_mean(role, ROLES) or f" Known: {', '.join(ROLES)}."
            raise InputError(f"{where}: message {number}: unknown role '{role}'.{hint}")
        if message.get("tool_calls"):
            raise InputError(f"{where}: message {number}: tool calls are not supported.")
        content = message.get("content")
        if not isinstance(content, str):
            raise InputError(f"{where}: message {number}: 'content' must be text, not {_kind(message, 'content')}.")
        _encodable(content, f"message {number}", where)
    return messages


def _unusable(messages: Sequence[Row]) -> str | None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        return "no assistant turn"
    if messages[0]["role"] == "assistant":
        return "begins with the assistant"
    return None if all(message["content"].strip() for message in answers) else "empty assistant turn"


def _parts(messages: Sequence[dict[str, Any]]) -> Iterator[tuple[Sequence[dict[str, Any]], bool]]:
    """What has to be rendered to find a conversation's turns: all of it, and what stands before each answer."""
    yield messages, False
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            yield messages[:at], True


def _find_turns(
    messages: Sequence[dict[str, Any]], where: str, encoder: Encoder, rendered: Iterator[str | InputError]
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

"""Tokenises text identically for training and generation."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from budwood.data.classes import Classes
from budwood.data.forms import FORMS, find_left_out, says_none
from budwood.errors import InputError
from budwood.untrusted.chat_template import Rendered, render, today, writes_date

Span = tuple[int, int]
BATCH = 1 << 20
"""Characters tokenised per call: the tokenizer takes some hundred bytes for each of its tokens."""


@dataclass(frozen=True, slots=True)
class Request:
    """Messages to render, and whether to append the generation prompt, after which the assistant answers."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    prompt: bool = False


class Encoder:
    """A tokenizer with the rules that training and generation share.

    - A text begins with the tokenizer's prefix tokens (usually BOS), once: a text that spells out BOS does not get a
      second one. Tokens that the tokenizer appends are omitted; the end token is added explicitly.
    - A prompt is tokenised as it is alone, since generation sees nothing else. If the tokens of the complete text begin
      with those of the prompt, the completion has the rest of them. Otherwise it is tokenised separately.

    Attributes:
        tokenizer: a transformers tokenizer; None for a task that does not need one.
        template_options: variables for the chat template, such as `enable_thinking`.
        loss_on: "assistant", "last" (only the last answer of a conversation) or "all" (prompts too).
        chat_template: used instead of the tokenizer's; None: the tokenizer's.
        as_chat: whether a prompt and its completion are rendered as messages.
        rendered: whether the chat template was used.
        classes: names of the classes that labels index.
        remarks: number of occurrences of each remark to the user.
        stop_ids: tokens that end an answer: the tokenizer's EOS, and the end tokens of the chat template's turns.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int | None = None,
        template_options: Mapping[str, Any] | None = None,
        labels: Sequence[str] | None = None,
        loss_on: str = "assistant",
        date: str | None = None,
        as_chat: bool = False,
    ) -> None:
        self.as_chat = as_chat
        self.tokenizer, self.max_length = tokenizer, max_length
        self.template_options = dict(template_options or {})
        self.loss_on = loss_on
        self.chat_template: str | None = None
        self._date = date or today()
        self._start(labels)

    def _start(self, labels: Sequence[str] | None) -> None:
        """Set what depends on the texts to what it is before the first one."""
        self.rendered = False
        self.classes = Classes(labels)
        self.remarks: Counter[str] = Counter()
        end = getattr(self.tokenizer, "eos_token_id", None)
        self.stop_ids: set[int] = set() if end is None else {end}

    def fresh(self) -> Encoder:
        """Return a copy that has met no text: without remarks, learned classes, and stop tokens of a template."""
        other = copy.copy(self)
        other._start(self.classes.given)
        return other

    def prompt(self, request: Request) -> list[int]:
        """Return the tokens from which the assistant answers messages, in the first form that the template renders.

        Raises:
            InputError: the template rejects the messages, or leaves out part of them.
        """
        first: Rendered | InputError | None = None
        for form in FORMS:
            written = [form(message) for message in request.messages]
            text = next(self.chat([replace(request, messages=written, prompt=True)]))
            whole = not isinstance(text, InputError) and find_left_out(request.messages, text) is None
            if not isinstance(text, InputError) and whole and not says_none(written, text):
                return self.plain([text])[0]
            first = text if first is None else first
        if isinstance(first, InputError):
            raise first
        raise InputError("the chat template leaves out or changes a message. Give another template.")

    @property
    def date(self) -> str | None:
        """The date that the chat template writes, as 2026-11-28; None if it writes none."""
        template = self.chat_template or getattr(self.tokenizer, "chat_template", None)
        templates = template.values() if isinstance(template, dict) else [template]
        return self._date if any(isinstance(text, str) and writes_date(text) for text in templates) else None

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, without special tokens around it."""
        return self._call(texts, add_special_tokens=False) if texts else []

    def whole(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text with the tokenizer's special tokens, as classifiers read it; not truncated."""
        rows = self._call(texts, add_special_tokens=True)
        bos = self.tokenizer.bos_token_id
        return [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in rows]

    def cut(self, text: str, length: int) -> list[int]:
        """Return the tokens of a text, truncated to `length` including the tokenizer's special tokens."""
        return self._call([text], add_special_tokens=True, truncation=True, max_length=length)[0]

    def start(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text at the start of a sequence: with BOS once, if the tokenizer uses it."""
        rows = self.plain(texts)
        prefix = self.prefix
        return [ids if ids[: len(prefix)] == prefix else prefix + ids for ids in rows]

    def continuation(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts that follow others, without the space that some tokenizers add before a text."""
        if not texts or not self._adds_space:
            return self.plain(texts)
        line, *joined = self.plain(["\n", *("\n" + text for text in texts)])
        rows = zip(joined, self.plain(texts), strict=True)
        return [after[len(line) :] if after[: len(line)] == line else alone for after, alone in rows]

    def end(self, where: str) -> int:
        """Return the end-of-sequence token.

        Raises:
            InputError: the tokenizer has none.
        """
        token = self.tokenizer.eos_token_id
        if token is None:
            raise InputError(
                f"{where}: the base's tokenizer has no end-of-sequence token, so answers would never end. "
                "Set eos_token in its tokenizer_config.json."
            )
        return int(token)

    def split(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]], rendered: bool
    ) -> list[tuple[list[int], list[Span]]]:
        """Tokenise texts such that the tokens before the first span are those that generation would see.

        If a token of the complete text would cross a boundary, the pieces between boundaries are tokenised separately:
        a prompt and its answer, or a conversation turn by turn.

        Args:
            texts: complete texts, each ending at the end of its last span.
            spans: (start, stop) in characters of what the model should write, for each text.
            rendered: the texts were rendered by a chat template, so no prefix tokens are added.

        Returns:
            The tokens of each text, and its spans in tokens.
        """
        results: list[tuple[list[int], list[Span]]] = []
        apart: dict[int, list[str]] = {}
        known = self._rendered(texts, spans) if rendered else self._started(texts, spans)
        for index, (text, row, (ids, bounds)) in enumerate(zip(texts, spans, known, strict=True)):
            if bounds is None:
                cuts = [at for span in row for at in span]
                apart[index] = [text[i:j] for i, j in zip(cuts, cuts[1:], strict=False)]
            results.append((ids, bounds or []))
        if apart:
            self.remarks["rows where a token would cross the start of an answer: tokenised separately"] += len(apart)
        pieces = iter(self.continuation([piece for row in apart.values() for piece in row]))
        for index, cut in apart.items():
            results[index] = _join(results[index][0], [next(pieces) for _ in cut])
        return results

    def _started(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> Iterator[tuple[list[int], list[Span] | None]]:
        """Yield each text's tokens and its spans in tokens; if a token crosses one, the first prompt's and None."""
        parts = [text[:at] for text, row in zip(texts, spans, strict=True) for span in row for at in span]
        known = dict(zip(parts, self.start(parts), strict=True))
        for text, row in zip(texts, spans, strict=True):
            yield self._proved(known[text], [(known[text[:start]], known[text[:stop]]) for start, stop in row])

    def _proved(
        self, ids: list[int], bounds: Sequence[tuple[list[int], list[int]]]
    ) -> tuple[list[int], list[Span] | None]:
        if all(ids[: len(part)] == part for bound in bounds for part in bound):
            return ids, [(len(before), len(upto)) for before, upto in bounds]
        return bounds[0][0], None

    def _rendered(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> Iterator[tuple[list[int], list[Span] | None]]:
        """As `_started`, for texts with marks, which cut them into pieces that are tokenised independently.

        So the tokens before an answer are those of the text up to the last mark before it, and those from that mark to
        the answer: only these few are tokenised a second time, whatever the number of turns.
        """
        for batch in _batches(texts):
            encoded = self.plain([texts[index] for index in batch])
            tails: dict[str, list[int]] = {}
            for index in batch:
                tails |= {tail: [] for _, tail in self._tails(texts[index], spans[index])}
            tails = dict(zip(tails, self.plain(list(tails)), strict=True))
            for index, ids in zip(batch, encoded, strict=True):
                yield self._place(texts[index], spans[index], ids, tails)

    def _tails(self, text: str, row: Sequence[Span]) -> Iterator[tuple[int, str]]:
        """Yield for each bound the number of marks before its tail, and the tail: from the last mark before it."""
        marks = list(self._hard_marks.finditer(text))
        at = 0
        for bound in (bound for span in row for bound in span):
            while at < len(marks) and marks[at].end() <= bound:
                at += 1
            yield at - 1, text[marks[at - 1].start() if at else 0 : bound]

    def _place(
        self, text: str, row: Sequence[Span], ids: list[int], tails: Mapping[str, list[int]]
    ) -> tuple[list[int], list[Span] | None]:
        marks = [self._mark_ids[mark[0]] for mark in self._hard_marks.finditer(text)]
        known = set(self._mark_ids.values())
        where = [place for place, token in enumerate(ids) if token in known]
        if [ids[place] for place in where] != marks:  # a mark's token stands for other text too
            parts = [text[:bound] for span in row for bound in span]
            before = dict(zip(parts, self.plain(parts), strict=True))
            return self._proved(ids, [(before[text[:start]], before[text[:stop]]) for start, stop in row])
        bounds: list[int] = []
        for number, tail in self._tails(text, row):
            start = where[number] if number >= 0 else 0
            bounds.append(start + len(tails[tail]))
            if ids[start : bounds[-1]] != tails[tail]:
                first = self.plain([text[: row[0][0]]])[0]
                return first, None
        return ids, list(zip(bounds[::2], bounds[1::2], strict=True))

    def chat(self, requests: Iterable[Request]) -> Iterator[Rendered | InputError]:
        """Render conversations with the chat template.

        Yields:
            The text of each conversation, or its error; see `render`.
        """
        variables = {**self.tokenizer.special_tokens_map, **self.template_options}
        self.rendered = True
        for tools, group in groupby(requests, key=lambda request: bool(request.tools)):
            inputs = (
                (
                    request.messages,
                    {
                        **variables,
                        **request.options,
                        **({"tools": list(request.tools)} if tools else {}),
                        "add_generation_prompt": request.prompt,
                        "date_of_run": self._date,
                    },
                )
                for request in group
            )
            yield from render(self._template(tools), inputs)

    def _template(self, tools: bool) -> str:
        if self.chat_template is not None:
            return self.chat_template
        try:
            return str(self.tokenizer.get_chat_template(tools=[{}] if tools else None))
        except ValueError as error:  # several templates, and no default
            raise InputError(f"no default chat template: {str(error).partition('.')[0]}.") from error

    @cached_property
    def prefix(self) -> list[int]:
        """Tokens that the tokenizer puts before every text."""
        body, full = self.plain(["a"])[0], self._call(["a"], add_special_tokens=True)[0]
        places = range(len(full) - len(body) + 1)
        return next((full[:at] for at in places if full[at : at + len(body)] == body), [])

    @cached_property
    def end_marks(self) -> re.Pattern[str]:
        """Pattern of all tokens that cannot be split: special and added ones."""
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        marks = {mark for mark in added | set(self.tokenizer.all_special_tokens) if mark.strip()}
        return _any_of(marks)

    @cached_property
    def _mark_ids(self) -> dict[str, int]:
        """Tokens that are cut out of a text before anything else, so that no text around them changes their bounds."""
        added = self.tokenizer.added_tokens_decoder
        if any(token.single_word for token in added.values()):
            return {}
        return {token.content: number for number, token in added.items() if not token.normalized and token.content}

    @cached_property
    def _hard_marks(self) -> re.Pattern[str]:
        return _any_of(self._mark_ids)

    @cached_property
    def _adds_space(self) -> bool:
        first = self.plain(["a"])[0][:1]
        return bool(first) and self.tokenizer.convert_ids_to_tokens(first[0]).startswith("▁")

    def _call(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        encoded = self.tokenizer(
            list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False, **options
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def _join(prompt: list[int], pieces: Sequence[list[int]]) -> tuple[list[int], list[Span]]:
    """Concatenate a prompt and the pieces after it, of which every other one is an answer; also return their spans."""
    ids, spans = list(prompt), []
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            spans.append((len(ids), len(ids) + len(piece)))
        ids += piece
    return ids, spans


def _any_of(marks: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(marks, key=lambda mark: (-len(mark), mark))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _batches(texts: Sequence[str]) -> Iterator[list[int]]:
    """Group the indices of texts into batches of about `BATCH` characters."""
    batch: list[int] = []
    size = 0
    for index, text in enumerate(texts):
        batch.append(index)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens from which generation continues `prompt`, exactly as training tokenises a prompt."""
    return Encoder(tokenizer).start([prompt])[0]


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    template_options: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    date: str | None = None,
) -> list[int]:
    """Return the tokens from which the assistant answers `messages`, exactly as training tokenises them.

    Raises:
        InputError: the tokenizer has no chat template, or the template rejects the messages.
    """
    if chat_template is None:
        check_template(tokenizer, "chat")
    encoder = Encoder(tokenizer, template_options=template_options, date=date)
    encoder.chat_template = chat_template
    try:
        return encoder.prompt(Request(messages))
    except InputError as error:
        raise InputError(f"chat: {error}") from error


def check_template(tokenizer: Any, where: str) -> None:
    """Check that a tokenizer has a chat template.

    Raises:
        InputError: it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{where}: the base's tokenizer has no chat template, which messages need. "
            "Use the columns prompt and completion, or a chat model as the base."
        )

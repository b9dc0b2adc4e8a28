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
from budwood.data.tools import ToolForm, find_form, with_tools
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
      with those of the prompt, the completion has the rest of them. Otherwise it is tokenised separately, and an
      answer within a conversation becomes an example of its own, which ends with it.

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
        """Return the end-of-sequence token; without one, what the tokenizer puts after every text, as encoders' [SEP].

        Raises:
            InputError: the tokenizer has neither.
        """
        token = self.tokenizer.eos_token_id
        if token is None and self.suffix:
            token = self.suffix[-1]
        if token is None:
            raise InputError(
                f"{where}: the base's tokenizer has no end-of-sequence token, so answers would never end. "
                "Set eos_token in its tokenizer_config.json."
            )
        return int(token)

    def split(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]], rendered: bool
    ) -> Iterator[list[tuple[list[int], list[Span], list[int]]]]:
        """Tokenise texts such that the tokens before each span are those that generation would see.

        Where a token of the complete text would cross the start or end of a span, that span gets a row of its own: the
        text up to it, tokenised as it is alone, and its own text, tokenised as it goes on from there.

        Args:
            texts: complete texts, each ending at the end of its last span.
            spans: (start, stop) in characters of what the model should write, for each text.
            rendered: the texts were rendered by a chat template, so no prefix tokens are added.

        Yields:
            The rows of each text: their tokens, their spans in tokens, and the numbers of these spans.
        """
        for text, row, (ids, bounds) in zip(
            texts, spans, self._rendered(texts, spans) if rendered else self._started(texts, spans), strict=True
        ):
            found = [(number, bound) for number, bound in enumerate(bounds) if bound is not None]
            rows = [(ids[: found[-1][1][1]], [bound for _, bound in found], [n for n, _ in found])] if found else []
            apart = [number for number, bound in enumerate(bounds) if bound is None]
            for number in apart:
                start, stop = row[number]
                (prompt,) = (self.plain if rendered else self.start)([text[:start]])
                whole = prompt + self.continuation([text[start:stop]])[0]
                rows.append((whole, [(len(prompt), len(whole))], [number]))
            if apart:
                what = "answers of conversations" if rendered else "rows"
                self.remarks[f"{what} where a token would cross the start of an answer: tokenised separately"] += len(
                    apart
                )
            yield sorted(rows, key=lambda each: each[2][-1])

    def _started(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> Iterator[tuple[list[int], list[Span | None]]]:
        """Yield each text's tokens, and its spans in tokens; None for a span that a token crosses."""
        parts = [text[:at] for text, row in zip(texts, spans, strict=True) for span in row for at in span]
        known = dict(zip(parts, self.start(parts), strict=True))
        for text, row in zip(texts, spans, strict=True):
            yield known[text], _prove(known[text], [(known[text[:start]], known[text[:stop]]) for start, stop in row])

    def _rendered(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> Iterator[tuple[list[int], list[Span | None]]]:
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
                yield ids, self._place(texts[index], spans[index], ids, tails)

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
    ) -> list[Span | None]:
        marks = [self._mark_ids[mark[0]] for mark in self._hard_marks.finditer(text)]
        known = set(self._mark_ids.values())
        where = [place for place, token in enumerate(ids) if token in known]
        if [ids[place] for place in where] != marks:  # a mark's token stands for other text too
            parts = [text[:bound] for span in row for bound in span]
            before = dict(zip(parts, self.plain(parts), strict=True))
            return _prove(ids, [(before[text[:start]], before[text[:stop]]) for start, stop in row])
        bounds: list[int | None] = []
        for number, tail in self._tails(text, row):
            start = where[number] if number >= 0 else 0
            stop = start + len(tails[tail])
            bounds.append(stop if ids[start:stop] == tails[tail] else None)
        pairs = zip(bounds[::2], bounds[1::2], strict=True)
        return [None if start is None or stop is None else (start, stop) for start, stop in pairs]

    def chat(self, requests: Iterable[Request]) -> Iterator[Rendered | InputError]:
        """Render conversations with the chat template.

        Yields:
            The text of each conversation, or its error; see `render`.
        """
        self.rendered = True
        for tools, group in groupby(requests, key=lambda request: bool(request.tools)):
            form = self.tool_form if tools else None
            if form is not None:
                group = (replace(r, messages=with_tools(r.messages, r.tools, form), tools=()) for r in group)
            yield from self._render(group, self._template(tools))

    def prompt(self, request: Request) -> Rendered | InputError:
        """Return the text that the assistant answers, in the first form of the messages that is rendered whole."""
        first: Rendered | InputError | None = None
        for form in FORMS:
            written = [form(message) for message in request.messages]
            text = next(self.chat([replace(request, messages=written, prompt=True)]))
            whole = not isinstance(text, InputError) and find_left_out(request.messages, text) is None
            if not isinstance(text, InputError) and whole and not says_none(written, text):
                return text
            first = text if first is None else first
        if isinstance(first, InputError):
            return first
        return InputError("the chat template leaves out or changes a message. Give another template.")

    def _render(self, requests: Iterable[Request], template: str) -> Iterator[Rendered | InputError]:
        variables = {**self.tokenizer.special_tokens_map, **self.template_options}
        inputs = (
            (
                request.messages,
                {
                    **variables,
                    **request.options,
                    **({"tools": list(request.tools)} if request.tools else {}),
                    "add_generation_prompt": request.prompt,
                    "date_of_run": self._date,
                },
            )
            for request in requests
        )
        yield from render(template, inputs)

    @cached_property
    def tool_form(self) -> ToolForm | None:
        """How the chat template reads tools from the system message; None if it does not."""
        template = self._template(True)
        return find_form(lambda messages, tools: next(self._render([Request(messages, tools)], template)))

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
    def suffix(self) -> list[int]:
        """Tokens that the tokenizer puts after every text."""
        full = self._call(["a"], add_special_tokens=True)[0]
        return full[len(self.prefix) + len(self.plain(["a"])[0]) :]

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


def _prove(ids: list[int], bounds: Sequence[tuple[list[int], list[int]]]) -> list[Span | None]:
    """Return where the text before each span and up to its end stop in `ids`; None if they do not begin with both."""
    return [
        (len(before), len(upto)) if ids[: len(before)] == before and ids[: len(upto)] == upto else None
        for before, upto in bounds
    ]


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
    tools: Sequence[Any] = (),
) -> list[int]:
    """Return the tokens from which the assistant answers `messages`, exactly as training tokenises them.

    Raises:
        InputError: the tokenizer has no chat template, or the template rejects the messages.
    """
    if chat_template is None:
        check_template(tokenizer, "chat")
    encoder = Encoder(tokenizer, template_options=template_options, date=date)
    encoder.chat_template = chat_template
    text = encoder.prompt(Request(messages, tools))
    if isinstance(text, InputError):
        raise InputError(f"chat: {text}")
    return encoder.plain([text])[0]


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

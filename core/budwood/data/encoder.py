"""Tokenises text identically for training and generation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from budwood.data.classes import Classes
from budwood.errors import InputError
from budwood.untrusted.chat_template import render, today, writes_date

Span = tuple[int, int]


class Encoder:
    """A tokenizer with the rules that training and generation share.

    - A text begins with the tokenizer's prefix tokens (usually BOS), once: a text that spells out BOS does not get a
      second one. Tokens that the tokenizer appends are omitted; the end token is added explicitly.
    - A prompt is tokenised as it is alone, since generation sees nothing else. If the tokens of the complete text begin
      with those of the prompt, the completion has the rest of them. Otherwise it is tokenised separately.

    Attributes:
        tokenizer: a transformers tokenizer; None for a task that does not need one.
        template_options: variables for the chat template, such as `enable_thinking`.
        date: the date that the chat template writes, as 2026-11-28; None if it writes none.
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
        date: str | None = None,
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.template_options = dict(template_options or {})
        self.date = (date or today()) if _writes_date(tokenizer) else None
        self.rendered = False
        self.classes = Classes(labels)
        self.remarks: Counter[str] = Counter()
        end = getattr(tokenizer, "eos_token_id", None)
        self.stop_ids: set[int] = set() if end is None else {end}

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
        parts = [text[:at] for text, row in zip(texts, spans, strict=True) for span in row for at in span]
        known = dict(zip(parts, self.plain(parts) if rendered else self.start(parts), strict=True))
        results: list[tuple[list[int], list[Span]]] = []
        apart: dict[int, list[str]] = {}
        for index, (text, row) in enumerate(zip(texts, spans, strict=True)):
            ids = known[text]
            bounds = [(known[text[:start]], known[text[:stop]]) for start, stop in row]
            if not all(ids[: len(part)] == part for bound in bounds for part in bound):
                cuts = [at for span in row for at in span]
                apart[index] = [text[i:j] for i, j in zip(cuts, cuts[1:], strict=False)]
                ids = bounds[0][0]
            results.append((ids, [(len(before), len(upto)) for before, upto in bounds]))
        if apart:
            self.remarks["rows where a token would cross the start of an answer: tokenised separately"] += len(apart)
        pieces = iter(self.continuation([piece for row in apart.values() for piece in row]))
        for index, cut in apart.items():
            results[index] = _join(results[index][0], [next(pieces) for _ in cut])
        return results

    def chat(self, conversations: Iterable[tuple[Sequence[Mapping[str, Any]], bool]]) -> Iterator[str | InputError]:
        """Render conversations with the chat template.

        Args:
            conversations: messages, and whether to append the generation prompt, after which the assistant answers.

        Yields:
            The text of each conversation, or its error; see `render`.
        """
        variables = {**self.tokenizer.special_tokens_map, **self.template_options}
        self.rendered = True
        variables |= {"date_of_run": self.date} if self.date else {}
        inputs = ((messages, {**variables, "add_generation_prompt": prompt}) for messages, prompt in conversations)
        return render(self._template, inputs)

    @cached_property
    def _template(self) -> str:
        try:
            return str(self.tokenizer.get_chat_template())
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
        longest_first = sorted(marks, key=lambda mark: (-len(mark), mark))
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

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


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens from which generation continues `prompt`, exactly as training tokenises a prompt."""
    return Encoder(tokenizer).start([prompt])[0]


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    template_options: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> list[int]:
    """Return the tokens from which the assistant answers `messages`, exactly as training tokenises them.

    Raises:
        InputError: the tokenizer has no chat template, or the template rejects the messages.
    """
    check_template(tokenizer, "chat")
    encoder = Encoder(tokenizer, template_options=template_options, date=date)
    text = next(encoder.chat([(messages, True)]))
    if isinstance(text, InputError):
        raise InputError(f"chat: {text}")
    return encoder.plain([text])[0]


def _writes_date(tokenizer: Any) -> bool:
    template = getattr(tokenizer, "chat_template", None)
    templates = template.values() if isinstance(template, dict) else [template]
    return any(isinstance(text, str) and writes_date(text) for text in templates)


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

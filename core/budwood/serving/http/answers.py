"""Answers in the form of OpenAI's API: whole, and in the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from budwood.model.decoding import Generated
from budwood.serving.http.calls import Piece
from budwood.serving.http.logprobs import LogProbs
from budwood.serving.http.tools import CallReader

DONE = b"data: [DONE]\n\n"


@dataclass
class Part:
    """A part of an answer that goes to the client.

    Attributes:
        log_probs: those of the tokens in it, in the API's form; None: not asked for.
        calls: tool calls, at the end; finish: why the answer ended, at the end.
    """

    text: str = ""
    log_probs: dict[str, Any] | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None


class Choice:
    """One answer of a request, as its pieces come."""

    def __init__(self, index: int, chat: bool, log_probs: LogProbs | None, reader: CallReader | None) -> None:
        self.index, self.chat = index, chat
        self._log_probs, self._reader = log_probs, reader
        self._length = 0

    def add(self, piece: Piece) -> Part:
        """Return what a piece brings for the client."""
        self._length += len(piece.text)
        end = piece.end
        part = Part(self._reader.add(piece.text) if self._reader is not None and piece.text else piece.text)
        if end is not None:
            part.finish = "length" if end.finish_reason == "length" else "stop"
            if self._reader is not None:
                part.text, part.calls = self._reader.end()
                part.finish = "tool_calls" if part.calls else part.finish
        if self._log_probs is not None:
            upto = None if end is not None and not _is_cut(end) else self._length
            found = self._log_probs.upto(upto, piece.tokens, piece.log_probs, piece.top)
            part.log_probs = (self._log_probs.chat if self.chat else self._log_probs.completion)(found)
        return part


def _is_cut(end: Generated) -> bool:
    """Return whether an answer's last tokens are a stop string's."""
    return end.finish_reason == "stop" and end.end_token is None


class Format:
    """The objects of one response.

    Attributes:
        chat: /v1/chat/completions; otherwise /v1/completions.
        warnings: what the client should know, in a field of Budwood's own.
    """

    def __init__(self, chat: bool, model: str, fingerprint: str, usage: bool, warnings: Sequence[str] = ()) -> None:
        self.chat, self.usage, self.warnings = chat, usage, list(warnings)
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()), "model": model, "system_fingerprint": fingerprint,
        }  # fmt: skip

    def whole(self, parts: Iterable[Sequence[Part]], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the whole response: the parts of each choice, joined."""
        choices = [self._whole_choice(index, list(group)) for index, group in enumerate(parts)]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": usage, **self._warned()}

    def _whole_choice(self, index: int, parts: list[Part]) -> dict[str, Any]:
        text = "".join(part.text for part in parts)
        log_probs = _joined([part.log_probs for part in parts if part.log_probs is not None])
        last = parts[-1]
        choice: dict[str, Any] = {"index": index, "finish_reason": last.finish, "logprobs": log_probs}
        if not self.chat:
            return {**choice, "text": text}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if last.calls:
            message |= {"content": text or None, "tool_calls": last.calls}
        return {**choice, "message": message}

    def first(self, index: int) -> bytes | None:
        """Return the chunk with which a choice begins."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None}, True) \
            if self.chat else None  # fmt: skip

    def chunks(self, index: int, part: Part) -> list[bytes]:
        """Return the chunks of a part of a choice."""
        if not self.chat:
            if not part.text and part.finish is None and not _has(part.log_probs):
                return []
            text = {"text": part.text, "logprobs": part.log_probs, "finish_reason": part.finish}
            return [self._chunk({"index": index, **text})]
        found = []
        if part.text or _has(part.log_probs):
            found.append(self._delta(index, {"content": part.text}, part.log_probs))
        for number, call in enumerate(part.calls):
            found.append(self._delta(index, {"tool_calls": [{"index": number, **call}]}))
        if part.finish is not None:
            found.append(self._delta(index, {}, None, part.finish))
        return found

    def last(self, usage: dict[str, Any]) -> bytes | None:
        """Return the chunk with the numbers of tokens, if the client asked for it."""
        return self._chunk(None, False, usage) if self.usage else None

    def _delta(
        self, index: int, delta: dict[str, Any], log_probs: dict[str, Any] | None = None, finish: str | None = None
    ) -> bytes:
        return self._chunk({"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": finish})

    def _chunk(self, choice: dict[str, Any] | None, first: bool = False, usage: dict[str, Any] | None = None) -> bytes:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        extra = {"usage": usage} if self.usage else {}
        return event({
            **self._head, "object": kind, "choices": [] if choice is None else [choice], **extra,
            **(self._warned() if first else {}),
        })  # fmt: skip

    def _warned(self) -> dict[str, Any]:
        return {"warnings": self.warnings} if self.warnings else {}


def event(value: dict[str, Any]) -> bytes:
    """Return a server-sent event with an object."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _has(log_probs: dict[str, Any] | None) -> bool:
    return log_probs is not None and any(log_probs.values())


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not parts:
        return None
    return {
        key: [entry for part in parts for entry in part[key]] if isinstance(value, list) else value
        for key, value in parts[0].items()
    }

"""Log-probabilities of an answer's tokens, each with the text that it stands for."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenText:
    """The bytes that each token of a tokenizer stands for."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def _bytes(self) -> dict[str, int]:
        """Bytes by the characters that stand for them in the vocabulary of a byte-level tokenizer; none in others."""
        if "ByteLevel" not in str(getattr(self.tokenizer.backend_tokenizer, "decoder", "")):
            return {}
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return {character: byte for byte, character in bytes_to_unicode().items()}

    @cached_property
    def _special(self) -> set[int]:
        return {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    def is_special(self, token: int) -> bool:
        """Return whether a token is left out of the text."""
        return token in self._special

    def bytes(self, token: int) -> bytes:
        """Return a token's bytes."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""
        if token in self.tokenizer.added_tokens_decoder:
            return piece.encode()
        if self._bytes and all(character in self._bytes for character in piece):
            return bytes(self._bytes[character] for character in piece)
        if (match := _BYTE.fullmatch(piece)) is not None:
            return bytes([int(match[1], 16)])
        return piece.replace("▁", " ").encode()

    def text(self, token: int) -> str:
        """Return a token's text; one that is no whole character is written as `bytes:` with its bytes."""
        data = self.bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class LogProbs:
    """The log-probabilities of one answer, as its tokens come."""

    def __init__(self, tokens: TokenText) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._next = 0
        self._length = 0  # characters of the tokens so far

    def upto(
        self, end: int | None, ids: Sequence[int], values: Sequence[float], top: Sequence[dict[int, float]]
    ) -> list[tuple[int, int, float, dict[int, float]]]:
        """Return the tokens, not returned before, that begin before character `end` of the answer; None: all.

        Returns:
            Where its text begins, the token, its log-probability, and those of the most probable ones, of each.
        """
        found = []
        while self._next < min(len(ids), len(values)) and (end is None or self._length < end):
            i = self._next
            found.append((self._length, ids[i], values[i], top[i] if i < len(top) else {}))
            if not self._tokens.is_special(ids[i]):
                self._length += len(self._decoder.decode(self._tokens.bytes(ids[i])))
            self._next += 1
        return found

    def chat(self, found: Sequence[tuple[int, int, float, dict[int, float]]]) -> dict[str, Any]:
        """Return them as /v1/chat/completions does."""
        content = [
            {**self._entry(token, value), "top_logprobs": [self._entry(t, v) for t, v in _sorted(top)]}
            for _, token, value, top in found
        ]
        return {"content": content, "refusal": None}

    def completion(self, found: Sequence[tuple[int, int, float, dict[int, float]]]) -> dict[str, Any]:
        """Return them as /v1/completions does."""
        text = self._tokens.text
        return {
            "tokens": [text(token) for _, token, _, _ in found],
            "token_logprobs": [value for _, _, value, _ in found],
            "top_logprobs": [{text(t): v for t, v in _sorted(top)} for _, _, _, top in found],
            "text_offset": [start for start, _, _, _ in found],
        }

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        return {
            "token": self._tokens.text(token),
            "logprob": max(value, -9999.0),  # the client's JSON has no infinity
            "bytes": list(self._tokens.bytes(token)),
        }


def _sorted(top: dict[int, float]) -> list[tuple[int, float]]:
    return [(token, max(value, -9999.0)) for token, value in sorted(top.items(), key=lambda item: -item[1])]

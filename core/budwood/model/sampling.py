"""How the next token is chosen: what a request may ask for, and the steps from logits to a token."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from budwood.errors import InputError

Scores = tuple[float | None, dict[int, float] | None]
"""The log-probability of a token, and those of the most probable tokens; None: not requested."""


SMALLEST = 1e-5
"""Smallest temperature at which tokens are sampled."""


@dataclass(frozen=True)
class Sampling:
    """What a request asks for.

    Attributes:
        max_new_tokens: largest number of tokens of the answer.
        temperature: 0 selects the most probable token, as do values below 1e-5; above, tokens are sampled.
        top_p: sample from the smallest set of most probable tokens with at least this total probability.
        top_k: sample from this number of most probable tokens; 0: from all.
        seed: seed of the samples; any value that can be hashed. Equal requests with equal seeds get equal answers.
        stop: texts that end the answer; they are not part of it.
        stop_ids: tokens that end it, beside the end-of-sequence tokens.
        log_probs: return the log-probability of each token at the temperature (1 if greedy), over all tokens.
        top_log_probs: return those of so many most probable tokens too.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: Hashable = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    log_probs: bool = False
    top_log_probs: int = 0

    def check(self, vocabulary: int) -> None:
        """Refuse values out of range.

        Raises:
            InputError: the message names the field.
        """
        if not _is_int(self.max_new_tokens) or self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {self.max_new_tokens!r} is not a whole number of at least 1.")
        if not is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature: {self.temperature!r} is not finite and at least 0.")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p!r} is not above 0 and at most 1.")
        if not _is_int(self.top_k) or self.top_k < 0:
            raise InputError(f"top_k: {self.top_k!r} is not a whole number of at least 0; use 0 for all tokens.")
        if not _is_int(self.top_log_probs) or not 0 <= self.top_log_probs <= vocabulary:
            raise InputError(f"top_log_probs: {self.top_log_probs!r} is not between 0 and {vocabulary}.")
        if isinstance(self.stop, str) or not all(isinstance(text, str) for text in self.stop):
            raise InputError("stop: must be a list of texts.")
        if not all(_is_int(token) for token in self.stop_ids):
            raise InputError("stop_ids: must be a list of token ids.")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is selected; a smaller temperature would not be finite in fp32."""
        return self.temperature < SMALLEST

    @property
    def scores(self) -> bool:
        """Whether log-probabilities are requested."""
        return self.log_probs or self.top_log_probs > 0

    def processors(self, noise: LogitsProcessor | None) -> LogitsProcessorList:
        """Return what turns logits into scores of which the largest is the next token; `noise` is `Gumbel`."""
        processors = LogitsProcessorList()
        if noise is None or self.greedy:
            return processors
        processors.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        processors.append(noise)
        return processors

    def score(self, logits: Tensor, token: int) -> Scores:
        """Return the log-probability of a token after logits [V], and those of the most probable, if requested."""
        if not self.scores:
            return None, None
        scores, top = (logits / (1.0 if self.greedy else self.temperature)).log_softmax(-1), None
        if self.top_log_probs:
            values, ids = scores.topk(self.top_log_probs)
            top = dict(zip(ids.tolist(), values.tolist(), strict=True))
        return float(scores[token]) if self.log_probs else None, top


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a number, which a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)

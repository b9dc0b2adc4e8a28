"""The next token of each row of a batch, by its own settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

if TYPE_CHECKING:
    from budwood.serving.requests import Row


@dataclass(frozen=True)
class Choice:
    """A row's next token.

    Attributes:
        problem: what is wrong with the row's logits; "": nothing.
        log_prob: of the token, if requested; top: of the most probable tokens, if requested.
    """

    token: int
    problem: str = ""
    log_prob: float | None = None
    top: dict[int, float] | None = None


def choose(logits: Tensor, rows: Sequence[Row]) -> list[Choice]:
    """Choose the next token of each row.

    Args:
        logits: [rows, V] fp32; a token that a row's vocabulary lacks has -inf.
    """
    largest, greedy = logits.max(-1)  # NaN is larger than any number here
    finite, tokens = largest.isfinite().tolist(), greedy.tolist()
    choices = []
    for i, row in enumerate(rows):
        if not finite[i]:
            choices.append(Choice(0, "computes logits that are not finite"))
            continue
        token = tokens[i] if row.noise is None else _sample(logits[i : i + 1], row)
        choices.append(_with_log_probs(token, logits[i], row))
    return choices


def _sample(logits: Tensor, row: Row) -> int:
    wanted, processors = row.sampling, LogitsProcessorList()
    processors.append(TemperatureLogitsWarper(float(wanted.temperature)))
    if wanted.top_k:
        processors.append(TopKLogitsWarper(wanted.top_k))
    if wanted.top_p < 1:
        processors.append(TopPLogitsWarper(wanted.top_p))
    assert row.noise is not None
    processors.append(row.noise)
    ids = torch.empty(1, 0, dtype=torch.int64)  # none of these reads the tokens so far
    return int(processors(ids, logits).argmax(-1))  # type: ignore[arg-type]


def _with_log_probs(token: int, logits: Tensor, row: Row) -> Choice:
    wanted = row.sampling
    if not (wanted.log_probs or wanted.top_log_probs):
        return Choice(token)
    scores = (logits / (wanted.temperature or 1.0)).log_softmax(-1)
    top = None
    if wanted.top_log_probs:
        values, ids = scores.topk(wanted.top_log_probs)
        top = dict(zip(ids.tolist(), values.tolist(), strict=True))
    return Choice(token, "", float(scores[token]) if wanted.log_probs else None, top)

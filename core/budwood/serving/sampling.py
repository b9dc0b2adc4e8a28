"""The next token of each row of a batch, by its own settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
        token = tokens[i]
        if row.noise is not None:
            empty = torch.empty(1, 0, dtype=torch.int64)  # no processor reads the tokens so far
            scores: Tensor = row.sampling.processors(row.noise)(empty, logits[i : i + 1])  # type: ignore[arg-type]
            token = int(scores.argmax(-1))
        choices.append(Choice(token, "", *row.sampling.score(logits[i], token)))
    return choices

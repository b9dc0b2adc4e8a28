"""The next token of a row, by its own settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from budwood.model.sampling import Scores

if TYPE_CHECKING:
    from budwood.serving.requests import Row


def choose(logits: Tensor, largest: int, row: Row) -> tuple[int, Scores]:
    """Choose a row's next token.

    Args:
        logits: [V] fp32; a token that the row's vocabulary lacks has -inf.
        largest: the token with the largest logit.

    Returns:
        The token, and its log-probabilities, if requested.
    """
    token = largest
    if row.noise is not None:
        empty = torch.empty(1, 0, dtype=torch.int64)  # no processor reads the tokens so far
        scores: Tensor = row.sampling.processors(row.noise)(empty, logits[None])  # type: ignore[arg-type]
        token = int(scores.argmax(-1))
    return token, row.sampling.score(logits, token)

"""Samples that a run's model generates, from which on-policy examples are built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from budwood.contract.examples import Example

if TYPE_CHECKING:
    from budwood.contract.types import Run

Prompts = Sequence[Example] | Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Sample:
    """One continuation of a prompt.

    Attributes:
        prompt: token ids of the prompt.
        tokens: all sampled tokens, including the one that ended the text, so that ending can be trained too.
        log_probs: of each of `tokens` at the sampling temperature (1 if greedy), fp32, over the full vocabulary
            whatever `top_p` is. They equal `task.log_probs(logits, tokens, temperature)` up to rounding.
        text: decoded without special tokens, up to any stop string.
        finish_reason: "eos": an end-of-answer token; "stop": a stop string; "length": the token or context limit.
    """

    prompt: list[int]
    tokens: list[int]
    log_probs: list[float]
    text: str
    finish_reason: Literal["eos", "stop", "length"]


class Sampler(Protocol):
    """Core's implementation of `Run.generate` (training.sampling)."""

    def __call__(
        self, run: Run, prompts: Prompts, *, adapter: bool, max_new_tokens: int, temperature: float, top_p: float,
        stop: Sequence[str], samples: int,
    ) -> list[list[Sample]]: ...  # fmt: skip

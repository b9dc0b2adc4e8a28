"""What a run's model says when it is asked: the samples that on-policy examples are made of."""

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
        prompt: token ids that were continued.
        tokens: every token that was drawn, the one that ended the text among them, so that its choice can be trained.
        log_probs: of each of `tokens` at the temperature of the sampling (1 if greedy), fp32; all tokens being
            possible, whatever `top_p` was. They equal `task.log_probs(logits, tokens, temperature)` up to rounding.
        text: decoded, without special tokens; ends before a stop string.
        finish_reason: "eos": a token that ends an answer; "stop": a stop string; "length": the limit or the context.
    """

    prompt: list[int]
    tokens: list[int]
    log_probs: list[float]
    text: str
    finish_reason: Literal["eos", "stop", "length"]


class Sampler(Protocol):
    """What core puts behind `Run.generate` (training.sampling)."""

    def __call__(
        self, run: Run, prompts: Prompts, *, adapter: bool, max_new_tokens: int, temperature: float, top_p: float,
        stop: Sequence[str], samples: int,
    ) -> list[list[Sample]]: ...  # fmt: skip

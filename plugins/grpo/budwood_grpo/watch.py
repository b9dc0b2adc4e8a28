"""Watches the samples of a run, and reports once if nothing can be learned from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from budwood import plural
from budwood_grpo.scores import Choice

WINDOW = 10
"""Number of sets after which a run is told that nothing can be learned."""
MISMATCH = 0.1
"""Mean difference between the log-probabilities of sampler and trainer, in nats, that is reported."""


class Watch:
    """Counts sets and samples until `WINDOW`, with the range of each reward."""

    def __init__(self, who: str, rewards: Sequence[Choice], grouped: bool, max_new_tokens: int) -> None:
        self.who, self.grouped, self.max_new_tokens = who, grouped, max_new_tokens
        self.labels = [label for label, _, _ in rewards]
        self.sets = self.samples = 0
        self.varied = self.ended = self.reported = self.mismatched = False
        self.low = [float("inf")] * len(rewards)
        self.high = [float("-inf")] * len(rewards)

    def add(self, scores: np.ndarray, totals: np.ndarray, ended: bool, say: Callable[[str], None]) -> None:
        """Add a set's rewards [samples, rewards], their weighted sums [prompts, samples], and if any sample ended."""
        if self.reported:
            return
        self.sets, self.samples = self.sets + 1, self.samples + len(scores)
        self.low = np.minimum(self.low, scores.min(axis=0)).tolist()
        self.high = np.maximum(self.high, scores.max(axis=0)).tolist()
        spread = np.ptp(totals, axis=1) if self.grouped else np.ptp(totals)
        self.varied, self.ended = self.varied or bool(np.any(spread > 0)), self.ended or ended
        if self.sets >= WINDOW:
            self.report(say)

    def report(self, say: Callable[[str], None]) -> None:
        """Report, once, what cannot be learned from all samples so far."""
        if self.reported or not self.sets:
            return
        self.reported = True
        seen = f"in {plural(self.sets, 'set')} ({plural(self.samples, 'sample')})"
        if not self.varied:
            ranges = ", ".join(
                f"{n} {_range(lo, hi)}" for n, lo, hi in zip(self.labels, self.low, self.high, strict=True)
            )
            alike = "all samples of a prompt had the same reward" if self.grouped else "all samples had the same reward"
            say(
                f"warning: {self.who}: {seen} {alike} ({ranges}), so nothing can be learned: check the rewards, raise "
                "samples or temperature, or train first on answers that they accept"
            )
        elif len(self.labels) > 1:
            for name, low, high in zip(self.labels, self.low, self.high, strict=True):
                if low == high:
                    say(f"warning: {self.who}: {seen} reward '{name}' was always {low:g}, so it teaches nothing")
        if not self.ended:
            say(
                f"warning: {self.who}: {seen} no answer ended within max_new_tokens ({self.max_new_tokens}): raise it, "
                "set stop, or train first on answers that end"
            )

    def compare(self, mismatch: float, say: Callable[[str], None]) -> None:
        """Report, once, if the log-probabilities of sampler and trainer differ by much."""
        if mismatch > MISMATCH and not self.mismatched:
            self.mismatched = True
            say(
                f"warning: {self.who}: the log-probabilities of sampler and trainer differ by {mismatch:.2f} nats per "
                "token on average (mismatch): remove dropout, or set importance_cap"
            )

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        names = ("sets", "samples", "varied", "ended", "reported", "mismatched", "low", "high")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        for name, value in state.items():
            setattr(self, name, value)


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"

"""Rewards that compare texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import regex
from pydantic import Field, field_validator, model_validator

from budwood import Options, Reward

if TYPE_CHECKING:
    from budwood import Run, Sample

SECONDS = 1.0
"""Limit of time for one search of a regular expression."""
Rows = Sequence[Mapping[str, Any]]


def _compiled(pattern: str) -> str:
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"is not a regular expression: {error}") from error
    return pattern


class ExactMatch(Reward):
    """1 if the answer is the text in a column of the row, otherwise 0."""

    api = 2

    class Options(Options):
        column: str = Field("answer", min_length=1, description="the column with the correct answer")
        ignore_case: bool = Field(False, description="compare without case")
        extract: str | None = Field(
            None, min_length=1, description="regular expression whose first group, or match, is the answer given"
        )

        _regular = field_validator("extract")(lambda value: None if value is None else _compiled(value))

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.columns = (self.options.column,)

    def score(self, prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
        """Compare texts without surrounding white space."""
        return [
            float(self._same(self._given(text), str(row[self.columns[0]])))
            for text, row in zip(completions, rows, strict=True)
        ]

    def _given(self, text: str) -> str | None:
        if self.options.extract is None:
            return text
        found = regex.search(self.options.extract, text, timeout=SECONDS)
        return None if found is None else found[1] if found.re.groups else found[0]

    def _same(self, given: str | None, expected: str) -> bool:
        if given is None:
            return False
        given, expected = given.strip(), expected.strip()
        return given.casefold() == expected.casefold() if self.options.ignore_case else given == expected


class RegularExpression(Reward):
    """1 if a regular expression matches the answer, otherwise 0."""

    api = 2

    class Options(Options):
        pattern: str = Field(min_length=1, description="the regular expression")
        whole: bool = Field(False, description="it must match the whole answer, without surrounding white space")

        _regular = field_validator("pattern")(_compiled)

    def score(self, prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
        """Search each answer, for at most `SECONDS`."""
        pattern = regex.compile(self.options.pattern)
        if self.options.whole:
            return [float(pattern.fullmatch(text.strip(), timeout=SECONDS) is not None) for text in completions]
        return [float(pattern.search(text, timeout=SECONDS) is not None) for text in completions]


class Length(Reward):
    """Penalises answers by their length: its distance from a target, or what exceeds a soft limit."""

    api = 2

    class Options(Options):
        target: int | None = Field(None, ge=1, description="the reward is -|length - target| / target")
        soft_limit: int | None = Field(None, ge=0, description="up to it the reward is 0; then it falls linearly")
        limit: int | None = Field(None, ge=1, description="from it on the reward is -1")
        unit: Literal["tokens", "characters", "words"] = Field("tokens", description="what is counted")

        @model_validator(mode="after")
        def _one_rule(self) -> Length.Options:
            limits = [self.soft_limit, self.limit]
            if (self.target is None) == (limits == [None, None]) or limits.count(None) == 1:
                raise ValueError("set either target, or soft_limit and limit")
            if self.limit is not None and self.soft_limit is not None and self.soft_limit >= self.limit:
                raise ValueError(f"soft_limit: {self.soft_limit} must be below limit ({self.limit})")
            return self

    def score_samples(self, run: Run, samples: Sequence[Sample], rows: Rows) -> list[float]:
        """Count tokens including the one that ended the answer (Yu et al., 2025, "DAPO", equation 13)."""
        if self.options.unit != "tokens":
            return super().score_samples(run, samples, rows)
        return [self._reward(len(sample.tokens)) for sample in samples]

    def score(self, prompts: Sequence[str], completions: Sequence[str], rows: Rows) -> list[float]:
        """Count characters or words."""
        characters = self.options.unit == "characters"
        return [self._reward(len(text) if characters else len(text.split())) for text in completions]

    def _reward(self, length: int) -> float:
        if self.options.target is not None:
            return -abs(length - self.options.target) / self.options.target
        soft, hard = self.options.soft_limit, self.options.limit
        return -min(max(length - soft, 0) / (hard - soft), 1.0)

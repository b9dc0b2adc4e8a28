"""Applies rewards to samples, and checks what they return."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from budwood import BudwoodError, InputError, PluginError, Reward, Run, Sample, did_you_mean

Choice = tuple[str, float, Reward]
"""Label, weight and reward."""


class ReadRow(Mapping[str, Any]):
    """A row as one reward sees it: only the columns that it declares."""

    def __init__(self, row: Mapping[str, Any], columns: Sequence[str]) -> None:
        self._row, self._columns = row, columns

    def __getitem__(self, name: str) -> Any:
        if name not in self._columns:
            near = did_you_mean(str(name), self._columns)
            raise KeyError(f"column '{name}' is not declared in the reward's columns.{near}")
        return self._row[name]

    def __iter__(self) -> Any:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def score(
    run: Run, rewards: Sequence[Choice], samples: Sequence[Sample], rows: Sequence[Mapping[str, Any]],
    where: Sequence[str],
) -> np.ndarray:  # fmt: skip
    """Return each reward of each sample, [samples, rewards] float64.

    Args:
        rows: the row of each sample's prompt, and `where` its location.

    Raises:
        InputError, PluginError: a reward fails or returns something other than a finite number for each sample; the
            message names reward, row and completion.
    """
    values = np.empty((len(samples), len(rewards)))
    for number, (label, _, reward) in enumerate(rewards):
        seen = [ReadRow(row, reward.columns) for row in rows]
        fault = InputError if reward.code_files else PluginError
        who = f"reward '{label}' ({reward.distribution})" if not reward.code_files else f"reward '{label}'"
        try:
            given = list(reward.score_samples(run, samples, seen))
        except BudwoodError:
            raise
        except Exception as error:
            at = _find_failing(run, reward, samples, seen)
            about = "" if at is None else f" on {where[at]}, completion {show(samples[at].text)}"
            raise fault(f"{who} raised {type(error).__name__}: {_said(error)}{about}.") from error
        if len(given) != len(samples):
            raise fault(f"{who} returned {len(given)} values for {len(samples)} completions.")
        for at, value in enumerate(given):
            if not isinstance(value, Real | np.generic) or not math.isfinite(value):
                raise fault(
                    f"{who} returned {value!r}, not a finite number, on {where[at]}, completion "
                    f"{show(samples[at].text)}."
                )
        values[:, number] = given
    return values


def show(text: str, limit: int = 60) -> str:
    """Return a text in quotes, shortened, on one line."""
    line = " ".join(text.split())
    return f"'{line}'" if len(line) <= limit else f"'{line[: limit - 1]}…'"


def _find_failing(run: Run, reward: Reward, samples: Sequence[Sample], rows: Sequence[Any]) -> int | None:
    """Return the first sample on which a reward fails alone."""
    for at, (sample, row) in enumerate(zip(samples, rows, strict=True)):
        try:
            reward.score_samples(run, [sample], [row])
        except Exception:
            return at
    return None


def _said(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()).removesuffix(".")

"""The examples of KTO's baseline: each prompt with the answer of another row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from budwood import DESIRABLE, Column, Example

MISMATCHED = "kto_mismatched"
"""Column: 1 for another row's answer to a prompt, of which the baseline is the mean."""


def add_mismatched(examples: Sequence[Example], seed: int, max_length: int | None) -> tuple[list[Example], int]:
    """Return the examples with another row's answer to each prompt in the same group, and how many had no room for one.

    Args:
        seed: decides whose answer a prompt gets.
        max_length: in tokens; a longer mismatched example is truncated.
    """
    prepared: list[Example] = []
    missing = 0
    answers = _others(examples, seed)
    for group in _groups(examples):
        extra = [_mismatch(example, answers[example.key], max_length) for example in group]
        kept = [each for each in extra if each is not None]
        missing += len(extra) - len(kept)
        number = len(prepared)
        prepared += [replace(e, group=number, columns={**e.columns, MISMATCHED: _flag(0)}) for e in group]
        prepared += [replace(e, group=number) for e in kept]
    return prepared, missing


def _flag(value: int) -> Column:
    return Column(np.array(value, dtype=np.float32))


def _groups(examples: Sequence[Example]) -> Iterator[list[Example]]:
    group: list[Example] = []
    for example in examples:
        if group and (example.group is None or example.group != group[-1].group):
            yield group
            group = []
        group.append(example)
    if group:
        yield group


def _others(examples: Sequence[Example], seed: int) -> dict[Any, Example]:
    """Return another row's example for each by its key: each row takes that before it in a random cycle of all rows."""
    rows: dict[int, list[Example]] = {}
    for example in examples:
        rows.setdefault(example.row, []).append(example)
    order = [list(rows)[i] for i in np.random.default_rng([seed, len(rows)]).permutation(len(rows))]
    donors = dict(zip(order, [order[-1], *order[:-1]], strict=True))
    return {
        example.key: rows[donors[row]][number % len(rows[donors[row]])]
        for row, own in rows.items()
        for number, example in enumerate(own)
    }


def _mismatch(example: Example, other: Example, max_length: int | None) -> Example | None:
    """Return the prompt of an example with the answer of another; None if there is no room for the answer."""
    first, start = int(example.label_positions[0]), int(other.label_positions[0])
    prompt, answer = example.inputs["input_ids"][: first + 1], other.inputs["input_ids"][start + 1 :]
    ids = np.concatenate([prompt, answer])[:max_length]
    positions = other.label_positions - start + first
    kept = positions + 1 < len(ids)
    if not kept.any():
        return None
    weights = np.full(int(kept.sum()), example.weights[0], dtype=np.float32)
    return replace(
        example, inputs={**example.inputs, "input_ids": ids}, label_positions=positions[kept],
        labels=other.labels[kept], weights=weights, key=f"{example.key} mismatched",
        columns={**example.columns, DESIRABLE: _flag(0), MISMATCHED: _flag(1)},
    )  # fmt: skip

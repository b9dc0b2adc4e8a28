"""Checks the examples that a task or a strategy creates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from budwood.contract.examples import Column, Example, Key
from budwood.errors import InputError

if TYPE_CHECKING:
    from budwood.data.examples import Examples


def check_examples(
    examples: Sequence[Example], like: Examples | None = None, where: Sequence[str] = (), classes: int = 0
) -> None:
    """Check examples that a task or a strategy created.

    Args:
        like: the file's examples, to whose rows and classes `examples` refer.
        where: location of each example, for messages; by default that of its row in `like`.
        classes: number of classes if `like` is None; 0: labels are not classes.

    Raises:
        InputError: an example is invalid, two examples share a key, or a group is not contiguous.
    """
    keys: set[Key] = set()
    groups: set[int] = set()
    last: int | None = None
    for index, example in enumerate(examples):
        problem = _find_problem(example, len(like.labels) if like is not None else classes)
        if example.key in keys:
            problem = problem or f"another example has the same key {example.key!r}"
        keys.add(example.key)
        if example.group is not None and example.group != last and example.group in groups:
            problem = problem or f"the examples of group {example.group} are not contiguous"
        last = example.group
        groups.update(() if last is None else (last,))
        if problem:
            place = where[index] if where else like.rows.location(example.row) if like is not None else f"row {index}"
            raise InputError(f"{place}: {problem}.")


def _find_problem(example: Example, classes: int) -> str:
    """Return the problem with an example; empty if there is none."""
    count, weights = len(example.label_positions), np.asarray(example.weights)
    if not example.inputs or not all(isinstance(a, np.ndarray) and a.size for a in example.inputs.values()):
        return "an example's inputs must be non-empty arrays"
    if len(example.labels) != count or len(weights) != count:
        return f"an example has {count} label positions, {len(example.labels)} labels and {len(weights)} weights"
    if count and not (np.isfinite(weights).all() and (weights > 0).all()):
        wrong = weights[~(np.isfinite(weights) & (weights > 0))][0]
        return f"a label's weight must be finite and above 0, not {wrong:g}; leave out labels of weight 0"
    if count and (example.label_positions < 0).any():
        return "a label's position is negative"
    labels = np.asarray(example.labels)
    if classes and count and not (labels.dtype.kind in "iu" and ((labels >= 0) & (labels < classes)).all()):
        return f"a label is outside the {classes} classes: it must be an index from 0 to {classes - 1}"
    return next(filter(None, (_find_column_problem(example, name) for name in example.columns)), "")


def _find_column_problem(example: Example, name: str) -> str:
    column = example.columns[name]
    if not isinstance(column, Column):
        return (
            f"column '{name}' must be a Column, such as Column(values, axis=\"input\"), not a {type(column).__name__}"
        )
    sizes = {"label": len(example.label_positions), "input": len(next(iter(example.inputs.values())))}
    if column.axis != "example" and column.values.shape[:1] != (sizes.get(column.axis),):
        return (
            f"column '{name}' has shape {list(column.values.shape)}; its axis is '{column.axis}', so its first "
            f"dimension must be {sizes.get(column.axis)}"
        )
    return ""

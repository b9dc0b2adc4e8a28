"""The examples of a data file: arrays in flat buffers, with counts of all that was cut, dropped and seen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from budwood.contract.examples import Column, Example, Key
from budwood.data import cache
from budwood.data.formats import DataFormat, recognise
from budwood.data.ragged import Ragged
from budwood.data.reading import Rows, read_rows
from budwood.errors import InputError

PERCENTILES = (50, 90, 99)


@dataclass
class DataStats:
    """What became of a file's rows.

    Attributes:
        rows: in the file.
        examples: that are left.
        dropped: number of rows by reason; `first_dropped` has the place of the first of each.
        truncated: examples that were cut to `max_length`; `tokens_cut` is what they lost.
        tokens: lengths of all examples, as the task counts them; `supervised` labels have a loss (0 if the labels are
            classes, of which each example has one).
        shortest, mean, longest, percentiles: lengths of examples; percentiles by "50", "90", "99".
        weights: smallest and largest weight of a label.
        classes: number of examples of each class, in the order of the labels.
        remarks: what else the user should hear, with its count.
    """

    rows: int = 0
    examples: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: dict[str, str] = field(default_factory=dict)
    truncated: int = 0
    tokens_cut: int = 0
    tokens: int = 0
    supervised: int = 0
    shortest: int = 0
    mean: float = 0.0
    longest: int = 0
    percentiles: dict[str, float] = field(default_factory=dict)
    classes: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=lambda: [1.0, 1.0])
    remarks: dict[str, int] = field(default_factory=dict)

    @property
    def supervised_share(self) -> float:
        """Share of the tokens that have a loss."""
        return self.supervised / self.tokens if self.tokens else 0.0


class Examples(Sequence[Example]):
    """The examples of one file, in the file's order; each `Example` is a view, made when it is asked for.

    Attributes:
        path: the file.
        format: name of the data format that was recognised.
        columns: that the format reads.
        task: name of the task that encoded them.
        max_length: in tokens, to which they were cut.
        labels: names of the classes, which `Example.labels` index; empty if there are none.
        stats: what became of the rows.
        notes: lines that the user should see.
        sha256: of the file.
        stop_ids: tokens that end an answer.
        from_cache: the examples were read, not made.
        lengths: [n] int64, the size of each example as the task counts it.
        groups: [n] int64, the number of each example's group, from 0 in order.
    """

    def __init__(self, path: Path, arrays: cache.Arrays, facts: Mapping[str, Any], from_cache: bool = False) -> None:
        self.path, self.from_cache = path, from_cache
        self._arrays, self._facts = arrays, facts
        self._extra: Sequence[dict[str, Column]] | None = None
        self._rows: Rows | None = None
        self.format: str = facts["format"]
        self.columns: list[str] = facts["columns"]
        self.task: str = facts["task"]
        self.max_length: int = facts["max_length"]
        self.labels: list[str] = facts["labels"]
        self.notes: list[str] = facts["notes"]
        self.sha256: str = facts["sha256"]
        self.stop_ids: list[int] = facts["stop_ids"]
        self.stats = DataStats(**facts["stats"])
        self.lengths: np.ndarray = arrays["lengths"]
        self.groups: np.ndarray = arrays["groups"]
        names = [name.removesuffix(".shapes") for name in arrays if name.endswith(".shapes")]
        self._parts = {name: Ragged(arrays[f"{name}.values"], arrays[f"{name}.shapes"]) for name in names}
        self._inputs = [name for name in names if name.startswith("inputs/")]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return Example(
            inputs={name.removeprefix("inputs/"): self._parts[name][index] for name in self._inputs},
            label_positions=self._parts["label_positions"][index],
            labels=self._parts["labels"][index],
            weights=self._parts["weights"][index],
            group=int(self.groups[index]),
            key=self.keys[index],
            row=int(self._arrays["rows"][index]),
            columns=dict(self._extra[index]) if self._extra is not None else {},
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @cached_property
    def keys(self) -> Sequence[Key]:
        """Identity of each example."""
        keys = self._arrays["keys"]
        return json.loads(keys.tobytes()) if keys.dtype == np.uint8 else keys.tolist()

    @classmethod
    def gather(cls, examples: Sequence[Example], like: Examples, task: Any) -> Examples:
        """Put examples that a strategy chose or made into arrays; everything but the counts is as in `like`.

        Raises:
            InputError: an example is not sound, two have one key, or those of a group do not stand together.
        """
        check_examples(examples, like)
        return like.with_arrays(pack(examples, task), [example.columns for example in examples])

    def with_arrays(self, arrays: cache.Arrays, columns: Sequence[dict[str, Column]]) -> Examples:
        """Other examples of the same file: what `pack` gave, and the columns of each."""
        stats = dataclasses.replace(self.stats, **measure(arrays, self.labels))
        made = Examples(self.path, arrays, {**self._facts, "stats": dataclasses.asdict(stats)})
        made._extra, made._rows = columns, self._rows
        return made

    def reference(self, index: int) -> str | None:
        """The answer that the file gives to an example's prompt, as text; None if the format has no prompt.

        Raises:
            InputError: the file has changed since its examples were made.
        """
        return self._format.reference(self.rows[int(self._arrays["rows"][index])])

    @cached_property
    def _format(self) -> DataFormat:
        return recognise(self.columns, self.task, str(self.path))

    @property
    def rows(self) -> Rows:
        """The file's rows, read again when they are first asked for; `Example.row` indexes them.

        Raises:
            InputError: the file has changed since its examples were made.
        """
        if self._rows is None:
            rows = read_rows(self.path)
            if rows.sha256 != self.sha256:
                raise InputError(f"{self.path}: the file changed during the run. Start again.")
            self._rows = rows
        return self._rows

    def location(self, index: int) -> str:
        """Where the row of an example is, for messages."""
        return self.rows.location(int(self._arrays["rows"][index]))

    def describe(self) -> str:
        """One line on what was recognised, counted, cut and dropped."""
        stats = self.stats
        parts = [f"{stats.examples:,} examples", f"{stats.tokens:,} tokens"]
        parts.append(f"{len(self.labels)} classes" if self.labels else f"{stats.supervised_share:.0%} with a loss")
        if stats.weights != [1.0, 1.0]:
            parts.append("weights {:g} to {:g}".format(*stats.weights))
        if stats.truncated:
            parts.append(f"{stats.truncated:,} cut at {self.max_length}")
        if stats.dropped:
            parts.append(f"{sum(stats.dropped.values()):,} dropped ({self.describe_dropped()})")
        parts += [f"{count:,} {remark}" for remark, count in stats.remarks.items()]
        return "; ".join([f"{self.path}: {' + '.join(self.columns)}", ", ".join(parts), *self.notes])

    def describe_dropped(self) -> str:
        """Reasons, counts and first places of the dropped rows."""
        first = self.stats.first_dropped
        return ", ".join(f"{reason} {n:,}, first at {first[reason]}" for reason, n in self.stats.dropped.items())


def check_examples(
    examples: Sequence[Example], like: Examples | None = None, where: Sequence[str] = (), classes: int = 0
) -> None:
    """Check examples that a task or a strategy made.

    Args:
        like: the file's examples, whose rows and classes they refer to.
        classes: how many there are, without `like`; 0: labels are no classes.
        where: place of each example, for messages; by default that of its row in `like`.

    Raises:
        InputError: an example is not sound, two have one key, or those of a group do not stand together.
    """
    keys: set[Key] = set()
    groups: set[int] = set()
    last: int | None = None
    for index, example in enumerate(examples):
        problem = _find_problem(example, len(like.labels) if like is not None else classes)
        if example.key in keys:
            problem = problem or f"key {example.key!r} is that of another example too"
        keys.add(example.key)
        if example.group is not None and example.group != last and example.group in groups:
            problem = problem or f"the examples of group {example.group} do not stand together"
        last = example.group
        groups.update(() if last is None else (last,))
        if problem:
            place = where[index] if where else like.rows.location(example.row) if like is not None else f"row {index}"
            raise InputError(f"{place}: {problem}.")


def _find_problem(example: Example, classes: int) -> str:
    """What is wrong with an example; empty if nothing is."""
    count, weights = len(example.label_positions), np.asarray(example.weights)
    if not example.inputs or not all(isinstance(a, np.ndarray) and a.size for a in example.inputs.values()):
        return "an example's inputs must be arrays that are not empty"
    if len(example.labels) != count or len(weights) != count:
        return f"an example has {count} label positions, {len(example.labels)} labels and {len(weights)} weights"
    if count and not (np.isfinite(weights).all() and (weights > 0).all()):
        wrong = weights[~(np.isfinite(weights) & (weights > 0))][0]
        return f"a label's weight must be finite and above 0, not {wrong:g}; leave labels of weight 0 out"
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
            f"column '{name}' has shape {list(column.values.shape)}; its axis is '{column.axis}', so that it must have "
            f"one value for each of its {sizes.get(column.axis)}"
        )
    return ""


def pack(examples: Sequence[Example], task: Any) -> cache.Arrays:
    """Put examples into flat arrays, whose names `Examples` knows. `task.length` counts each."""
    parts: dict[str, list[np.ndarray]] = {"label_positions": [], "labels": [], "weights": []}
    groups: list[int] = []
    before: int | None = None
    for example in examples:
        for name, value in example.inputs.items():
            parts.setdefault(f"inputs/{name}", []).append(value)
        parts["label_positions"].append(np.asarray(example.label_positions, dtype=np.int64))
        parts["labels"].append(np.asarray(example.labels))
        parts["weights"].append(np.asarray(example.weights, dtype=np.float32))
        same = bool(groups) and example.group is not None and example.group == before
        groups.append(groups[-1] + (not same) if groups else 0)
        before = example.group
    keys = [example.key for example in examples]
    plain = all(isinstance(key, int) for key in keys)
    arrays = {
        "keys": np.array(keys, dtype=np.int64) if plain else np.frombuffer(json.dumps(keys).encode(), dtype=np.uint8),
        "rows": np.array([example.row for example in examples], dtype=np.int64),
        "groups": np.array(groups, dtype=np.int64),
        "lengths": np.array([task.length(example) for example in examples], dtype=np.int64),
    }
    for name, values in parts.items():
        if len(values) != len(examples):
            raise InputError(f"examples differ in their inputs: not all have '{name.removeprefix('inputs/')}'.")
        ragged = Ragged.of(values)
        arrays |= {f"{name}.values": ragged.values, f"{name}.shapes": ragged.shapes}
    return arrays


def measure(arrays: cache.Arrays, labels: Sequence[str]) -> dict[str, Any]:
    """What `DataStats` says of examples."""
    lengths, weights = arrays["lengths"], arrays["weights.values"]
    if not len(lengths):
        return {"examples": 0, "tokens": 0, "supervised": 0}
    return {
        "examples": len(lengths),
        "tokens": int(lengths.sum()),
        "supervised": 0 if labels else int(arrays["label_positions.shapes"].sum()),
        "shortest": int(lengths.min()),
        "mean": float(lengths.mean()),
        "longest": int(lengths.max()),
        "percentiles": {str(p): float(np.percentile(lengths, p)) for p in PERCENTILES},
        "classes": np.bincount(arrays["labels.values"], minlength=len(labels)).tolist() if labels else [],
        "weights": [float(weights.min()), float(weights.max())] if len(weights) else [1.0, 1.0],
    }

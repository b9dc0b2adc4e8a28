"""The examples of a data file as flat arrays, with counts of rows read, truncated and dropped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from budwood.contract.examples import Column, Example, Key
from budwood.data import cache
from budwood.data.bad_rows import BadRows, Skipped
from budwood.data.formats import DataFormat
from budwood.data.ragged import Ragged
from budwood.data.reading import Rows
from budwood.data.recognition import recognise_rows
from budwood.data.sources import Data, label, read_rows
from budwood.errors import InputError

PERCENTILES = (50, 90, 99)
REASONS = 5
"""Maximum number of reasons for dropped or skipped rows in a line."""


@dataclass
class DataStats:
    """Counts of a file's rows and of the examples made from them.

    Attributes:
        rows: number of rows in the file.
        examples: number of examples.
        dropped: number of dropped rows by reason; `first_dropped` has the location of the first row for each reason.
        skipped: number of bad rows that were skipped, by reason; `first_skipped` as `first_dropped`.
        truncated: number of examples truncated to `max_length`, which lost `tokens_cut` tokens in total.
        tokens: sum of the examples' lengths, as the task counts them.
        supervised: number of labels that have a loss (0 if the labels are classes, one per example).
        shortest, mean, longest, percentiles: lengths of examples; percentiles have the keys "50", "90", "99".
        weights: smallest and largest weight of a label.
        classes: number of examples in each class, in the order of the labels.
        remarks: number of occurrences of each further remark to the user.
    """

    rows: int = 0
    examples: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    first_skipped: dict[str, str] = field(default_factory=dict)
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
        """Fraction of the tokens that have a loss."""
        return self.supervised / self.tokens if self.tokens else 0.0


class Examples(Sequence[Example]):
    """The examples of one file, in file order; each `Example` is a view, created on access.

    Attributes:
        data: the data, as the recipe names it; `path` is its name for messages.
        format: name of the recognised data format.
        columns: names of the columns that the data format reads.
        task: name of the task that encoded the examples.
        max_length: maximum length of an example, in tokens; longer ones were truncated.
        labels: names of the classes, indexed by `Example.labels`; empty if there are none.
        stats: counts of rows and examples.
        notes: lines to show to the user.
        sha256: hash of the file.
        stop_ids: tokens that end an answer.
        date: the date that the chat template wrote, as 2026-11-28; None if it writes none.
        skipped: bad rows that were skipped; None: bad rows are refused.
        from_cache: whether the examples were read from the cache.
        lengths: [n] int64, the size of each example as the task counts it.
        groups: [n] int64, the group of each example, numbered from 0 in order.
    """

    def __init__(self, data: Data, arrays: cache.Arrays, facts: Mapping[str, Any], from_cache: bool = False) -> None:
        self.data, self.path, self.from_cache = data, label(data), from_cache
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
        self.date: str | None = facts["date"]
        self.skipped: list[Skipped] | None = facts["skipped"]
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

    def input_values(self, name: str) -> Ragged | None:
        """Return an input of all examples; None if they have no input of that name."""
        return self._parts.get(f"inputs/{name}")

    @classmethod
    def gather(cls, examples: Sequence[Example], like: Examples, task: Any) -> Examples:
        """Pack examples that a strategy selected or created; everything but the counts is taken from `like`.

        Raises:
            InputError: an example is invalid, two examples share a key, or a group is not contiguous.
        """
        check_examples(examples, like)
        return like.with_arrays(pack(examples, task), [example.columns for example in examples])

    def with_arrays(self, arrays: cache.Arrays, columns: Sequence[dict[str, Column]]) -> Examples:
        """Return other examples of the same file, from the result of `pack` and the columns of each example."""
        stats = dataclasses.replace(self.stats, **measure(arrays, self.labels))
        examples = Examples(self.data, arrays, {**self._facts, "stats": dataclasses.asdict(stats)})
        examples._extra, examples._rows = columns, self._rows
        return examples

    def reference(self, index: int) -> str | None:
        """The file's answer to an example's prompt, as text; None if the data format has no prompt.

        Raises:
            InputError: the file has changed since the examples were built.
        """
        return self._format.reference(self.rows[int(self._arrays["rows"][index])])

    @cached_property
    def _format(self) -> DataFormat:
        return recognise_rows(self.rows, self.task)

    @property
    def rows(self) -> Rows:
        """The file's rows, indexed by `Example.row`; read again on first access.

        Raises:
            InputError: the file has changed since the examples were built.
        """
        if self._rows is None:
            rows = read_rows(self.data, BadRows(skip=self.skipped is not None))
            if rows.sha256 != self.sha256:
                raise InputError(f"{self.path}: the file changed during the run. Start again.")
            self._rows = rows
        return self._rows

    def location(self, index: int) -> str:
        """Location of an example's row, for messages."""
        return self.rows.location(int(self._arrays["rows"][index]))

    def describe(self) -> str:
        """One line with the data format and the counts of examples, tokens, truncated and dropped rows."""
        stats = self.stats
        parts = [f"{stats.examples:,} examples", f"{stats.tokens:,} tokens"]
        parts.append(f"{len(self.labels)} classes" if self.labels else f"{stats.supervised_share:.0%} with a loss")
        if stats.weights != [1.0, 1.0]:
            parts.append("weights {:g} to {:g}".format(*stats.weights))
        if stats.truncated:
            parts.append(f"{stats.truncated:,} truncated at {self.max_length}")
        if stats.dropped:
            parts.append(f"{sum(stats.dropped.values()):,} dropped ({self.describe_dropped()})")
        if stats.skipped:
            parts.append(f"{sum(stats.skipped.values()):,} skipped ({_reasons(stats.skipped, stats.first_skipped)})")
        parts += [f"{count:,} {remark}" for remark, count in stats.remarks.items()]
        notes = [*self.notes, *([f"the chat template writes the date {self.date}"] if self.date else [])]
        return "; ".join([f"{self.path}: {' + '.join(self.columns)}", ", ".join(parts), *notes])

    def describe_dropped(self) -> str:
        """Reasons for dropped rows, each with its count and the location of its first row."""
        return _reasons(self.stats.dropped, self.stats.first_dropped)


def _reasons(counts: Mapping[str, int], first: Mapping[str, str]) -> str:
    """Return reasons, each with its count and the location of its first row; at most `REASONS` of them."""
    shown = [f"{reason} {n:,}, first at {first[reason]}" for reason, n in list(counts.items())[:REASONS]]
    return "; ".join(shown) + (f"; {len(counts) - REASONS} more reasons" if len(counts) > REASONS else "")


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


def pack(examples: Sequence[Example], task: Any) -> cache.Arrays:
    """Pack examples into the flat arrays that `Examples` reads; lengths are those of `task.length`."""
    parts: dict[str, list[np.ndarray]] = {"label_positions": [], "labels": [], "weights": []}
    groups: list[int] = []
    previous: int | None = None
    for example in examples:
        for name, value in example.inputs.items():
            parts.setdefault(f"inputs/{name}", []).append(value)
        parts["label_positions"].append(np.asarray(example.label_positions, dtype=np.int64))
        parts["labels"].append(np.asarray(example.labels))
        parts["weights"].append(np.asarray(example.weights, dtype=np.float32))
        same = bool(groups) and example.group is not None and example.group == previous
        groups.append(groups[-1] + (not same) if groups else 0)
        previous = example.group
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
            raise InputError(f"examples have different inputs: not all have '{name.removeprefix('inputs/')}'.")
        flat = Ragged.of(values)
        arrays |= {f"{name}.values": flat.values, f"{name}.shapes": flat.shapes}
    return arrays


def measure(arrays: cache.Arrays, labels: Sequence[str]) -> dict[str, Any]:
    """Return the fields of `DataStats` that describe packed examples."""
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

"""The examples of a data file as flat arrays, with counts of rows read, truncated and dropped."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from budwood.contract.examples import Column, Example, Key
from budwood.data import cache
from budwood.data.bad_rows import BadRows, Skipped
from budwood.data.checking import check_examples
from budwood.data.formats import DataFormat
from budwood.data.ragged import Ragged
from budwood.data.recognition import recognise_rows
from budwood.data.rows import Rows
from budwood.data.sources import Data, label, read_rows
from budwood.data.stats import DataStats
from budwood.errors import InputError, plural

PERCENTILES = (50, 90, 99)
REASONS = 5
"""Maximum number of reasons for dropped or skipped rows in a line."""


class Examples(Sequence[Example]):
    """The examples of one file, in file order; each `Example` is a view, created on access.

    Attributes:
        data: the data, as the recipe names it; `path` is its name for messages.
        format: name of the recognised data format.
        columns: names of the columns that the data format reads.
        task: name of the task that encoded the examples.
        holds: the kind of the data (`DataFormat.holds`), and `instead` how to train on it without an objective.
        max_length: maximum length of an example, in tokens; longer ones were truncated.
        labels: names of the classes, indexed by `Example.labels`; empty if there are none.
        stats: counts of rows and examples.
        notes: lines to show to the user.
        sha256: hash of the file.
        files: hash of the files that its rows name, such as images; empty if they name none.
        stop_ids: tokens that end an answer.
        date: the date that the chat template wrote, as 2026-11-28; None if it writes none.
        rendered: whether the chat template was used.
        skipped: bad rows that were skipped; None: bad rows are refused.
        from_cache: whether the examples were read from the cache.
        lengths: [n] int64, the size of each example as the task counts it.
        groups: [n] int64, the group of each example, numbered from 0 in order.
        row_numbers: [n] int64, the row of each example, an index into `rows`.
    """

    def __init__(self, data: Data, arrays: cache.Arrays, facts: Mapping[str, Any], from_cache: bool = False) -> None:
        self.data, self.path, self.from_cache = data, label(data), from_cache
        self._arrays, self._facts = arrays, facts
        self._extra: Sequence[dict[str, Column]] | None = None
        self._rows: Rows | None = None
        self.format: str = facts["format"]
        self.columns: list[str] = facts["columns"]
        self.holds: str = facts["holds"]
        self.instead: str = facts["instead"]
        self.task: str = facts["task"]
        self.max_length: int = facts["max_length"]
        self.labels: list[str] = facts["labels"]
        self.notes: list[str] = facts["notes"]
        self.sha256: str = facts["sha256"]
        self.files: str = facts["files"]
        self.stop_ids: list[int] = facts["stop_ids"]
        self.date: str | None = facts["date"]
        self.rendered: bool = facts["rendered"]
        self.skipped: list[Skipped] | None = facts["skipped"]
        self.stats = DataStats(**facts["stats"])
        self.lengths: np.ndarray = arrays["lengths"]
        self.groups: np.ndarray = arrays["groups"]
        self.row_numbers: np.ndarray = arrays["rows"]
        names = [name.removesuffix(".shapes") for name in arrays if name.endswith(".shapes")]
        self._parts = {name: Ragged(_values(arrays, name), arrays[f"{name}.shapes"]) for name in names}
        self._inputs = [name for name in names if name.startswith("inputs/")]
        self._column_parts: list[Any] = [(n, *n.split("/", 2)[1:]) for n in names if n.startswith("columns/")]

    def summary(self) -> dict[str, Any]:
        """Return name, format, counts and notes of the data, for a run's manifest."""
        stats = self.stats
        return {
            "path": str(self.path), "format": self.format, "examples": len(self), "tokens": int(self.lengths.sum()),
            "labels": stats.supervised, "truncated": stats.truncated, "dropped": stats.dropped,
            "skipped": stats.skipped, "notes": self.notes,
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return Example(
            inputs={name.removeprefix("inputs/"): self._parts[name][index] for name in self._inputs},
            label_positions=self._parts["label_positions"][index].astype(np.int64, copy=False),
            labels=self._parts["labels"][index],
            weights=self._parts["weights"][index],
            group=int(self.groups[index]),
            key=self.keys[index],
            row=int(self.row_numbers[index]),
            columns=self._columns(index) if self._extra is None else dict(self._extra[index]),
        )

    def _columns(self, index: int) -> dict[str, Column]:
        """Return the columns that the task gave an example when it encoded it."""
        return {
            name: Column(self._parts[part][index].reshape([] if axis == "example" else [-1]), axis)
            for part, axis, name in self._column_parts
        }

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @cached_property
    def keys(self) -> Sequence[Key]:
        """Identity of each example."""
        if "numbers" in self._arrays:
            return _RowKeys(self._arrays["rows"], self._arrays["numbers"])
        keys = self._arrays["keys"]
        return json.loads(keys.tobytes()) if keys.dtype == np.uint8 else keys.tolist()

    @cached_property
    def input_hashes(self) -> np.ndarray:
        """Hash of each example's inputs, [n] uint64."""
        if "hashes" in self._arrays:
            return self._arrays["hashes"]
        return np.array([hash_inputs(example) for example in self], dtype=np.uint64)

    @property
    def label_counts(self) -> np.ndarray:
        """Number of labels of each example, [n]."""
        return self._parts["labels"].shapes[:, 0]

    @property
    def label_values(self) -> Ragged:
        """The labels of all examples."""
        return self._parts["labels"]

    @property
    def class_weights(self) -> np.ndarray:
        """Sum of the weights of each class's labels, [classes]."""
        parts = (self._parts[name] for name in ("labels", "weights"))
        labels, weights = (np.concatenate([part[index] for index in range(len(part))]) for part in parts)
        return np.bincount(labels, weights, len(self.labels))

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

    def with_label_column(self, name: str, values: np.ndarray, offsets: np.ndarray) -> Examples:
        """Return the examples with one more column, a view of `values`: one for each label, in the examples' order.

        Args:
            offsets: [n + 1] index of each example's first value, then the total.
        """
        extended = copy.copy(self)
        extended._extra = _WithColumn(self._extra, name, values, offsets)
        return extended

    def select(self, indices: np.ndarray) -> Examples:
        """Return the examples at `indices`, ascending, without copying their arrays; their keys stay the same."""
        chosen = copy.copy(self)
        chosen.lengths, chosen.row_numbers = self.lengths[indices], self.row_numbers[indices]
        chosen.groups = np.unique(self.groups[indices], return_inverse=True)[1]
        chosen._parts = {name: part.select(indices) for name, part in self._parts.items()}
        keys = self.keys
        chosen.keys = keys.select(indices) if isinstance(keys, _RowKeys) else [keys[i] for i in indices]
        chosen.input_hashes = self.input_hashes[indices]
        chosen._extra = None if self._extra is None else [self._extra[i] for i in indices]
        labels = [chosen._parts["labels"][i] for i in range(len(indices))] if self.labels else []
        measured = measure(
            {
                "lengths": chosen.lengths,
                "weights.values": np.array(self.stats.weights),
                "label_positions.shapes": chosen._parts["label_positions"].shapes,
                "labels.values": np.concatenate(labels) if labels else np.zeros(0, dtype=np.int64),
            },
            self.labels,
        )
        chosen.stats = dataclasses.replace(self.stats, **measured)
        return chosen

    def reference(self, index: int) -> str | None:
        """The file's answer to an example's prompt, as text; None if the data format has no prompt.

        Raises:
            InputError: the file has changed since the examples were built.
        """
        return self._format.reference(self.rows[int(self.row_numbers[index])])

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
        return self.rows.location(int(self.row_numbers[index]))

    def describe(self) -> str:
        """One line with the data format and the counts of examples, tokens, truncated and dropped rows."""
        stats = self.stats
        parts = [plural(stats.examples, "example"), plural(stats.tokens, "token")]
        if len(self.labels) or stats.supervised:
            parts.append(
                plural(len(self.labels), "class", "classes")
                if self.labels
                else f"{stats.supervised_share:.0%} with a loss"
            )
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


def hash_inputs(example: Example, labels: bool = False) -> int:
    """Hash an example's inputs and, if asked, its labels and their positions.

    Ten million different examples have two equal hashes with a probability of 3e-6.
    """
    digest = hashlib.blake2b(digest_size=8)
    arrays = [example.inputs[name] for name in sorted(example.inputs)]
    for array in (*arrays, *((example.label_positions, example.labels) if labels else ())):
        digest.update(np.ascontiguousarray(array).data)
        digest.update(b"\0")
    return int.from_bytes(digest.digest(), "little")


class _WithColumn(Sequence[dict[str, Column]]):
    """The columns of each example and one more along its labels, created on access."""

    def __init__(
        self, columns: Sequence[dict[str, Column]] | None, name: str, values: np.ndarray, offsets: np.ndarray
    ) -> None:
        self._columns, self._name, self._values, self._offsets = columns, name, values, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        values = self._values[self._offsets[index] : self._offsets[index + 1]]
        own = {} if self._columns is None else self._columns[index]
        return {**own, self._name: Column(values, axis="label")}


class _RowKeys(Sequence[Key]):
    """Keys of examples that no strategy changed: the row, or "row.number" if there are several of it."""

    def __init__(self, rows: np.ndarray, numbers: np.ndarray) -> None:
        self._rows, self._numbers = rows, numbers

    def __len__(self) -> int:
        return len(self._rows)

    def select(self, indices: np.ndarray) -> _RowKeys:
        return _RowKeys(self._rows[indices], self._numbers[indices])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row, number = int(self._rows[index]), int(self._numbers[index])
        return row if number < 0 else f"{row}.{number}"


def _values(arrays: cache.Arrays, name: str) -> np.ndarray:
    """Return an array's values; weights that are not there are all 1."""
    if f"{name}.values" in arrays:
        return arrays[f"{name}.values"]
    return np.broadcast_to(np.float32(1), int(arrays[f"{name}.shapes"].sum()))


def _reasons(counts: Mapping[str, int], first: Mapping[str, str]) -> str:
    """Return reasons, each with its count and the location of its first row; at most `REASONS` of them."""
    shown = [f"{reason} {n:,}, first at {first[reason]}" for reason, n in list(counts.items())[:REASONS]]
    return "; ".join(shown) + (f"; {len(counts) - REASONS} more reasons" if len(counts) > REASONS else "")


def pack(examples: Sequence[Example], task: Any, columns: bool = False) -> cache.Arrays:
    """Pack examples into the flat arrays that `Examples` reads; lengths are those of `task.length`.

    Args:
        columns: pack their columns too: numbers per example, or vectors per input or label.
    """
    parts: dict[str, list[np.ndarray]] = {"label_positions": [], "labels": [], "weights": []}
    groups: list[int] = []
    previous: int | None = None
    for example in examples:
        for name, value in example.inputs.items():
            parts.setdefault(f"inputs/{name}", []).append(value)
        for name, column in example.columns.items() if columns else ():
            parts.setdefault(f"columns/{column.axis}/{name}", []).append(np.atleast_1d(column.values))
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
            raise InputError(f"examples have different inputs: not all have '{name.rpartition('/')[2]}'.")
        flat = Ragged.of(values)
        arrays |= {f"{name}.values": flat.values, f"{name}.shapes": flat.shapes}
    return arrays


def measure(arrays: cache.Arrays, labels: Sequence[str]) -> dict[str, Any]:
    """Return the fields of `DataStats` that describe packed examples."""
    lengths, weights = arrays["lengths"], _values(arrays, "weights")
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

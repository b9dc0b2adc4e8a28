"""Encodes the rows of a data file in chunks: in this process or, for a large file, in one process per core."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from budwood.contract.calls import attribute_errors
from budwood.contract.discovery import PluginError
from budwood.contract.examples import Example
from budwood.data.bad_rows import BadRows, Skipped
from budwood.data.checking import check_examples
from budwood.data.encoder import Encoder
from budwood.data.examples import hash_inputs, pack
from budwood.data.formats import DataFormat, Dropped
from budwood.data.rows import Row, Rows, chunks
from budwood.data.spool import Arrays
from budwood.data.unused import check_unused
from budwood.data.workers import Workers
from budwood.errors import InputError

PARALLEL = 32_000_000
"""File size in bytes from which worker processes are worth their start-up time of some seconds."""
MOST = 8
"""Maximum number of processes; each takes about 0.4 GB."""

BEYOND = "answer beyond max_length"
"""Reason for dropping a row whose truncation would leave only the prompt."""
TOO_LONG = "longer than max_length allows"
"""Reason for dropping a prompt, a pair or a judged answer, since what is answered or judged is complete."""
Change = Callable[[Row, int], Row]


@dataclass(frozen=True, slots=True)
class Encoded:
    """The examples that a task encoded from one item, and the number of tokens cut off."""

    examples: Sequence[Example]
    cut: int = 0


@dataclass
class Chunk:
    """What was encoded from a chunk of rows.

    Attributes:
        arrays: the examples as packed by `pack`, and `numbers`: the index of each among its row's examples, for its
            key; -1 if the row has only one.
        hashes: [n] uint64, of what each example trains on; repeats of rows are left out.
        dropped: number of dropped rows by reason; `first_dropped` has the location of the first row for each reason.
        bad: rows that were skipped.
        truncated: number of rows that lost tokens; `tokens_cut` is the number of these tokens.
        classes: names of the classes, as the labels index them; None if they are not learned.
        remarks, stop_ids, rendered: those of the encoder.
    """

    arrays: Arrays | None = None
    hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: dict[str, str] = field(default_factory=dict)
    bad: list[Skipped] = field(default_factory=list)
    truncated: int = 0
    tokens_cut: int = 0
    classes: list[str] | None = None
    remarks: Counter[str] = field(default_factory=Counter)
    stop_ids: set[int] = field(default_factory=set)
    rendered: bool = False


@dataclass
class ChunkEncoder:
    """Encodes chunks of a file's rows, each independently of the others.

    Attributes:
        change: maps a row and its index to the row to encode.
        skip: skip bad rows; otherwise the first one is refused.
        read: columns that strategies read; see `columns_read`.
    """

    rows: Rows
    data_format: DataFormat
    unused: Sequence[str]
    task: Any
    encoder: Encoder
    skip: bool
    change: Change | None = None
    read: Mapping[str, str] = field(default_factory=dict)

    def chunks(self, processes: int | None = None) -> Iterator[tuple[range, Chunk]]:
        """Yield the indices of each chunk's rows and what was encoded from them, in order.

        Args:
            processes: number of encoding processes; None: one per core if the file is large.

        Raises:
            InputError: a row cannot be read or used, and `skip` is not set.
            PluginError: the task does not return an `Encoded` or a `Dropped` for each item.
        """
        if processes is None:
            processes = min(_cores(), MOST) if self.rows.bytes >= PARALLEL else 1
        ranges = chunks(self.rows)
        workers = Workers.start(self, processes) if processes > 1 and self.change is None else None
        if workers is None:
            for indices in ranges:
                yield indices, self.encode(indices)
        else:
            with workers:
                yield from workers.map(ranges)

    def encode(self, indices: range) -> Chunk:
        """Encode the rows of one chunk."""
        encoder, bad, chunk = self.encoder.fresh(), BadRows(self.skip), Chunk()
        rows = self.rows[indices.start : indices.stop]
        where = [self.rows.location(index) for index in indices]
        if self.change is not None:
            rows = [self.change(row, index) for row, index in zip(rows, indices, strict=True)]
        results = [self._item(row, place, bad) for row, place in zip(rows, where, strict=True)]
        at = [i for i, item in enumerate(results) if not isinstance(item, Dropped | None)]
        if at:
            encoded = self._encode_items([results[i] for i in at], [where[i] for i in at], encoder)
            for i, result in zip(at, encoded, strict=True):
                if isinstance(result, InputError):
                    bad.meet(result, where[i], rows[i])
                results[i] = None if isinstance(result, InputError) else result
        examples: list[Example] = []
        numbers: list[int] = []
        hashes: list[int] = []
        groups = 0
        for row, place, result in zip(indices, where, results, strict=True):
            if result is None:
                continue
            if isinstance(result, Dropped):
                chunk.dropped[result.reason] += 1
                chunk.first_dropped.setdefault(result.reason, place)
                continue
            several = len(result.examples) > 1
            new = [
                dataclasses.replace(
                    example,
                    key=f"{row}.{number}" if several else row,
                    row=row,
                    group=None if example.group is None else groups + example.group,
                )
                for number, example in enumerate(result.examples)
            ]
            check_examples(new, where=[place] * len(new), classes=encoder.classes.count)
            groups += max((example.group + 1 for example in result.examples if example.group is not None), default=0)
            chunk.truncated += result.cut > 0
            chunk.tokens_cut += result.cut
            examples += new
            numbers += range(len(new)) if several else [-1]
            if self.change is None and not self.rows.is_repeat(row):
                hashes += [hash_inputs(example, labels=True) for example in new]
        if examples:
            chunk.arrays = _compact(pack(examples, self.task, columns=True), numbers)
            chunk.arrays["hashes"] = np.array([hash_inputs(example) for example in examples], dtype=np.uint64)
            chunk.hashes = np.array(hashes, dtype=np.uint64)
        chunk.bad, chunk.remarks = bad.rows, encoder.remarks
        chunk.stop_ids, chunk.rendered = encoder.stop_ids, encoder.rendered
        chunk.classes = encoder.classes.learned
        return chunk

    def _item(self, row: Row, where: str, bad: BadRows) -> Any:
        """Return a row's item or `Dropped`; None if it is a bad row to skip."""
        try:
            check_unused(row, self.unused, self.data_format, where, self.read)
            with attribute_errors(self.data_format, "item"):
                return self.data_format.item(row, where)
        except InputError as error:
            bad.meet(error, where, row)
            return None

    def _encode_items(
        self, items: Sequence[Any], where: Sequence[str], encoder: Encoder
    ) -> Sequence[Encoded | Dropped | InputError]:
        """Encode items; with `skip`, return an item's error in its place if it cannot be encoded."""
        remarks = encoder.remarks.copy()
        try:
            with attribute_errors(self.task, "encode"):
                encoded: Sequence[Encoded | Dropped] = self.task.encode(items, where, encoder)
        except InputError as error:
            if not self.skip:
                raise
            encoder.remarks = remarks
            if len(items) == 1:
                return [error]
            pairs = zip(items, where, strict=True)
            return [self._encode_items([item], [place], encoder)[0] for item, place in pairs]
        if len(encoded) != len(items) or not all(isinstance(result, Encoded | Dropped) for result in encoded):
            raise PluginError(
                f"{self.task}, encode: must return an Encoded or a Dropped for each of its {len(items)} items."
            )
        return encoded


def _cores() -> int:
    """Return the number of cores that this process may use; 1 on Windows, where pipes are passed on otherwise."""
    if os.name != "posix":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compact(arrays: Arrays, numbers: Sequence[int]) -> Arrays:
    """Return packed examples in less space: keys follow from rows, and positions fit into 32 bits."""
    arrays = {**arrays, "numbers": np.array(numbers, dtype=np.int64)}
    del arrays["keys"]
    arrays["label_positions.values"] = arrays["label_positions.values"].astype(np.int32)
    return arrays

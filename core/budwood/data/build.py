"""Builds examples from a data file: recognises its data format, and lets the task encode its rows."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from budwood.contract.calls import attribute_errors
from budwood.contract.discovery import PluginError, find, installed
from budwood.contract.examples import Example
from budwood.contract.loading import create
from budwood.data import cache
from budwood.data.bad_rows import BadRows, count_reasons
from budwood.data.classes import near_equal
from budwood.data.encoder import Encoder
from budwood.data.examples import DataStats, Examples, check_examples, measure, pack
from budwood.data.formats import GROUP, DataFormat, Dropped, all_dropped
from budwood.data.reading import Row, Rows
from budwood.data.recognition import recognise_rows
from budwood.data.sources import Data, hash_data, read_rows
from budwood.data.unused import check_unused, find_unused
from budwood.errors import InputError

CHUNK = 1024
"""Number of rows encoded per call of the task."""
BEYOND = "answer beyond max_length"
"""Reason for dropping a row whose truncation would leave only the prompt."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The examples that a task encoded from one item, and the number of tokens cut off."""

    examples: Sequence[Example]
    cut: int = 0


def build_examples(
    data: Data,
    tokenizer: Any,
    task: Any,
    max_length: int,
    labels: Sequence[str] | None = None,
    cache_dir: Path | None = None,
    template_options: Mapping[str, Any] | None = None,
    change: Callable[[Row, int], Row] | None = None,
    loss_on: str = "assistant",
    skip_bad_rows: bool = False,
    date: str | None = None,
) -> Examples:
    """Build the examples of a data file, or load them from the cache.

    Args:
        data: a file, folder, pattern or hub name; or several sources.
        tokenizer: the base's tokenizer; None for a task that does not need one.
        task: a task, or its name.
        max_length: maximum length in tokens; longer rows are truncated, or dropped if no label with a loss is left.
        labels: class names from the training data; None: learn them from this file.
        cache_dir: folder of the cache; None: `cache.default_folder()`.
        template_options: variables for the chat template.
        change: maps a row and its index to the row to encode; disables the cache.
        loss_on: "assistant", "last" or "all"; see `Encoder`.
        skip_bad_rows: skip and count rows that cannot be read or used; otherwise the first one is refused.
        date: the date for a chat template that writes one, as 2026-11-28; None: today's.

    Raises:
        InputError: as `read_rows`, the data format and the task; a label is not in the training data; all rows were
            dropped; `BUDWOOD_CACHE_LIMIT` is not a size.
    """
    task = create(task, "budwood.tasks") if isinstance(task, str) else task
    encoder = Encoder(tokenizer, max_length, template_options, labels, loss_on, date)
    if change is not None:
        bad = BadRows(skip_bad_rows)
        return Examples(data, *_encode(read_rows(data, bad), encoder, task, max_length, bad, change))
    folder = cache.default_folder() if cache_dir is None else Path(cache_dir)
    limit = cache.size_limit()
    plugins = [(e.name, e.value, e.owner) for entries in installed(GROUP).values() for e in entries]
    owner = find(task.name, "budwood.tasks")
    options = {
        "file": hash_data(data),
        "path": str(data),
        "formats": plugins,
        "task": (task.name, owner.value, owner.owner),
        "max_length": max_length,
        "labels": None if labels is None else list(labels),
        "template_options": dict(template_options or {}),
        "loss_on": loss_on,
        "skip_bad_rows": skip_bad_rows,
        "date": encoder.date,
    }
    key = cache.make_key(tokenizer, options)
    entry = cache.load(folder, key) if key else None
    if entry is not None:
        return Examples(data, *entry, from_cache=True)
    bad = BadRows(skip_bad_rows)
    rows = read_rows(data, bad)
    arrays, facts = _encode(rows, encoder, task, max_length, bad)
    if key and rows.sha256 == options["file"]:
        cache.save(folder, key, arrays, facts, limit)
    return Examples(data, arrays, facts)


def overlap(train: Examples, other: Examples) -> int:
    """Count the examples of `other` whose inputs equal those of an example of `train`."""

    def digests(examples: Examples) -> list[bytes]:
        joined = (b"".join(e.inputs[name].tobytes() for name in sorted(e.inputs)) for e in examples)
        return [hashlib.blake2b(inputs, digest_size=16).digest() for inputs in joined]

    seen = set(digests(train))
    return sum(digest in seen for digest in digests(other))


def _encode(
    rows: Rows,
    encoder: Encoder,
    task: Any,
    max_length: int,
    bad: BadRows,
    change: Callable[[Row, int], Row] | None = None,
) -> tuple[cache.Arrays, dict[str, Any]]:
    data_format = recognise_rows(rows, task.name)
    unused = find_unused(rows.columns, data_format)
    unreadable = len(bad.rows)
    dropped: Counter[str] = Counter()
    first: dict[str, str] = {}
    examples: list[Example] = []
    seen: set[bytes] = set()
    truncated = tokens_cut = groups = counted = 0
    for start, chunk in _chunks(rows):
        where = [rows.location(start + i) for i in range(len(chunk))]
        if change is not None:
            chunk = [change(row, start + i) for i, row in enumerate(chunk)]
        results = [_item(data_format, row, unused, place, bad) for row, place in zip(chunk, where, strict=True)]
        at = [i for i, item in enumerate(results) if not isinstance(item, Dropped | None)]
        if at:
            encoded = _encode_items(task, [results[i] for i in at], [where[i] for i in at], encoder, bad.skip)
            for i, result in zip(at, encoded, strict=True):
                if isinstance(result, InputError):
                    bad.meet(result, where[i], chunk[i])
                results[i] = None if isinstance(result, InputError) else result
        for offset, result in enumerate(results):
            if result is None:
                continue
            if isinstance(result, Dropped):
                dropped[result.reason] += 1
                first.setdefault(result.reason, where[offset])
                continue
            row, several = start + offset, len(result.examples) > 1
            new = [
                dataclasses.replace(
                    example,
                    key=f"{row}.{number}" if several else row,
                    row=row,
                    group=None if example.group is None else groups + example.group,
                )
                for number, example in enumerate(result.examples)
            ]
            check_examples(new, where=[where[offset]] * len(new), classes=encoder.classes.count)
            groups += max((example.group + 1 for example in result.examples if example.group is not None), default=0)
            truncated += result.cut > 0
            tokens_cut += result.cut
            examples += new
            if change is None and not rows.is_repeat(row):
                counted += len(new)
                seen.update(map(_digest, new))
    skipped, first_skipped = count_reasons(bad.rows)
    if not examples:
        remedy = " Raise data.max_length." if BEYOND in dropped else ""
        raise InputError(all_dropped(rows.path, {**dropped, **skipped}) + remedy)
    if counted > len(seen):
        encoder.remarks["examples equal to an earlier one"] = counted - len(seen)
    arrays = pack(examples, task)
    classes = encoder.classes.finish(str(rows.path))
    if classes:
        arrays["labels.values"] = encoder.classes.order(arrays["labels.values"])
    stats = DataStats(
        rows=len(rows) + unreadable, dropped=dict(dropped), first_dropped=first, skipped=skipped,
        first_skipped=first_skipped, truncated=truncated, tokens_cut=tokens_cut,
        remarks=dict(encoder.remarks), **measure(arrays, classes),
    )  # fmt: skip
    facts = {
        "format": data_format.name,
        "columns": [*data_format.columns, *(name for name in data_format.optional if name in rows.columns)],
        "task": task.name,
        "max_length": max_length,
        "labels": classes,
        "date": encoder.date if encoder.rendered else None,
        "notes": [
            *rows.notes,
            *([f"columns ignored: {', '.join(unused)}"] if unused else []),
            *near_equal(classes),
        ],
        "sha256": rows.sha256,
        "skipped": bad.rows if bad.skip else None,
        "stop_ids": sorted(encoder.stop_ids),
        "stats": dataclasses.asdict(stats),
    }
    return arrays, facts


def _item(data_format: DataFormat, row: Row, unused: Sequence[str], where: str, bad: BadRows) -> Any:
    """Return a row's item or `Dropped`; None if it is a bad row to skip."""
    try:
        check_unused(row, unused, data_format, where)
        with attribute_errors(data_format, "item"):
            return data_format.item(row, where)
    except InputError as error:
        bad.meet(error, where, row)
        return None


def _encode_items(
    task: Any, items: Sequence[Any], where: Sequence[str], encoder: Encoder, skip: bool
) -> Sequence[Encoded | Dropped | InputError]:
    """Encode items; with `skip`, return the error of one that cannot be encoded in its place."""
    remarks = encoder.remarks.copy()
    try:
        with attribute_errors(task, "encode"):
            encoded: Sequence[Encoded | Dropped] = task.encode(items, where, encoder)
    except InputError as error:
        if not skip:
            raise
        encoder.remarks = remarks
        if len(items) == 1:
            return [error]
        pairs = zip(items, where, strict=True)
        return [_encode_items(task, [item], [place], encoder, skip)[0] for item, place in pairs]
    if len(encoded) != len(items) or not all(isinstance(result, Encoded | Dropped) for result in encoded):
        raise PluginError(f"{task}, encode: must return an Encoded or a Dropped for each of its {len(items)} items.")
    return encoded


def _digest(example: Example) -> bytes:
    """Hash of what is trained on: inputs, labels and their positions."""
    digest = hashlib.blake2b(digest_size=12)
    for array in (*(example.inputs[name] for name in sorted(example.inputs)), example.label_positions, example.labels):
        digest.update(np.ascontiguousarray(array).data)
        digest.update(b"\0")
    return digest.digest()


def _chunks(rows: Rows) -> Iterator[tuple[int, list[Row]]]:
    chunk: list[Row] = []
    for index, row in enumerate(rows):
        chunk.append(row)
        if len(chunk) == CHUNK or index == len(rows) - 1:
            yield index + 1 - len(chunk), chunk
            chunk = []

"""Builds examples from a data file: recognises its data format, and lets the task encode its rows."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budwood.contract.calls import attribute_errors
from budwood.contract.discovery import PluginError, find, installed
from budwood.contract.examples import Example
from budwood.contract.loading import create
from budwood.data import cache
from budwood.data.chat_formats import check_unused, find_unused
from budwood.data.encoder import Encoder
from budwood.data.examples import DataStats, Examples, check_examples, measure, pack
from budwood.data.formats import GROUP, Dropped, all_dropped
from budwood.data.reading import Row, Rows, hash_file, read_rows
from budwood.data.recognition import recognise
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
    path: str | Path,
    tokenizer: Any,
    task: Any,
    max_length: int,
    labels: Sequence[str] | None = None,
    cache_dir: Path | None = None,
    template_options: Mapping[str, Any] | None = None,
    change: Callable[[Row, int], Row] | None = None,
    loss_on: str = "assistant",
) -> Examples:
    """Build the examples of a data file, or load them from the cache.

    Args:
        path: a data file or folder.
        tokenizer: the base's tokenizer; None for a task that does not need one.
        task: a task, or its name.
        max_length: maximum length in tokens; longer rows are truncated, or dropped if no label with a loss is left.
        labels: class names from the training data; None: learn them from this file.
        cache_dir: folder of the cache; None: `cache.default_folder()`.
        template_options: variables for the chat template.
        change: maps a row and its index to the row to encode; disables the cache.
        loss_on: "assistant", "last" or "all"; see `Encoder`.

    Raises:
        InputError: as `read_rows`, the data format and the task; a label is not in the training data; all rows were
            dropped; `BUDWOOD_CACHE_LIMIT` is not a size.
    """
    path = Path(path)
    task = create(task, "budwood.tasks") if isinstance(task, str) else task
    encoder = Encoder(tokenizer, max_length, template_options, labels, loss_on)
    if change is not None:
        return Examples(path, *_encode(read_rows(path), encoder, task, max_length, change))
    folder = cache.default_folder() if cache_dir is None else Path(cache_dir)
    limit = cache.size_limit()
    plugins = [(e.name, e.value, e.owner) for entries in installed(GROUP).values() for e in entries]
    owner = find(task.name, "budwood.tasks")
    options = {
        "file": hash_file(path),
        "path": str(path),
        "formats": plugins,
        "task": (task.name, owner.value, owner.owner),
        "max_length": max_length,
        "labels": None if labels is None else list(labels),
        "template_options": dict(template_options or {}),
        "loss_on": loss_on,
    }
    key = cache.make_key(tokenizer, options)
    entry = cache.load(folder, key) if key else None
    if entry is not None:
        return Examples(path, *entry, from_cache=True)
    rows = read_rows(path)
    arrays, facts = _encode(rows, encoder, task, max_length)
    if key and rows.sha256 == options["file"]:
        cache.save(folder, key, arrays, facts, limit)
    return Examples(path, arrays, facts)


def overlap(train: Examples, other: Examples) -> int:
    """Count the examples of `other` whose inputs equal those of an example of `train`."""

    def digests(examples: Examples) -> list[bytes]:
        joined = (b"".join(e.inputs[name].tobytes() for name in sorted(e.inputs)) for e in examples)
        return [hashlib.blake2b(inputs, digest_size=16).digest() for inputs in joined]

    seen = set(digests(train))
    return sum(digest in seen for digest in digests(other))


def _encode(
    rows: Rows, encoder: Encoder, task: Any, max_length: int, change: Callable[[Row, int], Row] | None = None
) -> tuple[cache.Arrays, dict[str, Any]]:
    data_format = recognise(rows.columns, task.name, str(rows.path))
    unused = find_unused(rows.columns, data_format)
    dropped: Counter[str] = Counter()
    first: dict[str, str] = {}
    examples: list[Example] = []
    truncated = tokens_cut = groups = 0
    for start, chunk in _chunks(rows):
        where = [rows.location(start + i) for i in range(len(chunk))]
        if change is not None:
            chunk = [change(row, start + i) for i, row in enumerate(chunk)]
        for given, place in zip(chunk, where, strict=True):
            check_unused(given, unused, data_format, place)
        with attribute_errors(data_format, "item"):
            results: list[Any] = [data_format.item(row, place) for row, place in zip(chunk, where, strict=True)]
        at = [i for i, item in enumerate(results) if not isinstance(item, Dropped)]
        if at:
            with attribute_errors(task, "encode"):
                encoded = task.encode([results[i] for i in at], [where[i] for i in at], encoder)
            if len(encoded) != len(at) or not all(isinstance(result, Encoded | Dropped) for result in encoded):
                raise PluginError(
                    f"{task}, encode: must return an Encoded or a Dropped for each of its {len(at)} items."
                )
            for i, result in zip(at, encoded, strict=True):
                results[i] = result
        for offset, result in enumerate(results):
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
    if not examples:
        remedy = " Raise data.max_length." if BEYOND in dropped else ""
        raise InputError(all_dropped(rows.path, dropped) + remedy)
    arrays = pack(examples, task)
    classes = encoder.classes.finish(str(rows.path))
    if classes:
        arrays["labels.values"] = encoder.classes.order(arrays["labels.values"])
    stats = DataStats(
        rows=len(rows), dropped=dict(dropped), first_dropped=first, truncated=truncated, tokens_cut=tokens_cut,
        remarks=dict(encoder.remarks), **measure(arrays, classes),
    )  # fmt: skip
    facts = {
        "format": data_format.name,
        "columns": [*data_format.columns, *(name for name in data_format.optional if name in rows.columns)],
        "task": task.name,
        "max_length": max_length,
        "labels": classes,
        "notes": [*rows.notes, *([f"columns ignored: {', '.join(unused)}"] if unused else [])],
        "sha256": rows.sha256,
        "stop_ids": sorted(encoder.stop_ids),
        "stats": dataclasses.asdict(stats),
    }
    return arrays, facts


def _chunks(rows: Rows) -> Iterator[tuple[int, list[Row]]]:
    chunk: list[Row] = []
    for index, row in enumerate(rows):
        chunk.append(row)
        if len(chunk) == CHUNK or index == len(rows) - 1:
            yield index + 1 - len(chunk), chunk
            chunk = []

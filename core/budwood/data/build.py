"""Builds examples from a data file: recognises its data format, and lets the task encode its rows."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from budwood.contract.discovery import find, installed
from budwood.contract.loading import create
from budwood.data import cache
from budwood.data.bad_rows import BadRows, count_reasons
from budwood.data.belonging import hash_files_of
from budwood.data.chunk import BEYOND, TOO_LONG, Change, ChunkEncoder
from budwood.data.classes import near_equal
from budwood.data.encoder import Encoder
from budwood.data.examples import Examples, measure
from budwood.data.formats import GROUP, all_dropped
from budwood.data.recognition import recognise_rows
from budwood.data.rows import Rows
from budwood.data.sources import Data, hash_data, locate, read_rows
from budwood.data.spool import Arrays, Spool
from budwood.data.stats import DataStats
from budwood.data.unused import find_unused
from budwood.errors import InputError

Progress = Callable[[int, int], None]
"""Is called with the number of rows encoded and of all rows."""


def build_examples(
    data: Data,
    tokenizer: Any,
    task: Any,
    max_length: int,
    labels: Sequence[str] | None = None,
    cache_dir: Path | None = None,
    template_options: Mapping[str, Any] | None = None,
    change: Change | None = None,
    loss_on: str = "assistant",
    skip_bad_rows: bool = False,
    date: str | None = None,
    as_chat: bool = False,
    progress: Progress | None = None,
    processes: int | None = None,
    read: Mapping[str, str] | None = None,
    group_by: str | None = None,
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
        as_chat: render a prompt and its completion with the chat template; see `Encoder`.
        progress: is called with the number of rows encoded and of all rows.
        processes: number of processes that encode; None: one for each core if the file is large.
        read: columns that strategies read; see `columns_read`.
        group_by: the column that `hold_out` reads, which is therefore not reported as ignored.

    Raises:
        InputError: as `read_rows`, the data format and the task; a label is not in the training data; all rows were
            dropped; `BUDWOOD_CACHE_LIMIT` is not a size.
    """
    task = create(task, "budwood.tasks") if isinstance(task, str) else task
    encoder = Encoder(tokenizer, max_length, template_options, labels, loss_on, date, as_chat)
    bad, data = BadRows(skip_bad_rows), locate(data)
    if change is not None:
        spool = Spool(Path(tempfile.gettempdir()))
        rows = read_rows(data, bad)
        return Examples(
            data, *_encode(rows, encoder, task, max_length, bad, spool, "", change=change, read=read, group_by=group_by)
        )
    folder = cache.default_folder() if cache_dir is None else Path(cache_dir)
    limit = cache.size_limit()
    plugins = [(e.name, e.value, e.owner) for entries in installed(GROUP).values() for e in entries]
    owner = find(task.name, "budwood.tasks")
    options = {
        "file": hash_data(data),
        "path": str(data),
        "files": (files := hash_files_of(data, task.name)),
        "formats": plugins,
        "task": (task.name, owner.value, owner.owner, task.options.model_dump(mode="json")),
        "max_length": max_length,
        "labels": None if labels is None else list(labels),
        "template_options": dict(template_options or {}),
        "loss_on": loss_on,
        "skip_bad_rows": skip_bad_rows,
        "date": encoder.date,
        "as_chat": as_chat,
        "read": sorted(read or ()),
        "group_by": group_by,
    }
    key = cache.make_key(tokenizer, options)
    entry = cache.load(folder, key) if key else None
    if entry is not None:
        return Examples(data, *entry, from_cache=True)
    rows, spool = read_rows(data, bad), Spool(folder)
    arrays, facts = _encode(
        rows, encoder, task, max_length, bad, spool, files, progress, processes, read=read, group_by=group_by
    )
    if key and rows.sha256 == options["file"]:
        cache.save(folder, key, arrays, facts, limit, spool.directory)
    return Examples(data, arrays, facts)


def overlap(train: Examples, other: Examples) -> int:
    """Count the examples of `other` whose inputs equal those of an example of `train`."""

    shared = np.isin(other.input_hashes, train.input_hashes)
    return int(shared.sum())


def _encode(
    rows: Rows,
    encoder: Encoder,
    task: Any,
    max_length: int,
    bad: BadRows,
    spool: Spool,
    files: str,
    progress: Progress | None = None,
    processes: int | None = None,
    change: Change | None = None,
    read: Mapping[str, str] | None = None,
    group_by: str | None = None,
) -> tuple[Arrays, dict[str, Any]]:
    data_format = recognise_rows(rows, task.name)
    read = read or {}
    unused = find_unused(rows.columns, data_format, read)
    ignored = [name for name in unused if name != group_by]
    unreadable = len(bad.rows)
    chunks = ChunkEncoder(rows, data_format, unused, task, encoder, bad.skip, change, read)
    dropped: Counter[str] = Counter()
    first: dict[str, str] = {}
    hashes: list[np.ndarray] = []
    truncated = tokens_cut = groups = 0
    weighted = False
    for indices, chunk in chunks.chunks(processes):
        bad.rows += chunk.bad
        dropped += chunk.dropped
        first |= {reason: place for reason, place in chunk.first_dropped.items() if reason not in first}
        truncated += chunk.truncated
        tokens_cut += chunk.tokens_cut
        encoder.remarks += chunk.remarks
        encoder.stop_ids |= chunk.stop_ids
        encoder.rendered |= chunk.rendered
        hashes.append(chunk.hashes)
        if chunk.arrays is not None:
            arrays = chunk.arrays
            arrays["groups"] += groups
            groups = int(arrays["groups"][-1]) + 1
            if chunk.classes is not None:
                numbers = [encoder.classes.index(name, str(rows.path)) for name in chunk.classes]
                arrays["labels.values"] = np.array(numbers)[arrays["labels.values"]]
            weighted = weighted or bool((arrays["weights.values"] != 1).any())
            spool.append(arrays)
        if progress is not None:
            progress(indices.stop, len(rows))
    skipped, first_skipped = count_reasons(bad.rows)
    if not groups:
        remedy = " Raise data.max_length." if BEYOND in dropped or TOO_LONG in dropped else ""
        raise InputError(all_dropped(rows.path, {**dropped, **skipped}) + remedy)
    if not weighted:
        spool.drop("weights.values")
    arrays = spool.finish()
    count, distinct = sum(map(len, hashes)), len(np.unique(np.concatenate(hashes)))
    if count > distinct:
        encoder.remarks["examples equal to an earlier one"] = count - distinct
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
        "holds": data_format.holds,
        "instead": data_format.instead,
        "task": task.name,
        "max_length": max_length,
        "labels": classes,
        "date": encoder.date if encoder.rendered else None,
        "rendered": encoder.rendered,
        "notes": [
            *rows.notes,
            *([f"columns ignored: {', '.join(ignored)}"] if ignored else []),
            *near_equal(classes),
        ],
        "sha256": rows.sha256,
        "files": files,
        "skipped": bad.rows if bad.skip else None,
        "stop_ids": sorted(encoder.stop_ids),
        "stats": dataclasses.asdict(stats),
    }
    return arrays, facts

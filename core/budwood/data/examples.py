"""Rows as examples: tokens in flat arrays, with counts of all that was cut, dropped and seen."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from budwood.contract.calls import attribute_errors
from budwood.contract.discovery import PluginError, installed
from budwood.contract.types import Example
from budwood.data import cache
from budwood.data.encoder import Encoder
from budwood.data.forms import GROUP, Dropped, Encoded, Form, all_dropped, recognise
from budwood.data.reading import Row, Rows, hash_file, read_rows
from budwood.errors import InputError, did_you_mean

CHUNK = 1024
"""Rows that are tokenised at once."""
PERCENTILES = (50, 90, 99)
BEYOND = "answer beyond max_length"
"""Why a row is dropped of which a cut would leave the prompt alone."""


@dataclass
class DataStats:
    """What became of a file's rows.

    Attributes:
        rows: in the file.
        examples: that are left.
        dropped: number of rows by reason; `first_dropped` has the place of the first of each.
        truncated: examples that were cut to `max_length`; `tokens_cut` is what they lost.
        tokens: of all examples; `supervised` of them have a loss (0 for classification, where examples have).
        shortest, mean, longest, percentiles: lengths of examples in tokens; percentiles by "50", "90", "99".
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
    remarks: dict[str, int] = field(default_factory=dict)

    @property
    def supervised_share(self) -> float:
        """Share of the tokens that have a loss."""
        return self.supervised / self.tokens if self.tokens else 0.0


class Examples(Sequence[Example]):
    """Training examples of one file, in the file's order; each `Example` is a view that is made when asked for.

    Attributes:
        path: the file.
        form: name of the form that was recognised.
        columns: that the form reads.
        task: for which the examples were made.
        max_length: in tokens, to which they were cut.
        labels: names of the classes, whose indices are `Example.label`; empty where there are none.
        stats: what became of the rows.
        notes: lines that the user should see.
        sha256: of the file.
        stop_ids: tokens that end an answer.
        from_cache: the tokens were read, not made.
        lengths: [n] int64, tokens of each example.
    """

    def __init__(self, path: Path, arrays: cache.Arrays, facts: Mapping[str, Any], from_cache: bool = False) -> None:
        self.path, self.from_cache = path, from_cache
        self._arrays, self._facts = arrays, facts
        self._extra: Sequence[dict[str, np.ndarray]] | None = None
        self._rows: Rows | None = None
        self.form: str = facts["form"]
        self.columns: list[str] = facts["columns"]
        self.task: str = facts["task"]
        self.max_length: int = facts["max_length"]
        self.labels: list[str] = facts["labels"]
        self.notes: list[str] = facts["notes"]
        self.sha256: str = facts["sha256"]
        self.stop_ids: list[int] = facts["stop_ids"]
        self.stats = DataStats(**facts["stats"])
        self.lengths: np.ndarray = np.diff(arrays["offsets"])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        arrays = self._arrays
        span = slice(int(arrays["offsets"][index]), int(arrays["offsets"][index + 1]))
        label = int(arrays["label"][index])
        return Example(
            id=int(arrays["ids"][index]),
            input_ids=arrays["input_ids"][span],
            supervised=arrays["supervised"][span],
            label=None if label < 0 else label,
            columns=dict(self._extra[index]) if self._extra is not None else {},
            prompt_length=int(arrays["prompt_length"][index]),
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @classmethod
    def gather(cls, examples: Sequence[Example], like: Examples) -> Examples:
        """Put examples that a strategy chose or made into arrays; everything but the counts is as in `like`."""
        rows = [
            (e.id, e.input_ids, e.supervised, -1 if e.label is None else e.label, e.prompt_length) for e in examples
        ]
        arrays = _pack(rows)
        stats = dataclasses.replace(like.stats, **_measure(arrays, like.labels))
        gathered = cls(like.path, arrays, {**like._facts, "stats": dataclasses.asdict(stats)})
        gathered._extra = [e.columns for e in examples]
        gathered._rows = like._rows
        return gathered

    def prompt_ids(self, index: int) -> list[int]:
        """Tokens from which generation starts; empty where the form has no prompt."""
        start, length = int(self._arrays["offsets"][index]), int(self._arrays["prompt_length"][index])
        ids: list[int] = self._arrays["input_ids"][start : start + length].tolist()
        return ids

    def reference(self, index: int) -> str | None:
        """The answer that the file gives to the prompt, as text; None where the form has no prompt.

        Raises:
            InputError: the file has changed since its tokens were made.
        """
        return self._form.reference(self.rows[int(self._arrays["ids"][index])])

    @cached_property
    def _form(self) -> Form:
        return recognise(self.columns, self.task, str(self.path))

    @property
    def rows(self) -> Rows:
        """The file's rows, read again when they are first asked for; `Example.id` indexes them.

        Raises:
            InputError: the file has changed since its tokens were made.
        """
        if self._rows is None:
            rows = read_rows(self.path)
            if rows.sha256 != self.sha256:
                raise InputError(f"{self.path}: the file changed during the run. Start again.")
            self._rows = rows
        return self._rows

    def describe(self) -> str:
        """One line on what was recognised, counted, cut and dropped."""
        stats = self.stats
        parts = [f"{stats.examples:,} examples", f"{stats.tokens:,} tokens"]
        parts.append(f"{len(self.labels)} classes" if self.labels else f"{stats.supervised_share:.0%} with a loss")
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


def build_examples(
    path: str | Path,
    tokenizer: Any,
    task: str,
    max_length: int,
    labels: Sequence[str] | None = None,
    cache_dir: Path | None = None,
    template_options: Mapping[str, Any] | None = None,
    change: Callable[[Row, int], Row] | None = None,
) -> Examples:
    """Read a data file, recognise its form and turn its rows into tokens, or take them from the cache.

    Args:
        path: a data file or folder.
        tokenizer: of the base.
        task: "causal-lm", "sequence-classification", or one that an installed form names.
        max_length: in tokens; longer rows are cut at the end, or dropped when nothing with a loss is left.
        labels: names of the classes, as training data gave them; None: learn them from this file.
        cache_dir: where tokens are kept; None: `cache.default_folder()`.
        template_options: variables for the chat template.
        change: from a row and its number to the row that is made into tokens, which are then not cached.

    Raises:
        InputError: what `read_rows` and the forms raise; a label that training data does not have; no row is left.
    """
    path = Path(path)
    if change is not None:
        return Examples(
            path,
            *_encode(
                read_rows(path), Encoder(tokenizer, max_length, template_options), task, max_length, labels, change
            ),
        )
    folder = cache.default_folder() if cache_dir is None else Path(cache_dir)
    forms = [(e.name, e.value, e.owner) for entries in installed(GROUP).values() for e in entries]
    options = {
        "file": hash_file(path),
        "path": str(path),
        "forms": forms,
        "task": task,
        "max_length": max_length,
        "labels": None if labels is None else list(labels),
        "template_options": dict(template_options or {}),
    }
    key = cache.make_key(tokenizer, options)
    entry = cache.load(folder, key) if key else None
    if entry is not None:
        return Examples(path, *entry, from_cache=True)
    rows = read_rows(path)
    arrays, facts = _encode(rows, Encoder(tokenizer, max_length, template_options), task, max_length, labels)
    if key and rows.sha256 == options["file"]:
        cache.save(folder, key, arrays, facts)
    return Examples(path, arrays, facts)


def overlap(train: Examples, other: Examples) -> int:
    """How many of `other`'s examples have the very tokens of an example of `train`."""

    def digests(examples: Examples) -> list[bytes]:
        return [hashlib.blake2b(e.input_ids.tobytes(), digest_size=16).digest() for e in examples]

    seen = set(digests(train))
    return sum(digest in seen for digest in digests(other))


def _encode(
    rows: Rows,
    encoder: Encoder,
    task: str,
    max_length: int,
    labels: Sequence[str] | None,
    change: Callable[[Row, int], Row] | None = None,
) -> tuple[cache.Arrays, dict[str, Any]]:
    form = recognise(rows.columns, task, str(rows.path))
    dropped: Counter[str] = Counter()
    first: dict[str, str] = {}
    kept: list[tuple[int, np.ndarray, np.ndarray, int, int]] = []
    names: list[str] = []
    truncated = tokens_cut = 0
    for start, chunk in _chunks(rows):
        where = [rows.location(start + i) for i in range(len(chunk))]
        if change is not None:
            chunk = [change(row, start + i) for i, row in enumerate(chunk)]
        with attribute_errors(form, "encode"):
            results = form.encode(chunk, where, encoder)
        if len(results) != len(chunk) or not all(isinstance(result, Encoded | Dropped) for result in results):
            raise PluginError(f"{form}, encode: must return an Encoded or a Dropped for each of its {len(chunk)} rows.")
        for offset, result in enumerate(results):
            cut = _cut(result, max_length) if isinstance(result, Encoded) else result
            if isinstance(cut, Dropped):
                dropped[cut.reason] += 1
                first.setdefault(cut.reason, where[offset])
                continue
            ids, supervised = cut
            assert isinstance(result, Encoded)
            truncated += result.truncated or len(ids) < len(result.input_ids)
            tokens_cut += len(result.input_ids) - len(ids)
            kept.append((start + offset, ids, supervised, -1, result.prompt_length))
            names.append(result.label or "")
    if not kept:
        remedy = " Raise data.max_length." if BEYOND in dropped else ""
        raise InputError(all_dropped(rows.path, dropped) + remedy)
    classes: list[str] = []
    if any(names):
        classes = sorted(set(names), key=_label_order) if labels is None else list(labels)
        _check_labels(rows, classes, names, [row[0] for row in kept], learned=labels is None)
        index = {name: i for i, name in enumerate(classes)}
        kept = [(i, ids, s, index[name], p) for (i, ids, s, _, p), name in zip(kept, names, strict=True)]
    arrays = _pack(kept)
    stats = DataStats(
        rows=len(rows), dropped=dict(dropped), first_dropped=first, truncated=truncated, tokens_cut=tokens_cut,
        remarks=dict(encoder.remarks), **_measure(arrays, classes),
    )  # fmt: skip
    facts = {
        "form": form.name,
        "columns": list(form.columns),
        "task": task,
        "max_length": max_length,
        "labels": classes,
        "notes": rows.notes,
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


def _cut(row: Encoded, max_length: int) -> tuple[np.ndarray, np.ndarray] | Dropped:
    """Tokens cut to `max_length`, and which of them have a loss."""
    ids = np.asarray(row.input_ids[:max_length], dtype=np.int32)
    supervised = np.zeros(len(ids), dtype=bool)
    for start, stop in row.spans:
        supervised[start:stop] = True
    supervised[:1] = False  # there is no position before it that could predict it
    if row.label is None and not supervised.any():
        beyond = any(stop > max(start, 1) for start, stop in row.spans)
        return Dropped(BEYOND if beyond else "no token with a loss")
    return ids, supervised


def _pack(rows: Sequence[tuple[int, np.ndarray, np.ndarray, int, int]]) -> cache.Arrays:
    empty = np.zeros(0, dtype=np.int32)
    return {
        "ids": np.array([row[0] for row in rows], dtype=np.int64),
        "input_ids": np.concatenate([empty, *(row[1] for row in rows)]).astype(np.int32, copy=False),
        "supervised": np.concatenate([empty.astype(bool), *(row[2] for row in rows)]),
        "offsets": np.cumsum([0, *(len(row[1]) for row in rows)], dtype=np.int64),
        "label": np.array([row[3] for row in rows], dtype=np.int64),
        "prompt_length": np.array([row[4] for row in rows], dtype=np.int64),
    }


def _measure(arrays: cache.Arrays, labels: Sequence[str]) -> dict[str, Any]:
    lengths = np.diff(arrays["offsets"])
    if not len(lengths):
        return {"examples": 0, "tokens": 0, "supervised": 0}
    return {
        "examples": len(lengths),
        "tokens": int(lengths.sum()),
        "supervised": int(arrays["supervised"].sum()),
        "shortest": int(lengths.min()),
        "mean": float(lengths.mean()),
        "longest": int(lengths.max()),
        "percentiles": {str(p): float(np.percentile(lengths, p)) for p in PERCENTILES},
        "classes": np.bincount(arrays["label"], minlength=len(labels)).tolist() if labels else [],
    }


def _label_order(name: str) -> tuple[bool, int, str]:
    """Whole numbers by value, then names by letter."""
    number = name.isascii() and name.isdigit()
    return (not number, int(name) if number else 0, name)


def _check_labels(rows: Rows, classes: Sequence[str], names: Sequence[str], ids: Sequence[int], learned: bool) -> None:
    if learned and len(classes) < 2:
        raise InputError(f"{rows.path}: every label is '{classes[0]}'. Classification needs at least two classes.")
    known = set(classes)
    for row, name in zip(ids, names, strict=True):
        if name not in known:
            some = ", ".join(classes[:10]) + (f" and {len(classes) - 10} more" if len(classes) > 10 else "")
            raise InputError(
                f"{rows.location(row)}: label '{name}' is not in the training data.{did_you_mean(name, classes)} "
                f"Known: {some}."
            )

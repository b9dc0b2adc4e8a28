"""The report of `budwood data`: samples with their loss mask, lengths and counts, as JSON values or human-readable."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from budwood.contract.calls import attribute_errors
from budwood.contract.examples import DESIRABLE, Example
from budwood.data.build import overlap
from budwood.data.examples import Examples
from budwood.data.preference import PAIRS
from budwood.errors import InputError, plural
from budwood.untrusted.files import complete_file

BINS = 12
CLASSES = 30
"""Maximum number of classes listed."""
PADDED_ROWS = 8
"""Rows per batch in the estimate of the padding that packing avoids."""
LONGEST_PIECE = 600
"""Maximum number of characters shown of one piece of a sample."""
PLAIN, LOSS = "dim", "bold green"


def make_report(
    train: Examples,
    other: Examples | None,
    task: Any,
    tokenizer: Any,
    samples: int,
    steps: int,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the contents of the report as JSON values.

    Args:
        train: the training examples.
        other: the evaluation examples.
        task: the recipe's task; its `show` returns the pieces of a sample.
        tokenizer: the base's tokenizer.
        samples: number of examples (of groups, such as pairs) to show, evenly spread over the file.
        steps: optimizer steps per epoch.
        notes: lines to show to the user.
    """
    report = {
        "train": _describe(train),
        "steps_per_epoch": steps,
        "padding": _padding(train.lengths),
        "notes": list(notes),
    }
    if other is not None:
        shared = overlap(train, other)
        report["eval"] = {**_describe(other), "overlap": shared, "overlap_share": shared / len(other)}
    report["samples"] = [_sample(train, i, task, tokenizer) for i in _choose(train, samples)]
    return report


def _choose(examples: Examples, samples: int) -> list[int]:
    """Return the indices of the examples of so many groups, evenly spread."""
    count = int(examples.groups[-1]) + 1 if len(examples) else 0
    groups = np.unique(np.linspace(0, count - 1, min(samples, count)).round().astype(int))
    chosen: list[int] = np.flatnonzero(np.isin(examples.groups, groups)).tolist()
    return chosen


def write_sheet(path: Path, examples: Examples, task: Any, samples: int) -> None:
    """Draw samples in a picture; see `Task.sheet`.

    Raises:
        InputError: the task has no pictures, or the file's name is not that of a PNG.
        ResourceError: the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"--sheet: '{path}' must end in .png.")
    chosen = _choose(examples, samples)
    places = [examples.location(i).rpartition(":")[2] for i in chosen]
    labels = [examples.labels[int(examples[i].labels[0])] if examples.labels else "" for i in chosen]
    titles = [f"{label} ({place})" if label else place for label, place in zip(labels, places, strict=True)]
    with attribute_errors(task, "sheet"):
        picture = task.sheet([examples[i] for i in chosen], titles)
    if picture is None:
        raise InputError(f"--sheet: {task} has no pictures: it is for tasks on images.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--sheet: there is no folder '{path.parent}'.")
    complete_file(path, picture)


def show_report(report: dict[str, Any], console: Console) -> None:
    """Print a report; without colour, brackets mark text with a loss."""
    coloured = console.color_system is not None and not console.no_color
    for sample in report["samples"]:
        console.print(Text(sample["where"], style="cyan"), Padding(_paint(sample, coloured), (0, 0, 1, 2)))
    if any(supervised for sample in report["samples"] for _, supervised in sample["pieces"]):
        legend = Text("In the samples: ")
        legend.append("with a loss" if coloured else "⟦with a loss⟧", LOSS if coloured else "")
        console.print(legend.append(", ").append("without", PLAIN), "")
    for name in ("train", "eval"):
        if name in report:
            _show_file(name, report[name], console)
    for note in report["notes"]:
        console.print(Text(note), soft_wrap=True)
    packing = (
        f"{plural(report['steps_per_epoch'], 'optimizer step')} per epoch. Packed rows have no padding; random batches "
    )
    console.print(f"{packing}of {PADDED_ROWS} rows would be {report['padding']:.0%} padding.", soft_wrap=True)


def _describe(examples: Examples) -> dict[str, Any]:
    stats = examples.stats
    counts, edges = np.histogram(examples.lengths, bins=_edges(stats.shortest, stats.longest))
    return {
        "path": str(examples.path),
        "format": examples.format,
        "columns": examples.columns,
        "task": examples.task,
        "description": examples.describe(),
        "sha256": examples.sha256,
        "max_length": examples.max_length,
        "rows": stats.rows,
        "examples": stats.examples,
        "dropped": stats.dropped,
        "first_dropped": stats.first_dropped,
        "skipped": stats.skipped,
        "first_skipped": stats.first_skipped,
        "truncated": stats.truncated,
        "tokens_cut": stats.tokens_cut,
        "tokens": stats.tokens,
        "supervised": stats.supervised,
        "supervised_share": stats.supervised_share,
        "lengths": {"min": stats.shortest, "mean": stats.mean, **stats.percentiles, "max": stats.longest},
        "histogram": [
            {"from": int(low), "to": int(high) - 1, "examples": int(count)}
            for low, high, count in zip(edges, edges[1:], counts, strict=False)
        ],
        "labels": dict(zip(examples.labels, stats.classes, strict=True)),
        "remarks": stats.remarks,
        "notes": examples.notes,
    }


def _edges(shortest: int, longest: int) -> np.ndarray:
    width = max(1, -(-(longest + 1 - shortest) // BINS))
    return np.arange(shortest, longest + width + 1, width)


def _padding(lengths: np.ndarray) -> float:
    """Return the fraction of padding if batches of random examples were padded to the longest of each batch."""
    order = np.random.default_rng(0).permutation(lengths)
    rows = [order[i : i + PADDED_ROWS] for i in range(0, len(order), PADDED_ROWS)]
    return 1.0 - float(lengths.sum()) / sum(int(row.max()) * len(row) for row in rows)


def _sample(examples: Examples, index: int, task: Any, tokenizer: Any) -> dict[str, Any]:
    example: Example = examples[index]
    classes = [examples.labels[int(label)] for label in example.labels] if examples.labels else []
    return {
        "where": examples.location(index) + _verdict(examples, example),
        "tokens": int(examples.lengths[index]),
        "pieces": [list(piece) for piece in task.show(example, tokenizer)],
        "label": ", ".join(classes) if classes else None,
    }


def _verdict(examples: Examples, example: Example) -> str:
    """Return whether an example of preference data is the answer to imitate; "" for other data."""
    if DESIRABLE not in example.columns:
        return ""
    words = ("rejected", "chosen") if examples.holds == PAIRS else ("not desirable", "desirable")
    return f", {words[int(example.columns[DESIRABLE].values)]}"


def _paint(sample: dict[str, Any], coloured: bool) -> Text:
    text = Text()
    for piece, supervised in sample["pieces"]:
        piece = _visible(piece)
        text.append(piece if coloured or not supervised else f"⟦{piece}⟧", LOSS if supervised else PLAIN)
    if sample["label"] is not None:
        label = _visible(sample["label"])
        text.append(" → ").append(label if coloured else f"⟦{label}⟧", LOSS)
    return text


def _visible(text: str) -> str:
    """Mark line ends, escape control characters (data may not control a terminal), and shorten long pieces."""
    if len(text) > LONGEST_PIECE:
        half = LONGEST_PIECE // 2
        text = f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"
    shown = (
        "↵\n" if c == "\n" else c if unicodedata.category(c)[0] != "C" else c.encode("unicode_escape").decode()
        for c in text
    )
    return "".join(shown)


def _show_file(name: str, file: dict[str, Any], console: Console) -> None:
    lines = [f"{name}: {file['path']}, read as {' + '.join(file['columns'])} for {file['task']}"]
    split = file["examples"] > file["rows"]
    counted = (
        f"{plural(file['examples'], 'example')} from {plural(file['rows'], 'row')}"
        if split
        else (f"{file['examples']:,} of {plural(file['rows'], 'row')}")
    )
    lines.append(f"{counted}, {plural(file['tokens'], 'token')}")
    if not file["labels"]:
        lines.append(f"{file['supervised_share']:.1%} of them with a loss")
    lines.append(
        f"{file['truncated']:,} truncated at {file['max_length']} ({plural(file['tokens_cut'], 'token')} lost)"
    )
    for word in ("dropped", "skipped"):
        first = file[f"first_{word}"]
        rows = ", ".join(f"{n:,} {reason} (first {first[reason]})" for reason, n in file[word].items())
        if rows or word == "dropped":
            lines.append(f"{word}: {rows or 'none'}")
    if "overlap" in file:
        lines.append(f"{file['overlap']:,} also in the training data ({file['overlap_share']:.1%})")
    lines += [f"{count:,} {remark}" for remark, count in file["remarks"].items()] + file["notes"]
    console.print(Text("\n  ".join(lines)), soft_wrap=True)
    if file["labels"]:
        classes = sorted(file["labels"].items(), key=lambda item: -item[1])
        rest = f", the largest {CLASSES} of {len(classes)}" if len(classes) > CLASSES else ""
        console.print(f"  examples per class{rest}", style="cyan")
        console.print(_bars([(_visible(label), count) for label, count in classes[:CLASSES]]))
    lengths = ", ".join(f"{n + ' %' if n.isdigit() else n} {v:,.0f}" for n, v in file["lengths"].items())
    console.print(f"  length in tokens: {lengths}", style="cyan", soft_wrap=True)
    console.print(_bars([(f"{bar['from']:,}–{bar['to']:,}", bar["examples"]) for bar in file["histogram"]]), "")


def _bars(counts: list[tuple[str, int]], width: int = 40) -> Table:
    most = max((count for _, count in counts), default=1) or 1
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", min_width=12, max_width=30, no_wrap=True)
    table.add_column(justify="right")
    table.add_column(no_wrap=True)
    for name, count in counts:
        eighths = round(count / most * width * 8) or bool(count)
        bar = "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]
        table.add_row(Text(name), f"{count:,}", Text(bar, style="green"))
    return table

"""The rows that a run holds out: which, how many, and that no example of them is trained on."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from budwood.data.build import build_examples, overlap
from budwood.data.examples import Examples
from budwood.data.held_out import hold_out, rows_held_out
from budwood.data.sources import Source
from budwood.errors import InputError

Build = Callable[..., Examples]


@pytest.fixture(scope="module")
def build(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Function `make(rows, task)` -> the examples of rows, or of data as a recipe names it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)

    def make(rows: Any, task: str = "causal-lm") -> Examples:
        if isinstance(rows, list):
            rows = write(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)
        return build_examples(rows, tokenizer, task, 128)

    return make


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(count: int) -> list[dict[str, Any]]:
    return [{"text": f"line number {i} of the file"} for i in range(count)]


@pytest.mark.parametrize(("count", "held"), [(100, 10), (199, 10), (400, 20), (10_100, 500)])
def test_5_percent_but_at_least_10_and_at_most_500(build: Build, count: int, held: int) -> None:
    examples = build(texts(count))
    choice = hold_out(examples, seed=0)
    assert len(choice.indices) == held and f"{held} of {count:,} examples ({held} rows)" in choice.note
    rest, part = choice.split(examples)
    assert part is not None and len(rest) + len(part) == count
    assert sorted([*rest.keys, *part.keys]) == list(range(count)), "each example is on one side, with its own key"


def test_a_small_file_is_trained_on_as_a_whole_and_the_note_says_why(build: Build) -> None:
    choice = hold_out(examples := build(texts(99)), seed=0)
    assert choice.split(examples) == (examples, None)
    assert choice.note == (
        "note: nothing was held out, so nothing is evaluated: the data has only 99 examples, fewer than 100; set "
        "data.eval"
    )


def test_the_seed_decides_and_nothing_else(build: Build) -> None:
    examples = build(texts(300))
    first, again, other = (hold_out(examples, seed).rows.tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_the_parts_hold_the_examples_of_their_rows(build: Build) -> None:
    examples = build([{"prompt": f"p {i} " * (i % 7 + 1), "completion": f"c{i}"} for i in range(200)])
    choice = hold_out(examples, seed=3)
    for part, indices in zip(
        choice.split(examples), (np.setdiff1d(np.arange(200), choice.indices), choice.indices), strict=True
    ):
        assert part is not None
        assert part.lengths.tolist() == examples.lengths[indices].tolist()
        assert part.stats.examples == len(part) and part.stats.tokens == part.lengths.sum()
        for mine, index in zip(part, indices, strict=True):
            whole = examples[int(index)]
            assert mine.row == whole.row and mine.key == whole.key
            assert mine.inputs["input_ids"].tolist() == whole.inputs["input_ids"].tolist()
            assert mine.labels.tolist() == whole.labels.tolist()
            assert part.location(0) == examples.location(int(indices[0]))


def test_equal_rows_are_on_one_side(build: Build) -> None:
    rows = [{"text": f"line {i % 60}"} for i in range(240)]
    rest, part = hold_out(examples := build(rows), seed=0).split(examples)
    assert part is not None and len(part) == 12 and overlap(rest, part) == 0


def test_the_repeats_of_a_weighted_source_are_on_one_side(build: Build, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", texts(80))
    write(tmp_path / "b.jsonl", [{"text": f"other {i}"} for i in range(80)])
    sources = (Source(path=str(tmp_path / "a.jsonl"), weight=3), Source(path=str(tmp_path / "b.jsonl"), weight=0.5))
    rest, part = hold_out(examples := build(sources), seed=0).split(examples)
    assert len(examples) == 280 and part is not None and overlap(rest, part) == 0


def test_whole_groups_by_a_column_and_rows_without_a_value_are_separate(build: Build, tmp_path: Path) -> None:
    rows = [{"text": f"turn {i} of {i // 4}", "conversation_id": f"c{i // 4}"} for i in range(200)]
    rows += [{"text": f"alone {i}", "conversation_id": None} for i in range(200)]
    choice = hold_out(build(rows), seed=0, group_by="conversation_id")
    counts = Counter(rows[i]["conversation_id"] for i in choice.rows)
    alone = counts.pop(None)
    assert 0 < alone < 20 and counts and set(counts.values()) == {4} and alone + 4 * len(counts) == 20
    assert f"{alone + len(counts)} groups by conversation_id" in choice.note


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_row_whose_group_is_nan_or_an_empty_field_is_separate(build: Build, tmp_path: Path, kind: str) -> None:
    path, lines = tmp_path / f"rows.{kind}", [f"line {i}" for i in range(200)]
    if kind == "jsonl":
        write(path, [{"text": line, "author": ("", " ")[i % 2]} for i, line in enumerate(lines)])
    elif kind == "csv":
        fields = [("", "NULL", "NaN")[i % 3] for i in range(200)]
        path.write_text("\n".join(["text,author", *(f"{line},{f}" for line, f in zip(lines, fields, strict=True)), ""]))
    else:
        pq.write_table(pa.table({"text": lines, "author": pa.array([math.nan] * 200, pa.float64())}), path)
    choice = hold_out(build(path), seed=0, group_by="author")
    assert len(choice.rows) == 10, choice.note


def test_a_column_that_is_not_there_is_refused(build: Build) -> None:
    with pytest.raises(InputError, match="r.yaml:3: data.group_by: .* has no column 'topic': it has text"):
        hold_out(build(texts(100)), 0, "topic", "r.yaml:3: data.group_by")


def test_if_everything_belongs_together_nothing_is_held_out(build: Build) -> None:
    rows = [{"text": f"line {i}", "author": "one"} for i in range(150)]
    choice = hold_out(build(rows), seed=0, group_by="author")
    assert not len(choice.indices) and "rows that must stay together" in choice.note


def test_each_class_is_held_out_in_proportion_and_left_in_training(build: Build) -> None:
    names = ["games"] * 300 + ["fonts"] * 80 + ["rare"] * 20 + ["single"]
    rows = [{"text": f"thing {i}", "label": name} for i, name in enumerate(names)]
    examples = build(rows, "sequence-classification")
    choice = hold_out(examples, seed=0)
    assert Counter(names[i] for i in choice.rows) == {"games": 15, "fonts": 4, "rare": 1}
    rest, part = choice.split(examples)
    assert part is not None and rest.labels == part.labels == examples.labels
    held = dict(zip(part.labels, part.stats.classes, strict=True))
    trained = dict(zip(rest.labels, rest.stats.classes, strict=True))
    assert held == {"fonts": 4, "games": 15, "rare": 1, "single": 0}
    assert trained == {"fonts": 76, "games": 285, "rare": 19, "single": 1}


def test_groups_of_a_classifier_are_held_out_whole_and_each_class_about_in_proportion(build: Build) -> None:
    def held(classes: Sequence[str]) -> Counter[str]:
        rows = [{"text": f"thing {i}", "label": name, "author": f"a{i // 10}"} for i, name in enumerate(classes)]
        choice = hold_out(build(rows, "sequence-classification"), seed=0, group_by="author")
        assert set(Counter(rows[i]["author"] for i in choice.rows).values()) == {10}, choice.note
        assert "groups by author, in proportion to the classes, as far as groups allow" in choice.note
        return Counter(classes[i] for i in choice.rows)

    mixed = held(["games", "fonts", "text"] * 133 + ["games"])
    assert mixed.total() == 20 and min(mixed.values()) >= 6
    assert held(["games"] * 200 + ["fonts"] * 160 + ["text"] * 40) == {"games": 10, "fonts": 10}
    assert held(["games"] * 400 + ["fonts"] * 400) == {"games": 20, "fonts": 20}


def test_a_group_that_holds_the_rest_of_a_class_is_left_in_training(build: Build) -> None:
    names = ["games"] * 9 + ["rare"] + ["games"] * 90
    rows = [{"text": f"thing {i}", "label": name, "author": f"a{i // 10}"} for i, name in enumerate(names)]
    examples = build(rows, "sequence-classification")
    for seed in range(20):
        assert len(held := hold_out(examples, seed, "author").rows) == 10 and 9 not in held
    alone = [{"text": f"thing {i}", "label": f"class {i // 2}", "author": f"a{i // 2}"} for i in range(100)]
    choice = hold_out(build(alone, "sequence-classification"), seed=0, group_by="author")
    assert not len(choice.rows) and choice.note.endswith("or all of a class; set data.eval")


def test_rows_of_an_earlier_choice(build: Build) -> None:
    examples = build(texts(200))
    choice = hold_out(examples, seed=0)
    assert rows_held_out(examples, choice.rows.tolist()).indices.tolist() == choice.indices.tolist()
    assert "1 of its held-out rows yield no example" in rows_held_out(examples, [3, 700]).note
    with pytest.raises(InputError, match="none of the held-out rows yields an example"):
        rows_held_out(examples, [700])

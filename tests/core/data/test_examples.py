"""Examples as flat arrays: truncation, dropped rows, labels and counts, and the token cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from budwood.contract.examples import Column, Example
from budwood.data import cache
from budwood.data.build import build_examples, overlap
from budwood.data.examples import Examples
from budwood.errors import InputError
from budwood.model.text_tasks import CausalLM, SequenceClassification

LM, CLASSIFY = "causal-lm", "sequence-classification"
PAIRS = [{"prompt": f"Question: {i}\nAnswer:", "completion": " yes" * (i + 1)} for i in range(5)]
LABELLED = [{"text": f"hello {i}", "label": name} for i, name in enumerate(["spam", "ham", "eggs", "ham"])]


def test_examples_are_views_of_the_rows_contents(write: Any, byte_level: Any) -> None:
    tokenizer = byte_level()
    examples = build_examples(write(PAIRS), tokenizer, LM, 512)
    assert len(examples) == len(list(examples)) == 5
    assert examples.lengths.tolist() == [len(example.inputs["input_ids"]) for example in examples]
    for index, example in enumerate(examples):
        assert (example.key, example.row) == (index, index)
        ids = example.inputs["input_ids"]
        assert ids.dtype == np.int32
        assert ids[example.label_positions + 1].tolist() == example.labels.tolist()
        assert example.weights.tolist() == [1.0] * len(example.labels)
        assert tokenizer.decode(example.labels) == PAIRS[index]["completion"] + "</s>"
        assert tokenizer.decode(CausalLM().prompt(example)) == "<s>" + PAIRS[index]["prompt"]
        assert examples.reference(index) == PAIRS[index]["completion"]
    assert examples[-1].key == 4
    assert [example.key for example in examples[1:3]] == [1, 2]
    assert examples.groups.tolist() == [0, 1, 2, 3, 4]
    assert examples.format == "prompt-completion"
    with pytest.raises(IndexError):
        examples[5]


def test_the_recognised_format_is_reported(write: Any, byte_level: Any) -> None:
    line = build_examples(write(PAIRS), byte_level(), LM, 512).describe()
    assert "train.jsonl: prompt + completion; 5 examples," in line
    assert "% with a loss" in line
    rows = [*LABELLED, {"text": " ", "label": "ham"}]
    line = build_examples(write(rows), byte_level(), CLASSIFY, 4).describe()
    assert "text + label; 4 examples" in line
    assert "3 classes, 4 truncated at 4, 1 dropped (empty text 1, first at " in line
    assert "train.jsonl:5)" in line


def test_a_byte_order_mark_is_reported(tmp_path: Path, byte_level: Any) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("\ufefftext,label\r\nx,a\r\ny,b\r\n".encode())
    for _ in range(2):  # the second time from the cache
        examples = build_examples(path, byte_level(), CLASSIFY, 64)
        assert "byte order mark" in examples.describe()
        assert examples.labels == ["a", "b"]


def test_long_rows_are_truncated_or_dropped_and_counted(write: Any, byte_level: Any) -> None:
    tokenizer = byte_level()
    prompt = len(CausalLM().prompt(build_examples(write(PAIRS), tokenizer, LM, 512)[0]))
    examples = build_examples(write(PAIRS), tokenizer, LM, prompt + 3)
    assert len(examples) == 5
    assert examples.lengths.max() == prompt + 3
    full = build_examples(write(PAIRS), tokenizer, LM, 512)
    assert examples.stats.truncated == (full.lengths > prompt + 3).sum()
    assert examples.stats.tokens_cut == (full.lengths - examples.lengths).sum()
    for truncated, complete in zip(examples, full, strict=True):
        count, labels = len(truncated.inputs["input_ids"]), len(truncated.labels)
        assert np.array_equal(truncated.inputs["input_ids"], complete.inputs["input_ids"][:count])
        assert np.array_equal(truncated.labels, complete.labels[:labels])
        assert labels
    rows = [*PAIRS, {"prompt": "maybe " * 50, "completion": "yes"}, {"prompt": "x", "completion": ""}]
    examples = build_examples(write(rows), tokenizer, LM, prompt + 3)
    assert examples.stats.rows == 7
    assert examples.stats.dropped == {"answer beyond max_length": 1, "empty completion": 1}
    assert [place.rpartition(":")[2] for place in examples.stats.first_dropped.values()] == ["6", "7"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "x", "completion": " "}] * 3, "all of its 3 rows were dropped: empty completion 3.$"),
        ([{"prompt": "maybe " * 50, "completion": "x"}], "answer beyond max_length 1. Raise data.max_length"),
        ([{"text": "\n"}], "its only row was dropped: empty text 1.$"),
    ],
)
def test_no_rows_left_is_an_error(rows: Any, message: str, write: Any, byte_level: Any) -> None:
    with pytest.raises(InputError, match=message):
        build_examples(write(rows), byte_level(), LM, 16)


def test_labels_are_learned_sorted_and_reused(write: Any, byte_level: Any) -> None:
    train = build_examples(write(LABELLED), byte_level(), CLASSIFY, 64)
    assert train.labels == ["eggs", "ham", "spam"]
    assert [int(example.labels[0]) for example in train] == [2, 1, 0, 1]
    assert train.stats.classes == [1, 2, 1]
    held_out = build_examples(write(LABELLED[:1], "eval.jsonl"), byte_level(), CLASSIFY, 64, labels=train.labels)
    assert (held_out.labels, held_out[0].labels.tolist()) == (train.labels, [2])
    numbers = [{"text": "x", "label": i} for i in (10, 9, 100, 9)]
    assert build_examples(write(numbers), byte_level(), CLASSIFY, 64).labels == ["9", "10", "100"]


def test_invalid_labels(write: Any, byte_level: Any) -> None:
    with pytest.raises(InputError, match="every label is 'ham'"):
        build_examples(write(LABELLED[1:2] * 3), byte_level(), CLASSIFY, 64)
    rows = [*LABELLED, {"text": "x", "label": "hem"}]
    with pytest.raises(InputError, match=r"train.jsonl:5: label 'hem' is not .*Did you mean 'ham'.*Known: ham, spam"):
        build_examples(write(rows), byte_level(), CLASSIFY, 64, labels=["ham", "spam", "eggs"])


def test_overlap(write: Any, byte_level: Any) -> None:
    train = build_examples(write(PAIRS), byte_level(), LM, 512)
    other = build_examples(
        write([PAIRS[1], PAIRS[1], {**PAIRS[0], "completion": "no"}], "e.jsonl"), byte_level(), LM, 512
    )
    assert overlap(train, other) == 2


def test_gather(write: Any, byte_level: Any) -> None:
    """Examples that a strategy returned from prepare_examples are packed again."""
    examples = build_examples(write(LABELLED), byte_level(), CLASSIFY, 64)
    chosen = [examples[2], examples[0]]
    chosen[0].columns["score"] = Column(np.float32(0.5))
    ids, one = {"input_ids": np.arange(4, dtype=np.int32)}, np.ones(1, dtype=np.float32)
    chosen.append(Example(ids, np.array([3]), np.array([1]), one, key="made", row=3))
    task = SequenceClassification()
    gathered = Examples.gather(chosen, examples, task)
    assert [example.key for example in gathered] == [2, 0, "made"]
    assert gathered.lengths.tolist() == [len(example.inputs["input_ids"]) for example in chosen]
    assert gathered[0].columns["score"].values == 0.5
    assert np.array_equal(gathered[1].inputs["input_ids"], examples[0].inputs["input_ids"])
    assert gathered.labels == examples.labels
    assert (gathered.stats.examples, gathered.stats.classes) == (3, [1, 1, 1])
    assert len(Examples.gather([], examples, task)) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weights": np.array([-1.0], np.float32)},
            "train.jsonl:1: a label's weight must be .* above 0, not -1",
        ),
        ({"weights": np.array([np.nan], np.float32)}, "a label's weight must be finite and above 0, not nan"),
        ({"weights": np.zeros(1, np.float32)}, "a label's weight must be finite and above 0, not 0"),
        ({"weights": np.ones(2, np.float32)}, "1 label positions, 1 labels and 2 weights"),
        ({"labels": np.array([3])}, "a label is outside the 3 classes"),
        ({"label_positions": np.array([-1])}, "a label's position is negative"),
        ({"inputs": {}}, "inputs must be non-empty arrays"),
        ({"key": 1}, "train.jsonl:2: another example has the same key 1"),
    ],
)
def test_invalid_examples(changes: Any, message: str, write: Any, byte_level: Any) -> None:
    examples = build_examples(write(LABELLED), byte_level(), CLASSIFY, 64)
    with pytest.raises(InputError, match=message):
        Examples.gather([replace(examples[0], **changes), examples[1]], examples, SequenceClassification())


def test_groups_must_be_contiguous(write: Any, byte_level: Any) -> None:
    examples = build_examples(write(LABELLED), byte_level(), CLASSIFY, 64)
    one, two, three = (replace(examples[i], group=g) for i, g in ((0, 7), (1, 8), (2, 7)))
    with pytest.raises(InputError, match="train.jsonl:3: the examples of group 7 are not contiguous"):
        Examples.gather([one, two, three], examples, SequenceClassification())
    assert Examples.gather([one, three, two], examples, SequenceClassification()).groups.tolist() == [0, 0, 1]


def test_weights_of_rows(write: Any, byte_level: Any) -> None:
    rows = [{**PAIRS[0], "weight": 0.5}, {**PAIRS[1], "weight": 0}, PAIRS[2]]
    examples = build_examples(write(rows), byte_level(), LM, 512)
    assert [set(example.weights.tolist()) for example in examples] == [{0.5}, {1.0}]
    assert examples.stats.dropped == {"weight 0": 1}
    assert "prompt + completion + weight" in examples.describe()
    assert "weights 0.5 to 1" in examples.describe()


class TestCache:
    @pytest.fixture
    def build(self, write: Any, byte_level: Any, tmp_path: Path) -> Any:
        def make(rows: Any = PAIRS, tokenizer: Any = None, task: str = LM, length: int = 512, **options: Any) -> Any:
            tokenizer = tokenizer or byte_level()
            return build_examples(write(rows), tokenizer, task, length, cache_dir=tmp_path / "cache", **options)

        return make

    def test_a_second_build_reads_the_same_from_the_cache(self, build: Any, byte_level: Any) -> None:
        made, read = build(), build()
        assert (made.from_cache, read.from_cache) == (False, True)
        for one, two in zip(made, read, strict=True):
            assert np.array_equal(one.inputs["input_ids"], two.inputs["input_ids"])
            assert np.array_equal(one.label_positions, two.label_positions)
            assert np.array_equal(one.labels, two.labels)
            assert (one.key, one.row, one.group) == (two.key, two.row, two.group)
        assert read.stats == made.stats
        assert read.describe() == made.describe()
        assert read.reference(3) == PAIRS[3]["completion"]

    def test_everything_that_affects_the_tokens_is_in_the_key(self, build: Any, byte_level: Any) -> None:
        build()
        assert not build(PAIRS[:4]).from_cache
        assert not build(length=511).from_cache
        assert not build(tokenizer=byte_level(bos=False)).from_cache
        assert not build(tokenizer=byte_level(template="{{ messages }}")).from_cache
        assert not build(template_options={"enable_thinking": False}).from_cache
        assert build().from_cache
        build(LABELLED, task=CLASSIFY)
        assert not build(LABELLED, task=CLASSIFY, labels=["ham", "spam", "eggs"]).from_cache

    def test_a_tokenizers_transient_state_is_not_in_the_key(self, build: Any, byte_level: Any) -> None:
        build()
        byte_level()(["a", "b c d"], padding="longest", truncation=True, max_length=3)
        assert build().from_cache

    @pytest.mark.parametrize("file", ["facts.json", "groups.npy", "inputs%2Finput_ids.values.npy"])
    @pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
    def test_a_damaged_entry_is_silently_rebuilt(self, build: Any, tmp_path: Path, damage: str, file: str) -> None:
        made = build()
        (folder,) = (tmp_path / "cache").iterdir()
        entry = folder / file
        data = bytearray(entry.read_bytes())
        if damage == "flip":
            data[-3] ^= 1
        damaged = {"flip": bytes(data), "cut": bytes(data[:-10]), "empty": b"", "other": b"x" * 1000}[damage]
        entry.write_bytes(damaged)
        again = build()
        assert not again.from_cache
        assert all(np.array_equal(a.labels, b.labels) for a, b in zip(made, again, strict=True))
        assert build().from_cache

    def test_a_folder_that_cannot_be_written(self, build: Any, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("in the way")
        assert len(build()) == 5
        assert len(build()) == 5

    def test_a_failed_write_leaves_no_files(self, build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(cache.Path, "rename", fail)
        assert len(build()) == 5
        assert list((tmp_path / "cache").iterdir()) == []

    def test_a_file_that_changes_during_the_run(self, build: Any, write: Any) -> None:
        build()
        examples = build()
        write(PAIRS[:2])
        with pytest.raises(InputError, match="the file changed during the run"):
            examples.reference(0)

    def test_default_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("BUDWOOD_CACHE", str(tmp_path))
        assert cache.default_folder() == tmp_path / "tokens"
        monkeypatch.delenv("BUDWOOD_CACHE")
        assert cache.default_folder() == Path.home() / ".cache" / "budwood" / "tokens"


def test_errors_in_the_file(tmp_path: Path, byte_level: Any) -> None:
    for path, message in (
        (tmp_path / "none.jsonl", "no such file"),
        ("/dev/zero", "not a regular file"),
        (tmp_path, "neither a `datasets` folder nor a folder of data files"),
    ):
        with pytest.raises(InputError, match=message):
            build_examples(path, byte_level(), LM, 64)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": null}\n')
    with pytest.raises(InputError, match=r"a.jsonl:2: field 'text' must be text, not null"):
        build_examples(tmp_path / "a.jsonl", byte_level(), LM, 64)

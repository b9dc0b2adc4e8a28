"""Several files: lists, patterns, folders, splits, names on the hub, weights."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import errors as hub

from budwood.cli.app import run
from budwood.data.build import build_examples
from budwood.data.recognition import check_rows
from budwood.data.sources import Source, data_size, hash_data, locate, read_rows
from budwood.errors import InputError, ResourceError
from budwood.recipe.schema import Recipe, load_recipe
from budwood.training.loop import tune

Make = Callable[..., Recipe]


def rows_of(name: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name}{i}", "completion": "x"} for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset as on the hub: data/ with two splits, one of two files."""
    data = tmp_path / "hub" / "data"
    data.mkdir(parents=True)
    parts = [("train-00000-of-00002", "a"), ("train-00001-of-00002", "b"), ("test-00000-of-00001", "t")]
    for name, start in parts:
        pq.write_table(pa.Table.from_pylist(rows_of(start, 3)), data / f"{name}.parquet")
    (tmp_path / "hub" / "README.md").write_text("---\n---\n")
    return tmp_path / "hub"


def prompts(data: Any) -> list[str]:
    return [row["prompt"] for row in read_rows(data)]


def test_a_split_of_a_folder_with_data(folder: Path) -> None:
    with pytest.raises(InputError, match=r"hub/data: holds the splits test, train. Name one of them: .*train\*.pa"):
        read_rows(folder)
    assert prompts([Source(path=str(folder), split="train")]) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert prompts(folder / "data" / "train*.parquet") == ["a0", "a1", "a2", "b0", "b1", "b2"]
    with pytest.raises(InputError, match="no split 'trian'. Did you mean 'train'"):
        read_rows([Source(path=str(folder), split="trian")])
    rows = read_rows([Source(path=str(folder), split="train")])
    assert rows.location(4) == f"{folder / 'data' / 'train-00001-of-00002.parquet'}:row 2"
    assert rows[4] == {"prompt": "b1", "completion": "x"} and rows[1:3] == rows_of("a", 3)[1:]


def test_text_files_of_a_folder_and_of_a_pattern(tmp_path: Path) -> None:
    for name in ("one", "two"):
        lines = "".join(json.dumps(row) + "\n" for row in rows_of(name, 2))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    assert prompts(tmp_path) == prompts(tmp_path / "*.jsonl") == ["one0", "one1", "two0", "two1"]
    assert prompts([Source(path=str(tmp_path / "[ot]*.jsonl"))]) == ["one0", "one1", "two0", "two1"]
    with pytest.raises(InputError, match="no file matches the pattern"):
        read_rows(tmp_path / "*.csv")
    (tmp_path / "test.jsonl").write_text((tmp_path / "one.jsonl").read_text())
    with pytest.raises(InputError, match=r"holds the splits test and other files. Name one of them: .*test\*.jsonl"):
        read_rows(tmp_path)


def test_a_folder_of_train_and_validation_files(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        (tmp_path / f"{name}.csv").write_text(f"prompt,completion\n{name},x\n")
    assert prompts([Source(path=str(tmp_path), split="validation")]) == ["validation"]
    with pytest.raises(InputError, match=r"splits train, validation. Name one of them: .*train\*.csv"):
        read_rows(tmp_path)


def test_files_beside_folders_with_data_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("all.jsonl", "more/train/a.jsonl", "data/b.jsonl", "empty/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(rows_of("r", 1)[0]) + "\n")
    with pytest.raises(InputError, match=r"beside folders with data \(more, data\). Name .*: .*\*.jsonl for"):
        read_rows(tmp_path)
    assert prompts(tmp_path / "*.jsonl") == prompts(tmp_path / "more") == prompts(tmp_path / "data") == ["r0"]
    shutil.rmtree(tmp_path / "more")
    with pytest.raises(InputError, match=r"\(data\)"):
        read_rows(tmp_path)
    (tmp_path / "data").rename(tmp_path / "run")
    for name in ("metrics.jsonl", "recipe.yaml"):
        (tmp_path / "run" / name).write_text("")
    assert prompts(tmp_path) == ["r0"], "what a run wrote is no data"


def test_rows_of_two_formats_in_one_file_name_a_row_of_each(write: Any) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    mixed = write([*rows_of("a", 2), {"messages": talk}], "mixed.jsonl")
    with pytest.raises(InputError, match=r"prompt . completion \(.*:1\) and messages \(.*mixed.jsonl:3\). Save each"):
        check_rows(mixed, "causal-lm")


def test_weights_give_exact_shares(tmp_path: Path, write: Any) -> None:
    a, b, c = (str(write(rows_of(name, 8), f"{name}.jsonl")) for name in "abc")
    mixed = [Source(path=a, weight=2), Source(path=b, weight=0.25), Source(path=c, weight=1.5)]
    found = Counter(prompts(mixed))
    assert len(read_rows(mixed)) == 16 + 2 + 12
    assert all(found[f"a{i}"] == 2 for i in range(8))
    assert sum(found[f"b{i}"] for i in range(8)) == 2 and max(found[f"b{i}"] for i in range(8)) == 1
    assert sorted(found[f"c{i}"] for i in range(8)) == [1] * 4 + [2] * 4
    assert prompts(mixed) == prompts(mixed), "the same rows each time"
    (note,) = read_rows(mixed).notes
    assert note == f"mixed: {a} 16 rows (53.3%), {b} 2 rows (6.7%), {c} 12 rows (40.0%)"
    assert hash_data(mixed) != hash_data([*mixed[:2], Source(path=c)])
    assert hash_data(mixed) == read_rows(mixed).sha256
    rows = read_rows(mixed)
    assert [rows.location(8), rows.is_repeat(7), rows.is_repeat(8)] == [f"{a}:1", False, True]
    with pytest.raises(InputError, match="weight 0.01 leaves none of its 8 rows"):
        read_rows([Source(path=a, weight=0.01)])


def test_examples_of_a_mixture(tmp_path: Path, write: Any, byte_level: Any) -> None:
    a, b = (str(write(rows_of(name, 4), f"{name}.jsonl")) for name in "ab")
    data = [Source(path=a, weight=2), Source(path=b)]
    for cached in (False, True):
        examples = build_examples(data, byte_level(), "causal-lm", 64, cache_dir=tmp_path / "cache")
        assert examples.from_cache is cached and len(examples) == 12 and len(set(examples.keys)) == 12
        assert f"{a}, {b}: prompt + completion; 12 examples" in examples.describe()
        assert f"mixed: {a} 8 rows (66.7%), {b} 4 rows (33.3%)" in examples.describe()
        assert examples.stats.remarks == {}, "a row repeated by its weight does not count as an equal row"
        assert examples.location(9) == f"{b}:2" and examples.reference(9) == "x"


def test_sources_of_different_formats_are_trained_together(tmp_path: Path, write: Any, byte_level: Any) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chat = str(write([{"messages": talk, "id": 1}] * 2, "chat.jsonl"))
    alpaca = str(write([{"instruction": "Add", "input": "2 2", "output": "4", "text": "Add 2 2 4"}], "alpaca.jsonl"))
    plain = str(write([{"prompt": "a", "completion": "b"}], "plain.jsonl"))
    data = [Source(path=alpaca, weight=2), Source(path=chat), Source(path=plain)]
    template = "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = byte_level(False, template)
    for cached in (False, True):
        examples = build_examples(data, tokenizer, "causal-lm", 64, cache_dir=tmp_path / "cache")
        assert examples.from_cache is cached
        texts = [tokenizer.decode(example.inputs["input_ids"].tolist()) for example in examples]
        added = "user:Add\n\n2 2<|im_end|>assistant:4<|im_end|>"
        assert texts == [added, added, *["user:Hi<|im_end|>assistant:Hello<|im_end|>"] * 2, "ab</s>"]
        assert [examples.reference(i) for i in (0, 2, 4)] == ["4", "Hello", "b"]
        assert examples.format == "alpaca and messages and prompt-completion"
        formats = f"instruction + output ({alpaca}), messages ({chat}), prompt + completion ({plain})"
        assert formats in examples.describe() and "columns ignored: text, id" in examples.describe()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": "x"}], "b.jsonl: text . label is data for sequence-classification, but the task is"),
        ([{"messages": []}], "b.jsonl:1: field 'messages' is empty"),
        (
            [{"instruction": "a", "output": "b", "images": ["c"]}],
            "b.jsonl:1: instruction . output does not read column",
        ),
        ([{"instruction": "a", "output": "b", "prompt": "c"}], "b.jsonl:1: instruction . output does not read column"),
        ([{"question": "a", "answer": "b"}], "b.jsonl: columns 'question', 'answer' match no data format"),
    ],
)
def test_a_source_of_another_format_is_checked_as_such(write: Any, byte_level: Any, rows: Any, message: str) -> None:
    a, b = str(write(rows_of("a", 2), "a.jsonl")), str(write(rows, "b.jsonl"))
    data = [Source(path=a), Source(path=b)]
    with pytest.raises(InputError, match=message):
        check_rows(data, "causal-lm")
    with pytest.raises(InputError, match=message):
        build_examples(data, byte_level(), "causal-lm", 64)


def test_a_bad_row_is_named_with_its_own_file(tmp_path: Path, write: Any, byte_level: Any) -> None:
    a = str(write(rows_of("a", 2), "a.jsonl"))
    b = str(write([*rows_of("b", 1), {"prompt": "b"}], "b.jsonl"))
    with pytest.raises(InputError, match=r"b.jsonl:2: field 'completion' must be text, not missing"):
        build_examples([Source(path=a), Source(path=b)], byte_level(), "causal-lm", 64, cache_dir=tmp_path / "c")


def test_a_name_on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(name: str, **options: Any) -> str:
        calls.append((name, options["repo_type"], options["revision"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = locate([Source(path="owner/name", split="test", revision="v1"), Source(path="owner/name", split="test")])
    assert prompts(found) == ["t0", "t1", "t2"] * 2
    assert hash_data(found) == read_rows(found).sha256
    assert data_size(found) > 0
    assert calls == [("owner/name", "dataset", "v1"), ("owner/name", "dataset", None)]  # looked up once each
    with pytest.raises(InputError, match="^owner/name/data: holds the splits test, train"):
        read_rows("owner/name")


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            hub.LocalEntryNotFoundError("x"),
            ResourceError,
            "dataset 'owner/name' at revision 'v1' is neither a local fil",
        ),
        (
            hub.HFValidationError("x"),
            InputError,
            "dataset 'owner/name' is neither a local file or folder nor on the hub",
        ),
        (
            hub.GatedRepoError.__new__(hub.GatedRepoError),
            ResourceError,
            "dataset 'owner/name' is gated: accept its terms",
        ),
        (hub.RevisionNotFoundError.__new__(hub.RevisionNotFoundError), InputError, "has no revision 'v1' on the hub"),
    ],
)
def test_the_hub_says_no(monkeypatch: pytest.MonkeyPatch, error: Exception, raised: Any, message: str) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(raised, match=message):
        read_rows([Source(path="owner/name", revision="v1")])


def test_a_run_on_a_list(make_recipe: Make, tmp_path: Path, write: Any, said: list[str]) -> None:
    a, b = (str(write(rows_of(name, 6), f"{name}.jsonl")) for name in "ab")
    train = [a, {"path": b, "weight": 0.5}]
    recipe = make_recipe(data={"train": train, "eval": [b]})
    finished = tune(recipe)
    assert len(finished.examples) == 9
    assert any(f"mixed: {a} 6 rows (66.7%), {b} 3 rows (33.3%)" in line for line in said)
    written = load_recipe(finished.directory / "recipe.yaml")
    assert written.data.train == recipe.data.train and len(written.data.train) == 2


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("[]", "must be a path, or a list of paths or of mappings"),
        ("7", "must be a path, or a list"),
        ("[rows.jsonl, {path: rows.jsonl, wieght: 2}]", "source 2: wieght: unknown key. Did you mean 'weight'"),
        ("[{split: train}]", "source 1: path: missing"),
        ("[{path: rows.jsonl, weight: 0}]", "source 1: weight: must be greater than 0"),
        ("[rows.jsonl, no.jsonl]", "no such file: no.jsonl"),
        ("no/*.jsonl", "no such file: no/*.jsonl"),
    ],
)
def test_wrong_sources_are_refused_with_their_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, train: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(rows_of("a", 2), "rows.jsonl")
    Path("recipe.yaml").write_text(f"base: {{model: b}}\ndata:\n  train: {train}\nstrategies: [lora]\n")
    with pytest.raises(InputError) as caught:
        load_recipe("recipe.yaml")
    assert str(caught.value).startswith("recipe.yaml:3: data.train: ") and message in str(caught.value)


def test_the_data_command_takes_data_and_a_base(
    tiny_base: Path, tmp_path: Path, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(rows_of("a", 3), "a.jsonl")
    assert run(["data", str(path), "--base", str(tiny_base), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["examples"] == 3
    assert run(["data", str(tmp_path / "*.jsonl"), "--base", str(tiny_base)]) == 0
    assert run(["data", str(path)]) == 2
    assert "a.jsonl is a data file: name the base model with --base DIR" in capsys.readouterr().err
    folder = tmp_path / "a run"
    folder.mkdir()
    for name in ("manifest.json", "recipe.yaml"):
        (folder / name).write_text("{}")
    for arguments in (["data"], ["data", "--base", str(tiny_base)], ["tune"], ["tune", "--resume"], ["plan"]):
        assert run([*arguments, str(folder)]) == 2
        problem = capsys.readouterr().err
        assert problem.startswith(f"error: {folder}: is the folder of a run. Its recipe is {folder}/recipe.yaml, and ")
        assert f"`budwood tune '{folder}/recipe.yaml' --resume` resumes it." in problem
    listed = tmp_path / "a.json"
    listed.write_text(json.dumps(rows_of("a", 3)))
    assert run(["data", str(listed), "--base", str(tiny_base)]) == 0

"""Bad rows (refused, or skipped, counted and saved), equal rows, missing values in CSV, and class names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from budwood.cli.app import run
from budwood.data.build import build_examples
from budwood.data.examples import Examples
from budwood.errors import InputError
from budwood.recipe.schema import Recipe
from budwood.training.loop import tune

Make = Callable[..., Recipe]
GOOD = '{"prompt": "a", "completion": "b"}'
BAD = {
    "malformed": ('{"prompt": "a", ', "malformed JSON at column N"),
    "not an object": ('["a", "b"]', "each line must be one JSON object, not a list"),
    "null": ('{"prompt": "a", "completion": null}', "field 'completion' must be text, not null"),
    "missing": ('{"prompt": "a"}', "field 'completion' must be text, not missing"),
    "wrong type": ('{"prompt": "a", "completion": 7}', "field 'completion' must be text, not an int"),
    "weight": ('{"prompt": "a", "completion": "b", "weight": -1}', "field 'weight' must be N or a positive"),
    "NaN": ('{"prompt": "a", "completion": "b", "weight": NaN}', "malformed JSON: NaN is not JSON"),
    "not UTF-8": ('{"prompt": "caf\udce9", "completion": "b"}', "not UTF-8 (byte 0xe9"),
    "half a character": ('{"prompt": "\\ud83d", "completion": "b"}', "field 'prompt' has half a character"),
}


@pytest.fixture
def build(tmp_path: Path, byte_level: Any) -> Callable[..., Examples]:
    """Function `make(path, skip, task, template)` -> the examples of a file."""

    def make(path: Path, skip: bool = True, task: str = "causal-lm", template: str | None = None) -> Examples:
        return build_examples(
            path, byte_level(template=template), task, 64, cache_dir=tmp_path / "cache", skip_bad_rows=skip
        )

    return make


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_refused_or_skipped_and_kept(build: Any, tmp_path: Path, kind: str) -> None:
    line, reason = BAD[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n", encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=r"rows.jsonl:2"):
        build(path, skip=False)
    for _ in range(2):  # the second time from the cache
        examples = build(path)
        assert len(examples) == 2 and examples.stats.rows == 3
        ((counted, number),) = examples.stats.skipped.items()
        assert counted.startswith(reason) and number == 1
        ((where, why, _),) = examples.skipped
        assert where == f"{path}:2" and why
        assert "1 skipped (" in examples.describe() and "first at " in examples.describe()
        assert [examples.location(i) for i in (0, 1)] == [f"{path}:1", f"{path}:3"]
        assert examples.reference(1) == "b"
    assert examples.from_cache


def test_rows_of_one_kind_are_counted_together(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([GOOD, '{"prompt"', '{"prompt": 1', '{"prompt": "a", "completion": null}']) + "\n")
    stats = build(path).stats
    assert sum(stats.skipped.values()) == 3 and len(stats.skipped) == 3
    assert stats.first_skipped["field 'completion' must be text, not null"] == f"{path}:4"


def test_a_conversation_that_the_template_rejects(build: Any, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    path = tmp_path / "chat.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": "yes"}]}
        for word in ("good", "bad", "fine")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"chat.jsonl:2"):
        build(path, skip=False, template=template)
    examples = build(path, template=template)
    assert len(examples) == 2 and examples.skipped[0][0] == f"{path}:2"
    assert "no bad words" in examples.skipped[0][1] and examples.skipped[0][2] == rows[1]


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("a.csv", "prompt,completion\na,b\nc\nd,e\n", "3"),
        ("a.json", '[{"prompt": "a", "completion": "b"}, 7, {"prompt": "c", "completion": "d"}]', "row 2"),
    ],
)
def test_other_files(build: Any, tmp_path: Path, name: str, text: str, where: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    examples = build(path)
    assert len(examples) == 2 and examples.skipped[0][0] == f"{path}:{where}"
    assert examples.location(1) == f"{path}:{'row 3' if name.endswith('json') else '4'}"


def test_all_rows_bad_is_still_refused(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": null}\n' * 3)
    with pytest.raises(InputError, match="all of its 3 rows were dropped: field 'completion' must be text, not null 3"):
        build(path)


def test_a_run_writes_what_it_skipped(make_recipe: Make, tmp_path: Path, said: list[str]) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(f'{GOOD}\n{{"prompt": "a"}}\n{{"prom\n{GOOD}\n')
    recipe = make_recipe(data={"train": str(path), "eval": str(path), "on_bad_row": "skip"})
    finished = tune(recipe)
    rows = [json.loads(line) for line in (finished.directory / "skipped.jsonl").read_text().splitlines()]
    assert [row["where"] for row in rows] == [f"{path}:3", f"{path}:2"] * 2
    assert rows[0]["row"] == '{"prom' and rows[1]["row"] == {"prompt": "a"}
    assert rows[1]["reason"] == "field 'completion' must be text, not missing."
    assert any("2 skipped (" in line for line in said) and any("skipped.jsonl" in line for line in said)
    again = make_recipe(data={"train": str(path), "on_bad_row": "refuse"}, output="other")
    with pytest.raises(InputError, match="own.jsonl:3"):
        tune(again, quiet=True)


def test_the_data_report_counts_them(make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(f'{GOOD}\n{{"prompt": "a"}}\n{GOOD}\n{GOOD}\n')
    file = tmp_path / "recipe.yaml"
    file.write_text(make_recipe(data={"train": str(path), "on_bad_row": "skip"}).to_yaml())
    assert run(["data", str(file)]) == 0
    shown = capsys.readouterr().out
    assert f"skipped: 1 field 'completion' must be text, not missing (first {path}:2)" in shown
    assert "2 examples equal to an earlier one" in shown
    assert "3 of 4 rows" in shown


def test_equal_rows_are_counted(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{GOOD}\n{{"completion": "b", "prompt": "a"}}\n{{"prompt": "a", "completion": "c"}}\n')
    assert "1 examples equal to an earlier one" in build(path).describe()
    path.write_text(f"{GOOD}\n" * 500)
    assert build(path).stats.remarks == {"examples equal to an earlier one": 499}


def test_missing_values_of_csv_are_empty_fields(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "none.csv"
    path.write_text('prompt,completion\na,NaN\nb,NULL\nc,"null"\nd,None\ne,NA\nf,nan ok\ng,\n')
    examples = build(path, skip=False)
    assert [examples.reference(i) for i in range(len(examples))] == ["None", "NA", "nan ok"]
    assert examples.stats.dropped == {"empty completion": 4}
    assert "missing value: 1 NaN, 1 NULL, 1 null (as text, give them in JSONL)" in examples.describe()
    lines = tmp_path / "none.jsonl"
    lines.write_text('{"prompt": "a", "completion": "null"}\n')
    assert build(lines).reference(0) == "null"


def test_class_names_are_stripped_and_near_equal_ones_named(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("text,label\na,web\nb,Web\nc,web \nd,1\ne,1.0\nf,tea-cup\ng,Tea cup\nh,C\ni,C++\nj,-\n")
    examples = build(path, skip=False, task="sequence-classification")
    assert examples.labels == ["1", "-", "1.0", "C", "C++", "Tea cup", "Web", "tea-cup", "web"]
    names = [note.partition(": ")[2] for note in examples.notes]
    assert names == ["'1', '1.0'", "'Tea cup', 'tea-cup'", "'Web', 'web'"]
    assert all(note.startswith("nearly equal classes, trained as different ones") for note in examples.notes)

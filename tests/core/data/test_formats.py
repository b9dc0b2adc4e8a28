"""Data formats, and the tokens of rows: BOS once, EOS at the end, the prompt as in generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from budwood.contract.discovery import PluginError
from budwood.data.build import build_examples
from budwood.data.chat_formats import PromptCompletion
from budwood.data.encoder import Encoder, encode_prompt
from budwood.data.formats import Dropped, PlainText, TextLabel
from budwood.data.recognition import recognise
from budwood.data.text import Tokens, tokenise
from budwood.errors import InputError
from budwood.model.text_tasks import SequenceClassification

LM, CLASSIFY = "causal-lm", "sequence-classification"
MADE = "from budwood import DataFormat\nclass Made(DataFormat):\n    api = 2\n"


def encode(data_format: Any, row: dict[str, Any], tokenizer: Any, max_length: int = 512) -> Any:
    item, encoder = data_format.item(row, "train.jsonl:1"), Encoder(tokenizer, max_length)
    if isinstance(item, Dropped):
        return item
    if data_format.name == "text-label":
        return SequenceClassification().encode([item], ["train.jsonl:1"], encoder)[0]
    (tokens,) = tokenise([item], ["train.jsonl:1"], encoder)[0]
    return tokens


def texts(tokenizer: Any, row: Tokens) -> list[str]:
    return [tokenizer.decode(row.ids[start:stop]) for start, stop in row.spans]


@pytest.mark.parametrize(
    ("columns", "task", "name"),
    [
        (["completion", "id", "prompt"], LM, "prompt-completion"),
        (["messages", "prompt"], LM, "messages"),
        (["text"], LM, "text"),
        (["label", "text"], CLASSIFY, "text-label"),
    ],
)
def test_recognised_by_columns(columns: list[str], task: str, name: str) -> None:
    assert recognise(columns, task, "x").name == name


@pytest.mark.parametrize(
    ("columns", "task", "message"),
    [
        (
            ["completion", "replies"],
            LM,
            "'completion', 'replies' match no data format. .*prompt . completion lacks 'prompt'",
        ),
        (["txt"], LM, "Did you mean 'text'"),
        (["a"], LM, "Accepted: .*messages; .*prompt . completion; .*text\\."),
        (["messages", "prompt", "completion"], LM, "can be read as messages and as prompt . completion"),
        (["instruction", "output", "prompt", "completion"], LM, "can be read as"),
        (["text", "label"], LM, "base.task: sequence-classification, or remove 'label' to train on text alone"),
        (["text"], CLASSIFY, "data for causal-lm, but the task is sequence-classification.*or give text . label"),
        (["messages"], CLASSIFY, "Set base.task: causal-lm, or give text . label"),
    ],
)
def test_columns_that_match_no_format(columns: list[str], task: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        recognise(columns, task, "train.jsonl")
    assert str(caught.value).startswith("train.jsonl: ")


@pytest.mark.parametrize(
    "data_format", [PromptCompletion(), PlainText(), TextLabel()], ids=lambda data_format: data_format.name
)
@pytest.mark.parametrize("value", [None, 3, ["x"], {"a": 1}, True], ids=repr)
def test_fields_that_are_not_text(data_format: Any, value: Any, byte_level: Any) -> None:
    for field in data_format.columns:
        if field == "label" and value == 3 and value is not True:
            continue  # an integer is a valid class name
        row = {name: "x" for name in data_format.columns} | {field: value}
        with pytest.raises(InputError, match=f"^train.jsonl:1: field '{field}' must be text"):
            encode(data_format, row, byte_level())
        del row[field]
        with pytest.raises(InputError, match=f"^train.jsonl:1: field '{field}' must be text.*, not missing"):
            encode(data_format, row, byte_level())


def test_half_a_character_is_refused(byte_level: Any) -> None:
    with pytest.raises(InputError, match="^train.jsonl:1: field 'text' has half a character"):
        encode(PlainText(), {"text": "x\ud800"}, byte_level())


@pytest.mark.parametrize("bos", [True, False])
def test_prompt_and_completion(byte_level: Any, bos: bool) -> None:
    tokenizer = byte_level(bos)
    row = encode(PromptCompletion(), {"prompt": "Question: yes?\nAnswer:", "completion": " yes"}, tokenizer)
    assert tokenizer.decode(row.ids) == "<s>" * bos + "Question: yes?\nAnswer: yes</s>"
    assert texts(tokenizer, row) == [" yes</s>"]
    assert row.ids[: row.spans[0][0]] == encode_prompt(tokenizer, "Question: yes?\nAnswer:")
    assert row.ids[:-1] == encode_prompt(tokenizer, "Question: yes?\nAnswer: yes")


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("Question: hel", "lo there"), ("Answer: ", "yes"), ("maybe\n", "\nyes"), ("éa", "\u0301b")],
)
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_no_token_crosses_the_start_of_the_completion(
    request: pytest.FixtureRequest, kind: str, prompt: str, completion: str
) -> None:
    made = request.getfixturevalue(kind)
    tokenizer = made() if kind == "byte_level" else made
    row = encode(PromptCompletion(), {"prompt": prompt, "completion": completion}, tokenizer)
    assert row.ids[: row.spans[0][0]] == encode_prompt(tokenizer, prompt)
    assert tokenizer.decode(row.ids[1:-1]) == prompt + completion


def test_a_token_across_the_boundary_is_reported(byte_level: Any) -> None:
    encoder = Encoder(byte_level(), 99)
    joined = encoder.plain(["hello"])[0]
    assert len(joined) < len(encoder.plain(["hel"])[0]) + len(encoder.plain(["lo"])[0])  # a token crosses the boundary
    rows = [{"prompt": "hel", "completion": "lo"}, {"prompt": "hello", "completion": " there"}]
    tokenise([PromptCompletion().item(row, "a:1") for row in rows], ["a:1", "a:2"], encoder)
    assert list(encoder.remarks.values()) == [1]


def test_no_space_before_a_continuation(sentencepiece: Any) -> None:
    """The tokenizer adds a space before every text, which would be wrong inside a text."""
    assert sentencepiece.decode(sentencepiece("lo", add_special_tokens=False)["input_ids"][:1]) == ""
    row = encode(PromptCompletion(), {"prompt": "hel", "completion": "lo"}, sentencepiece)
    assert sentencepiece.decode(row.ids, skip_special_tokens=True) == "hello"


@pytest.mark.parametrize("data_format", [PromptCompletion(), PlainText()], ids=lambda data_format: data_format.name)
def test_bos_and_eos_occur_once(data_format: Any, byte_level: Any) -> None:
    tokenizer = byte_level(bos=True)
    row = {"prompt": "<s>Question:", "completion": " yes</s>", "text": "<s>Question: yes</s>"}
    encoded = encode(data_format, row, tokenizer)
    assert tokenizer.decode(encoded.ids) == "<s>Question: yes</s>"
    assert encoded.ids.count(tokenizer.bos_token_id) == 1
    assert encode_prompt(tokenizer, "<s>Question:").count(tokenizer.bos_token_id) == 1
    assert encoded.spans[-1][1] == len(encoded.ids)


@pytest.mark.parametrize("bos", [True, False])
def test_text(byte_level: Any, bos: bool) -> None:
    tokenizer = byte_level(bos)
    row = encode(PlainText(), {"text": "Hello there"}, tokenizer)
    assert tokenizer.decode(row.ids) == "<s>" * bos + "Hello there</s>"
    assert row.spans == [(1, len(row.ids))]


@pytest.mark.parametrize(
    ("data_format", "row", "reason"),
    [
        (PromptCompletion(), {"prompt": "x", "completion": ""}, "empty completion"),
        (PromptCompletion(), {"prompt": "x", "completion": " \n"}, "empty completion"),
        (PromptCompletion(), {"prompt": "", "completion": "x"}, "empty prompt"),
        (PlainText(), {"text": " \t"}, "empty text"),
        (TextLabel(), {"text": "", "label": "a"}, "empty text"),
        (TextLabel(), {"text": "x", "label": " "}, "empty label"),
    ],
)
def test_empty_rows_are_dropped(data_format: Any, row: dict[str, str], reason: str, byte_level: Any) -> None:
    assert encode(data_format, row, byte_level()) == Dropped(reason)


def test_a_tokenizer_without_an_end_token(byte_level: Any) -> None:
    with pytest.raises(InputError, match="no end-of-sequence token.*tokenizer_config.json"):
        encode(PlainText(), {"text": "x"}, byte_level(eos=None))


def test_classification_keeps_the_tokenizers_special_tokens(word_piece: Any, byte_level: Any) -> None:
    text = "hello there how are you " * 10
    encoded = encode(TextLabel(), {"text": text, "label": "a"}, word_piece, max_length=8)
    (row,) = encoded.examples
    ids = row.inputs["input_ids"].tolist()
    assert len(ids) == 8
    assert encoded.cut > 0
    assert [ids[0], ids[-1]] == [2, 3]
    assert row.label_positions.tolist() == [7]
    short = encode(TextLabel(), {"text": "hello", "label": 7}, word_piece, max_length=8)
    assert (short.cut, short.examples[0].labels.tolist()) == (0, [0])
    tokenizer = byte_level(bos=True)
    (row,) = encode(TextLabel(), {"text": "<s>hello", "label": "a"}, tokenizer).examples
    assert row.inputs["input_ids"].tolist().count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "two", True])
@pytest.mark.parametrize(
    "data_format", [PromptCompletion(), PlainText(), TextLabel()], ids=lambda data_format: data_format.name
)
def test_invalid_weights(data_format: Any, weight: Any) -> None:
    row = dict.fromkeys(data_format.columns, "x")
    with pytest.raises(InputError, match="^train.jsonl:1: field 'weight' must be 0 or a positive fp32 number"):
        data_format.item({**row, "weight": weight}, "train.jsonl:1")
    assert data_format.item({**row, "weight": 0}, "train.jsonl:1") == Dropped("weight 0")
    assert data_format.item({**row, "weight": 2}, "train.jsonl:1").weight == 2.0


def install_format(folder: Path, name: str, source: str) -> None:
    (folder / f"{name}_form.py").write_text(source)
    info = folder / f"{name}_form-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-format\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[budwood.formats]\n{name} = {name}_form:Made\n")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('good')", "item: KeyError: 'good'. Report it to its author"),
    ],
)
def test_an_error_in_a_third_party_format_names_it(body, message, byte_level, tmp_path, distribution):
    source = MADE + "    name = 'pairs'\n    columns = ('good', 'bad')\n"
    source += f"    tasks = ('causal-lm',)\n    def item(self, row, where):\n        {body}\n"
    distribution("pairs-format", source, {"pairs": "Made"}, "budwood.formats", "1.2")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"good": "a", "bad": "b"}\n')
    with pytest.raises(PluginError) as error:
        build_examples(rows, byte_level(), LM, 64)
    assert str(error.value).startswith(f"data format 'pairs' (pairs-format 1.2), {message}")


def test_third_party_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third-party format is recognised by its columns; a broken one only matters if no other format matches."""
    source = MADE + "    name = 'pairs'\n    columns = ('good', 'bad')\n"
    install_format(tmp_path, "pairs", source + "    tasks = ('causal-lm',)\n")
    install_format(tmp_path, "broken", "import no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert recognise(["bad", "good"], LM, "x").name == "pairs"
    assert recognise(["text"], LM, "x").name == "text"
    with pytest.raises(InputError, match="good . bad; .*plugin 'broken' of broken-format 1.2.*cannot be imported"):
        recognise(["good"], LM, "x")
    install_format(tmp_path, "odd", "class Made: pass\n")
    install_format(tmp_path, "partial", MADE + "    name = 'x'\n")
    assert recognise(["text"], LM, "x").name == "text"
    with pytest.raises(
        InputError, match="'odd' of odd-format 1.2: odd_form:Made is not a subclass of budwood.DataFormat"
    ):
        recognise(["good"], LM, "x")
    with pytest.raises(InputError, match="data format 'partial' of partial-format 1.2: .* does not declare 'columns'"):
        recognise(["good"], LM, "x")

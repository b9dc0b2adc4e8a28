"""The tasks of plugins/text: their examples, metrics and answers, complete runs, and what they refuse."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from budwood import Generator, InputError, tune
from budwood.cli.app import run as command
from budwood.contract.loading import build_task
from budwood.data.build import build_examples
from budwood.model.checks import load_tokenizer
from budwood.planning.composition import plan
from budwood.recipe.schema import Recipe
from budwood.testing import tiny_decoder, tiny_encoder
from budwood.training import setup
from budwood.training.report import Report

WORDS = "alice bob paris rome walks to from sees in today".split()  # noqa: SIM905
PEOPLE, PLACES = WORDS[:2], WORDS[2:4]


def sentences(count: int, seed: int) -> list[list[str]]:
    draw = np.random.default_rng(seed)
    return [
        [PEOPLE[draw.integers(2)], WORDS[draw.integers(4, 9)], PLACES[draw.integers(2)], "today"] for _ in range(count)
    ]


def tag(word: str) -> str:
    return "B-PER" if word in PEOPLE else "B-LOC" if word in PLACES else "O"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    tiny_encoder(folder / "base", WORDS)
    tiny_decoder(folder / "decoder")
    shutil.copytree(folder / "base", folder / "headless")
    stored = load_file(folder / "base" / "model.safetensors")
    body = {name: tensor for name, tensor in stored.items() if not name.startswith("cls.")}
    save_file(body, folder / "headless" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(folder / "decoder", folder / "t5")
    (folder / "t5" / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    rows: dict[str, Callable[[list[str]], dict[str, Any]]] = {
        "tags": lambda words: {"tokens": words, "tags": [tag(word) for word in words]},
        "score": lambda words: {
            "text": " ".join(words),
            "score": float(words[0] == "alice") - 2 * (words[2] == "rome"),
        },
        "text": lambda words: {"text": " ".join(words)},
    }
    for name, row in rows.items():
        for part, count, seed in (("train", 48, 0), ("eval", 16, 1)):
            lines = [json.dumps(row(words)) for words in sentences(count, seed)]
            (folder / f"{name}-{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def recipe_of(folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(task: str, data: str, *others: Any, base: str = "base", **changes: Any) -> Recipe:
        train = {
            "steps": 30, "batch_examples": 8, "micro_tokens": 64, "learning_rate": 2e-2, "precision": "fp32",
            "schedule": "constant", "warmup": 0, **changes.pop("train", {}),
        }  # fmt: skip
        files = {"train": str(folder / f"{data}-train.jsonl"), "eval": str(folder / f"{data}-eval.jsonl")}
        return Recipe.from_dict(
            {
                "base": {"model": str(folder / base), "quantization": "none", "task": task, **changes.pop("base_", {})},
                "data": {**files, "max_length": 32, **changes.pop("data_", {})},
                "strategies": [{"lora": {"rank": 4}}, *others],
                "train": train,
                "output": str(tmp_path / changes.pop("output", "run")),
            }
        )

    return make


def answer(folder: Path, run: Any, text: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `budwood generate --json` prints for a text."""
    capsys.readouterr()
    arguments = ["generate", str(folder / "base"), "--adapter", f"a={run.directory / 'adapter'}", "--prompt", text]
    assert command([*arguments, "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)["answers"]
    assert command(arguments) == 0
    assert capsys.readouterr().out.startswith("a: ")
    return found


def test_words_are_tagged_at_their_first_tokens(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder / "base")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"tokens": ["alice", "unknown", "rome"], "tags": ["B-PER", "O", "B-LOC"]}\n')
    [example] = build_examples(path, tokenizer, "token-classification", 32)
    tokens = tokenizer.convert_ids_to_tokens(example.inputs["input_ids"].tolist())
    assert [tokens[at] for at in example.label_positions] == ["alice", "u", "rome"]
    rows = [
        {"text": "alice sees new rome.", "spans": [{"start": 11, "end": 19, "label": "LOC"}]},
        {"text": "rome", "spans": [{"start": 0, "end": 4, "label": "LOC"}]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cut, _ = build_examples(path, tokenizer, "token-classification", 4)
    assert cut.inputs["input_ids"].tolist()[-1] == tokenizer.sep_token_id and cut.label_positions.tolist() == [1, 2]
    examples = build_examples(path, tokenizer, "token-classification", 32)
    assert [examples.labels[label] for label in examples[0].labels] == ["O", "O", "B-LOC", "I-LOC", "O"]


def test_entities_are_learned_measured_and_answered(
    recipe_of: Callable[..., Recipe], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tune(
        recipe_of("token-classification", "tags", {"adversarial": {"method": "fgm", "epsilon": 0.1}}), quiet=True
    )
    assert run.metrics["eval_entity_f1"] > 0.9 > run.before["eval_entity_f1"]
    assert run.metrics["eval_accuracy"] > 0.9 and "PER" in run.task.report
    found = answer(folder, run, "bob walks paris today", capsys)
    assert found["tokens"] == ["bob", "walks", "paris", "today"]
    assert {"start": 10, "end": 15, "label": "LOC", "text": "paris"} in found["entities"]


@pytest.mark.parametrize(
    ("task", "data", "epochs"), [("token-classification", "tags", 20), ("sequence-regression", "score", 10)]
)
def test_only_an_encoder_that_learns_classes_trains_twice_as_long_by_default(
    recipe_of: Callable[..., Recipe], task: str, data: str, epochs: int
) -> None:
    recipe = recipe_of(task, data, train={"steps": None, "batch_examples": None})
    run, _, _ = setup.prepare(recipe, Report(quiet=True), False)
    assert (run.recipe.train.batch_examples, run.recipe.train.epochs) == (4, epochs)


def test_the_f1_of_entities_is_that_of_sets_of_spans(folder: Path) -> None:
    """Against the definition: an entity is right if type, start and end are; I- after nothing begins one."""
    task = build_task("token-classification", {})
    names = ["B-A", "B-B", "I-A", "I-B", "O", "B-C"]  # of C, there is none among those held out
    draw = np.random.default_rng(0)
    sizes = [5, 3, 7, 1, 6]
    truth, predicted = (draw.choice(5, sum(sizes), p=[0.2, 0.15, 0.2, 0.15, 0.3]) for _ in range(2))

    def spans(values: np.ndarray) -> set[tuple[int, int, int, str]]:
        found, at = set(), 0
        for number, size in enumerate(sizes):
            tags = [names[i] for i in values[at : at + size]] + ["O"]
            at += size
            start = None
            for place, tag in enumerate(tags):
                ends = start is not None and (tag[0] != "I" or tag[2:] != tags[start][2:])
                if ends:
                    found.add((number, start, place, tags[start][2:]))
                    start = None
                if start is None and tag != "O":
                    start = place
        return found

    class Totals:
        pairs = list(zip(truth.tolist(), predicted.tolist(), strict=True))

    Totals.sizes = sizes

    class Run:
        class examples:
            labels = names

    expected, actual = spans(truth), spans(predicted)
    right = len(expected & actual)
    metrics = task.metrics(Run, Totals)
    precision, recall = right / len(actual), right / len(expected)
    assert right > 0 and metrics["eval_entity_precision"] == pytest.approx(precision)
    assert metrics["eval_entity_recall"] == pytest.approx(recall)
    assert metrics["eval_entity_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert [line.split()[0] for line in task.report.splitlines()[1:]] == ["A", "B", "all"]


def test_numbers_are_learned_measured_and_answered(
    recipe_of: Callable[..., Recipe], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tune(recipe_of("sequence-regression", "score", train={"steps": 60, "learning_rate": 5e-3}), quiet=True)
    assert run.metrics["eval_r2"] > 0.9 and run.metrics["eval_spearman"] > 0.8
    assert run.metrics["eval_loss"] < 0.1 < run.before["eval_loss"]
    assert answer(folder, run, "alice sees rome today", capsys)["score"] == pytest.approx(-1, abs=0.5)


def test_masks_are_new_in_each_epoch_and_cover_whole_words(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder / "base")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "unknown walks abc from strange rome in paris today xyz"}) + "\n")
    for whole in (True, False):
        task = build_task("masked-lm", {"share": 0.3, "whole_words": whole})
        task.read_base(folder / "base")
        [example] = build_examples(path, tokenizer, task, 64)
        ids = example.inputs["input_ids"]
        words = example.columns["word"].values
        seen, masked, kept, total = set(), 0, 0, 0
        for epoch in range(300):
            varied = task.vary(example, Generator(0, epoch, example.key))
            again = task.vary(example, Generator(0, epoch, example.key))
            assert np.array_equal(varied.inputs["input_ids"], again.inputs["input_ids"])
            at = varied.label_positions
            assert np.array_equal(varied.labels, ids[at]) and len(varied.weights) == len(at)
            untouched = np.setdiff1d(np.arange(len(ids)), at)
            assert np.array_equal(varied.inputs["input_ids"][untouched], ids[untouched])
            if whole:
                assert len(np.unique(words[at])) == 3 == round(0.3 * 10)
                assert all(np.isin(np.flatnonzero(words == word), at).all() for word in words[at])
            else:
                assert len(at) == round(0.3 * len(example.label_positions))
            seen.add(tuple(at))
            masked += int((varied.inputs["input_ids"][at] == tokenizer.mask_token_id).sum())
            kept += int((varied.inputs["input_ids"][at] == ids[at]).sum())
            total += len(at)
        assert len(seen) > 50
        spread = 4 * math.sqrt(0.25 / total)  # four standard deviations, at most
        assert abs(masked / total - 0.8) < spread and abs(kept / total - 0.1) < spread


def test_masked_tokens_are_learned_and_filled(
    recipe_of: Callable[..., Recipe], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"base_": {"task_options": {"share": 0.3}}}
    recipe = recipe_of("masked-lm", "text", "label-smoothing", train={"steps": 40}, **options)
    run = tune(recipe, quiet=True)
    assert run.metrics["eval_loss"] < run.before["eval_loss"] - 1
    capsys.readouterr()
    assert command(["eval", str(run.directory / "adapter"), "--data", str(folder / "text-eval.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapter"]["eval_loss"] == run.metrics["eval_loss"], "fixed masks"
    found = answer(folder, run, "alice sees rome [MASK]", capsys)
    assert found["masks"][0][0]["token"] == "today" and found["text"] == "alice sees rome today"
    recipe_file = run.directory / "recipe.yaml"
    assert command(["data", str(recipe_file), "--json"]) == 0
    assert "[MASK]=" in capsys.readouterr().out


def test_rows_and_bases_that_cannot_be_used_are_refused_before_the_base_loads(
    recipe_of: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "load_base", lambda *_: pytest.fail("the base loads"))

    def refused(task: str, rows: list[dict[str, Any]], message: str, *others: Any, **changes: Any) -> None:
        path = tmp_path / "bad.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = recipe_of(task, "text", *others, data_={"train": str(path), "eval": "none"}, **changes)
        with pytest.raises(InputError, match=message) as error:
            tune(recipe, quiet=True, overwrite=True)
        assert "\n" not in str(error.value)

    tags, text = "token-classification", "alice sees rome"
    refused(tags, [{"tokens": ["a", "b"], "tags": ["O"]}], "bad.jsonl:1: 2 tokens but 1 tag")
    refused(tags, [{"tokens": ["a", ""], "tags": ["O", "O"]}], "token 2 must be text that is not empty")
    refused(
        tags, [{"text": text, "spans": [{"start": 1, "end": 5, "label": "P"}]}], "span 1, 'lice', begins or ends inside"
    )
    refused(tags, [{"text": text, "spans": [[0, 50, "P"]]}], "span 1, 0–50, is not inside the text of 15 characters")
    refused(tags, [{"text": text, "spans": [[0, 5, "P"], [0, 10, "Q"]]}], "span 2, 'alice sees', overlaps another")
    refused(
        "sequence-regression", [{"text": "a", "score": "high"}], "field 'score' must be a finite number, not 'high'"
    )
    refused(
        "sequence-regression", [{"text": "a", "score": 1}] * 8, "has no distribution over tokens or classes", "entropy"
    )
    refused("masked-lm", [{"text": text}], "has no mask token, so masked-lm cannot train it", base="decoder")
    refused("masked-lm", [{"text": text}], "masked-lm.share: .*greater than 0", base_={"task_options": {"share": 0}})
    refused("masked-lm", [{"text": text}], "exceed 1 together", base_={"task_options": {"masked": 0.9, "random": 0.2}})
    refused("masked-lm", [{"text": text}], "so nothing is masked", base_={"task_options": {"masked": 0, "random": 0}})
    no_head = "its checkpoint has no 'cls', the head that AutoModelForMaskedLM predicts tokens with: take a base"
    refused("masked-lm", [{"text": text}], no_head, base="headless")
    assert any(no_head in problem for problem in plan(recipe_of("masked-lm", "text", base="headless")).problems)
    labelled = [{"text": text, "label": "a"}, {"text": text, "label": "b"}]
    no_classifier = "'t5' is an encoder-decoder, which has no classifier for one text"
    refused("sequence-classification", labelled, no_classifier, base="t5")
    refused(tags, [{"text": text}], "text is data for causal-lm, but the task is token-classification")


def test_scores_and_spans_beside_text_are_metadata_of_other_tasks(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "alice", "score": 3, "spans": []}\n' * 2)
    tokenizer = load_tokenizer(folder / "decoder")
    assert build_examples(path, tokenizer, "causal-lm", 64).format == "text"
    assert build_examples(path, tokenizer, "sequence-regression", 64).format == "text-score"


def test_labels_unseen_in_training_are_refused(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text('{"tokens": ["alice"], "tags": ["B-ORG"]}\n')
    with pytest.raises(InputError, match="eval.jsonl:1: label 'B-ORG' is not in the training data"):
        tune(recipe_of("token-classification", "tags", data_={"eval": str(path)}), quiet=True)

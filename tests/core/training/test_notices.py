"""What a run points out: an unused chat template, and a loss that hardly moved."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from budwood.adapters.manifest import Manifest
from budwood.adapters.store import read_adapter
from budwood.cli.app import run as command
from budwood.contract.types import Run
from budwood.data.build import build_examples
from budwood.errors import InputError
from budwood.model.text_tasks import SequenceClassification
from budwood.recipe.schema import Recipe
from budwood.training.evaluate import evaluate_adapter
from budwood.training.loop import tune

Make = Callable[..., Recipe]
UNUSED = "note: the base has a chat template, but prompts and answers are trained on as plain text"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def messages(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


def manifest(run: Run) -> Manifest:
    found = read_adapter(run.directory / "adapter").manifest
    assert found is not None
    return found


def test_as_chat_is_exactly_the_messages_with_their_masking(tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    pairs = [(f" the question {i}: ", f" answer {i}\n") for i in range(4)]
    plain = write(tmp_path / "plain.jsonl", [{"prompt": p, "completion": c, "weight": 0.5} for p, c in pairs])
    chat = write(tmp_path / "chat.jsonl", [{**messages(p.strip(), c.strip()), "weight": 0.5} for p, c in pairs])
    rendered = build_examples(plain, tokenizer, "causal-lm", 128, as_chat=True)
    expected = build_examples(chat, tokenizer, "causal-lm", 128)
    assert rendered.rendered and rendered.stop_ids == expected.stop_ids
    for one, other in zip(rendered, expected, strict=True):
        assert one.inputs["input_ids"].tolist() == other.inputs["input_ids"].tolist()
        assert one.label_positions.tolist() == other.label_positions.tolist()
        assert one.weights.tolist() == other.weights.tolist()
    again = build_examples(plain, tokenizer, "causal-lm", 128)
    assert not again.rendered, "the cache tells them apart"
    assert build_examples(plain, tokenizer, "causal-lm", 128, as_chat=True).from_cache


def test_an_unused_chat_template_is_noticed(
    make_recipe: Make, tiny_bases: Any, said: list[str], tmp_path: Path
) -> None:
    train = {"steps": 1}
    tune(make_recipe(train=train))
    assert sum(line.startswith(UNUSED) and "data.as_chat: true" in line for line in said) == 1
    said.clear()
    tune(make_recipe("chat", data={"as_chat": True}, train=train))
    tune(make_recipe("text", data={"train": write(tmp_path / "text.jsonl", [{"text": "a b c"}] * 9)}, train=train))
    plain = tiny_bases("no template")
    for name in ("chat_template.jinja",):
        (plain / name).unlink(missing_ok=True)
    tune(make_recipe("plain", base={"model": str(plain)}, train=train))
    assert not any(line.startswith(UNUSED) for line in said)


def test_as_chat_on_messages_is_refused(make_recipe: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "chat.jsonl", [messages("a", "b")])
    with pytest.raises(InputError, match="data.as_chat: renders prompts and their answers, but .* messages"):
        tune(make_recipe(data={"train": path, "as_chat": True}), quiet=True)


def test_an_adapter_remembers_whether_it_was_trained_on_messages(
    make_recipe: Make, said: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    chat = tune(make_recipe("chat", evaluate=True, data={"as_chat": True}, train={"eval_generate": 2}))
    assert manifest(chat).on_messages is True and "--chat --prompt" in said[-1]
    again = evaluate_adapter(chat.directory / "adapter", Path(str(chat.recipe.data.eval)), quiet=True)
    assert again.adapter["eval_loss"] == chat.metrics["eval_loss"]
    plain = tune(make_recipe("plain"))
    assert manifest(plain).on_messages is False and not any("--chat" in line for line in said[-2:])
    base = str(chat.recipe.base.model)
    chosen = {"chat": chat, "plain": plain}

    @functools.cache
    def answer(name: str, *flags: str) -> tuple[str, str]:
        line = ["generate", base, "--adapter", f"{name}={chosen[name].directory / 'adapter'}"]
        assert command([*line, "--prompt", "games", "--max-new-tokens", "4", *flags]) == 0
        output = capsys.readouterr()
        return output.out, output.err

    assert answer("chat")[0] == answer("chat", "--chat")[0]
    assert "note: adapter 'chat' was trained on messages" in answer("chat")[1]
    assert answer("chat", "--chat")[1] == answer("plain", "--no-chat")[1] == answer("plain")[1] == ""
    assert "warning: adapter 'chat' was trained on messages, but --no-chat" in answer("chat", "--no-chat")[1]
    assert "warning: adapter 'plain' was trained on plain text, but --chat" in answer("plain", "--chat")[1]
    assert not [record for record in caplog.records if record.name == "budwood.pool"], "nothing is said twice"


@pytest.mark.parametrize(
    ("rows", "measured"),
    [
        ([messages("games", "fun")] * 8, True),
        ([messages("games", "fun", "fonts", "letters")] * 8, False),
        ([messages("games", " ".join(["fun"] * 90))] * 8, False),
        ([{"instruction": "games", "output": "fun"}] * 8, True),
    ],
    ids=["one turn", "two turns", "long answers", "alpaca"],
)
def test_exact_match_of_messages(make_recipe: Make, tmp_path: Path, rows: list[Any], measured: bool) -> None:
    path = write(tmp_path / "chat.jsonl", rows)
    train = {"steps": 20 if measured else 1, "eval_generate": 3}
    recipe = make_recipe(data={"train": path, "eval": path, "max_length": 300}, train=train)
    run = tune(recipe, quiet=True)
    assert ("eval_exact_match" in run.metrics) == measured
    if measured:
        assert run.before["eval_exact_match"] == 0 and run.metrics["eval_exact_match"] == 1


def test_one_long_conversation_leaves_the_exact_match_of_the_others(
    make_recipe: Make, tmp_path: Path, said: list[str]
) -> None:
    rows = [messages("games", "fun")] * 7 + [messages("games", "fun", "fonts", " ".join(["letters"] * 40))]
    path = write(tmp_path / "chat.jsonl", rows)
    recipe = make_recipe(
        data={"train": path, "eval": path, "max_length": 300}, train={"steps": 4, "eval_every": 2, "eval_generate": 100}
    )
    run = tune(recipe)
    assert "eval_exact_match" in run.before and "eval_exact_match" in run.metrics
    assert [line for line in said if line.startswith("note: exact match")] == [
        "note: exact match is measured on 7 of 8 prompts: the other conversations have more than one answer, or the "
        "chat template adds words"
    ]


@pytest.mark.parametrize("evaluate", [True, False])
def test_a_run_that_hardly_learned_ends_with_what_to_change(make_recipe: Make, said: list[str], evaluate: bool) -> None:
    tune(make_recipe(evaluate=evaluate, train={"learning_rate": 1e-7, "steps": 8}))
    assert said[-1].startswith("note: the loss ") and "train.learning_rate (now 1e-07)" in said[-1]
    assert "train.steps (now 8)" in said[-1] or "rose" in said[-1]
    said.clear()
    tune(make_recipe("learned", evaluate=evaluate, train={"learning_rate": 1e-2, "steps": 16}))
    assert not any(line.startswith("note: the loss ") for line in said)


def test_rows_that_are_learned_by_heart_are_not_to_be_learned_faster(
    make_recipe: Make, tmp_path: Path, said: list[str]
) -> None:
    """The rows of evaluation have the other label, so their loss rises while that of the training rows falls."""
    pairs = (("games", "a", "b"), ("fonts", "b", "a"))
    rows = [[{"text": text, "label": pair[i]} for text, *pair in pairs for _ in range(8)] for i in range(2)]
    train, held = (write(tmp_path / f"{name}.jsonl", part) for name, part in zip(("own", "held"), rows, strict=True))
    tune(
        make_recipe(
            base={"task": "sequence-classification"}, data={"train": train, "eval": held},
            train={"steps": 30, "batch_examples": 16, "micro_tokens": 2048},
        )
    )  # fmt: skip
    assert said[-1].startswith("note: the loss rose (") and "so they were learned by heart" in said[-1]
    assert said[-1].endswith(": raise the number of rows (now 16), or lower train.steps (now 30)")


def classes_recipe(make_recipe: Make, tmp_path: Path, rows: list[dict[str, Any]], evaluate: bool) -> Recipe:
    """Return a recipe of 30 steps that classifies rows, all of them in each step."""
    path = write(tmp_path / "classes.jsonl", rows)
    return make_recipe(
        base={"task": "sequence-classification"}, data={"train": path, "eval": path if evaluate else "none"},
        train={"steps": 30, "batch_examples": len(rows), "micro_tokens": 2048},
    )  # fmt: skip


@pytest.mark.parametrize("evaluate", [True, False])
def test_a_classifier_that_gives_every_row_the_same_is_noticed(
    make_recipe: Make, tmp_path: Path, said: list[str], evaluate: bool
) -> None:
    """Equal texts allow nothing else; the weights decide which class is the most frequent, and one occurs once."""
    counts = (("a", 0.5, 24), ("b", 1.0, 5), ("once", 1.0, 1))
    rows = [{"text": "games", "label": name, "weight": weight} for name, weight, count in counts for _ in range(count)]
    run = tune(classes_recipe(make_recipe, tmp_path, rows, evaluate))
    remedy = "raise train.steps (now 30) and the number of rows (now 30), or change train.learning_rate (now 0.01)"
    if evaluate:
        assert run.metrics["eval_loss"] < 0.95 * run.before["eval_loss"], "by the rule of all tasks, it has learned"
        what = "the accuracy (0.6667) is no better than always giving the most frequent class (0.6667)"
        assert said[-1] == f"note: {what}: {remedy}"
    else:
        assert said[-1].startswith("note: the loss (0.") and said[-1].endswith(
            f"frequencies of the classes (0.7867): {remedy}"
        )


@pytest.mark.parametrize("evaluate", [True, False])
def test_a_classifier_that_uses_its_texts_gets_no_note(
    make_recipe: Make, tmp_path: Path, said: list[str], evaluate: bool
) -> None:
    rows = [
        {"text": f"{name} number {i}", "label": name} for name, n in (("games", 20), ("fonts", 4)) for i in range(n)
    ]
    tune(classes_recipe(make_recipe, tmp_path, rows, evaluate))
    assert not any(line.startswith(("note: the loss", "note: the accuracy")) for line in said)


@pytest.mark.parametrize(("accuracy", "loss", "noted"), [(0.6, 0.66, True), (0.9, 0.66, False), (0.6, 0.5, False)])
def test_a_loss_or_an_accuracy_better_than_the_frequencies_is_learning(
    make_recipe: Make, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch,
    accuracy: float, loss: float, noted: bool,
) -> None:  # fmt: skip
    """Of 6 and 4 rows, whose frequencies give 0.673 nats: an overconfident classifier, and one that ranks well."""
    losses = iter([0.9, loss])

    def measure(self: Any, run: Run, noise: Any = None) -> dict[str, float]:
        return {"eval_loss": next(losses), "eval_accuracy": accuracy}

    monkeypatch.setattr(SequenceClassification, "measure", measure)
    rows = [{"text": f"thing {i}", "label": "ab"[i % 5 < 2]} for i in range(10)]
    tune(classes_recipe(make_recipe, tmp_path, rows, True))
    assert said[-1].startswith("note: the accuracy (0.6000)") == noted

"""Examples, weights and batches that cannot be trained on: each gives one line that names the plugin, hook or row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from tests.core.training.misuse import LORA, WHO, Make, mine

from budwood import tune
from budwood.errors import InputError, ResourceError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dataclasses.replace(batch, weights=batch.weights * 2)", "of 'label', not"),
        ("batch.weights.mul_(2) is None or batch", "of 'label', not"),
        ("setattr(batch, 'weights', batch.weights * 2) or batch", "of 'label', not"),
        ("setattr(batch, 'keys', batch.keys[:-1]) or batch", "now counts 7 of 'example', not 8"),
        ("dataclasses.replace(batch, groups=((0, 8),))", "now counts 1 of 'group', not 8"),
        ("dataclasses.replace(batch, labels=batch.labels[:5])", "now counts 5 of 'labels', not"),
        ("batch.weights.fill_(float('nan')) is None or batch", "now counts nan of 'label', not"),
    ],
)
def test_prepare_batch_may_not_change_the_counts(refused: Callable, change: str, message: str) -> None:
    line = refused(f"@hookimpl\ndef prepare_batch(self, run, batch):\n    return {change}")
    assert line.startswith(f"{WHO}, hook prepare_batch: the batch now counts ") and message in line
    assert "change the examples in prepare_examples" in line


def test_prepare_batch_may_change_everything_else(distribution: Callable, make_recipe: Make) -> None:
    body = """
        @hookimpl
        def prepare_batch(self, run, batch):
            batch.columns["more"] = torch.ones(len(batch.keys))
            weights = batch.weights.clone()
            return dataclasses.replace(batch, weights=weights, labels=batch.labels.clone())
    """
    distribution("sprout", mine(dedent(body)), {"mine": "Mine"})
    changed = tune(make_recipe("changed", strategies=[LORA, "mine"]), quiet=True)
    plain = tune(make_recipe("plain", strategies=[LORA]), quiet=True)
    assert changed.metrics["loss"] == plain.metrics["loss"]


EXAMPLE = "Example({inputs}, np.array([0]), np.array([{label}]), np.array([{weight}], dtype=np.float32), key=99, row=3)"


def prepare(example: str) -> str:
    return f"@hookimpl\ndef prepare_examples(self, run, examples):\n    return [*examples, {example}]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": "-1"}, "a label's weight must be finite and above 0, not -1"),
        ({"weight": "0"}, "a label's weight must be finite and above 0, not 0; leave out labels of weight 0"),
        ({"weight": "float('nan')"}, "a label's weight must be finite and above 0, not nan"),
        ({"weight": "1e39"}, "a label's weight must be finite and above 0, not inf"),
        ({"inputs": "{'input_ids': np.zeros(0)}"}, "an example's inputs must be non-empty arrays"),
    ],
)
def test_an_invalid_example_names_its_strategy(refused: Callable, change: dict[str, str], message: str) -> None:
    values = {"inputs": "{'input_ids': np.array([5, 6], dtype=np.int32)}", "label": "6", "weight": "1", **change}
    line = refused(prepare(EXAMPLE.format(**values)), InputError)
    assert line.startswith(f"{WHO}, hook prepare_examples: ") and "train.jsonl:4: " in line and message in line


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("np.float32(0.5)", "column 'x' must be a Column, such as Column(values, axis=\"input\"), not a float32"),
        (
            "Column(np.zeros(2), 'label')",
            "column 'x' has shape [2]; its axis is 'label', so its first dimension must be",
        ),
        (
            "Column(np.zeros(()), 'input')",
            "column 'x' has shape []; its axis is 'input', so its first dimension must be",
        ),
    ],
)
def test_a_mismatched_column_names_its_strategy(refused: Callable, columns: str, message: str) -> None:
    body = f"""
@hookimpl
def prepare_examples(self, run, examples):
    prepared = list(examples)
    for example in prepared:
        example.columns["x"] = {columns}
    return prepared
"""
    line = refused(body, InputError)
    assert line.startswith(f"{WHO}, hook prepare_examples: ") and "train.jsonl:1: " in line and message in line


@pytest.mark.parametrize("label", ["2", "-1", "0.5"])
def test_a_label_outside_the_classes_names_its_strategy(refused: Callable, write: Callable, label: str) -> None:
    rows = write([{"text": f"hello {i}", "label": "ab"[i % 2]} for i in range(8)], "classes.jsonl")
    body = prepare(EXAMPLE.format(inputs="{'input_ids': np.array([5, 6], dtype=np.int32)}", label=label, weight="1"))
    sections = {"base": {"task": "sequence-classification"}, "data": {"train": str(rows)}}
    line = refused(body, InputError, **sections)
    assert line.startswith(f"{WHO}, hook prepare_examples: ") and "classes.jsonl:4: " in line
    assert "a label is outside the 2 classes: it must be an index from 0 to 1" in line


@pytest.mark.parametrize("label", ["len(seen)", "-1", "0.5"])
def test_a_label_of_a_task_outside_its_classes_names_the_row(
    distribution: Callable, make_recipe: Make, write: Callable, label: str
) -> None:
    source = f"""
import dataclasses
import numpy as np
from budwood import SequenceClassification
from budwood.data.formats import TextLabel

class Odd(SequenceClassification):
    name = "odd"

    def encode(self, items, where, encoder):
        prepared = super().encode(items, where, encoder)
        seen = set(item.label for item in items)
        labels = np.array([{label}])
        third = prepared[2].examples[0]
        prepared[2] = dataclasses.replace(prepared[2], examples=[dataclasses.replace(third, labels=labels)])
        return prepared

class Form(TextLabel):
    name, tasks = "odd", ("odd",)
"""
    distribution("sprout", source, {"odd": "Odd"}, "budwood.tasks")
    distribution("leaf", "from sprout import Form", {"odd": "Form"}, "budwood.formats")
    rows = write([{"text": f"hello {i}", "label": "ab"[i % 2]} for i in range(8)], "classes.jsonl")
    with pytest.raises(InputError, match=r"classes\.jsonl:3: a label is outside the 2 classes: it must be an index"):
        tune(make_recipe(base={"task": "odd"}, data={"train": str(rows)}), quiet=True)


def rows_of(weights: list[Any], form: str) -> list[dict[str, Any]]:
    """Return one row of the data format per weight."""
    makers: dict[str, Callable[[int, Any], dict[str, Any]]] = {
        "completion": lambda i, w: {"prompt": f"{i} a", "completion": " b", "weight": w},
        "text": lambda i, w: {"text": f"{i} a b", "weight": w},
        "row of messages": lambda i, w: {"messages": talk(i, 1.0), "weight": w},
        "message": lambda i, w: {"messages": talk(i, w)},
    }
    return [makers[form](i, w) for i, w in enumerate(weights)]


def talk(index: int, weight: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": f"{index} a"}, {"role": "assistant", "content": "b", "weight": weight}]


FORMS = ("completion", "text", "row of messages", "message")
WRONG = (-1, -0.5, "nan", "inf", True, "heavy", [1], 10**400, 1e39, 1e-50)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", WRONG, ids=lambda w: str(w)[:8])
def test_an_invalid_weight_names_its_row(make_recipe: Make, write: Callable, form: str, weight: Any) -> None:
    rows = write(rows_of([1.0, weight, 2.0], form), "weights.jsonl")
    with pytest.raises(InputError, match=r"weights\.jsonl:2: .*weight") as caught:
        tune(make_recipe(data={"train": str(rows)}), quiet=True)
    assert "must be 0 or a positive fp32 number, not" in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_non_finite_weights_in_json_are_rejected(make_recipe: Make, write: Callable) -> None:
    rows = write(rows_of([1.0, float("nan")], "text"), "weights.jsonl")
    with pytest.raises(InputError, match=r"weights\.jsonl:2: malformed JSON: NaN is not JSON"):
        tune(make_recipe(data={"train": str(rows)}), quiet=True)


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_are_all_zero_leave_nothing(make_recipe: Make, write: Callable, form: str) -> None:
    rows = write(rows_of([0, 0.0, 0], form), "weights.jsonl")
    with pytest.raises(InputError, match=r"weights\.jsonl: all of its 3 rows were dropped: weight 0 3"):
        tune(make_recipe(data={"train": str(rows)}), quiet=True)


@pytest.mark.parametrize("form", FORMS)
def test_weights_reach_the_labels(make_recipe: Make, write: Callable, form: str) -> None:
    rows = write(rows_of([0.5, 0, None, 4], form), "weights.jsonl")
    run = tune(make_recipe(data={"train": str(rows)}, train={"steps": 1}), quiet=True)
    assert [set(example.weights.tolist()) for example in run.examples] == [{0.5}, {1.0}, {4.0}]


def test_weights_of_row_and_message_multiply_and_are_read_from_csv(
    make_recipe: Make, write: Callable, tmp_path: Path
) -> None:
    rows = write([{"messages": talk(0, 0.5), "weight": 3}, {"messages": talk(1, 1), "weight": 1}], "both.jsonl")
    run = tune(make_recipe(data={"train": str(rows)}, train={"steps": 1}), quiet=True)
    assert [set(example.weights.tolist()) for example in run.examples] == [{1.5}, {1.0}]
    table = tmp_path / "table.csv"
    table.write_text("prompt,completion,weight\na, b,0.5\nc, d,\n")
    run = tune(make_recipe("other", data={"train": str(table)}, train={"steps": 1}), quiet=True)
    assert [set(example.weights.tolist()) for example in run.examples] == [{0.5}, {1.0}]


def test_a_group_that_does_not_fit_into_memory_is_named(refused: Callable) -> None:
    body = """
@hookimpl
def prepare_examples(self, run, examples):
    prepared = list(examples)
    for index, example in enumerate(prepared):
        example.group = index // 2
    return prepared
@hookimpl(wrapper=True)
def forward(self, step):
    if len(step.batch.keys) > 1:
        raise MemoryError
    return (yield)
"""
    line = refused(body, ResourceError)
    assert "step 1: out of memory: one group of 2 examples and" in line and "train.jsonl:" in line
    assert "a smaller train.micro_tokens cannot help" in line

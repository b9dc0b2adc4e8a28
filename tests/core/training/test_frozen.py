"""A second model in a run: accepts its batches, is frozen, and is rejected without a trained head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from budwood.errors import InputError
from budwood.model.evaluation import batches_of
from budwood.recipe.schema import Recipe
from budwood.training.frozen import load_frozen
from budwood.training.report import Report
from budwood.training.setup import prepare


def test_it_accepts_the_runs_packed_batches(
    make_recipe: Callable[..., Recipe], tiny_bases: Callable[..., Path]
) -> None:
    run, _, _ = prepare(make_recipe(), Report(quiet=True), False)
    frozen = load_frozen(run, str(tiny_bases("second", seed=5)), "none")
    assert run.packed and not frozen.model.training
    assert not any(parameter.requires_grad for parameter in frozen.model.parameters())
    seen = []
    for batch in batches_of(run, range(3, 9)):
        seen += batch.keys
        outputs = run.task.outputs(frozen.model, batch)
        logits = outputs.head(outputs.hidden.flatten(0, 1)[batch.label_positions])
        for index, example in enumerate(batch.keys):
            ids = torch.tensor(run.examples[example].inputs["input_ids"][None].astype("int64"))
            where = torch.tensor(run.examples[example].label_positions)
            alone = frozen.model(ids).logits[0, where]
            torch.testing.assert_close(logits[batch.example_of_label == index], alone, atol=1e-5, rtol=1e-4)
    assert sorted(seen) == list(range(3, 9))


def test_a_model_without_the_tasks_head_is_rejected(
    make_recipe: Callable[..., Recipe], tiny_bases: Callable[..., Path], tmp_path: Path
) -> None:
    rows = tmp_path / "labelled.jsonl"
    rows.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    recipe = make_recipe(base={"task": "sequence-classification"}, data={"train": str(rows)})
    run, _, _ = prepare(recipe, Report(quiet=True), False)
    with pytest.raises(InputError, match="has no weights for score.weight: choose one that was trained for the task"):
        load_frozen(run, str(tiny_bases("second", seed=5)))

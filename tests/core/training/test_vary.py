"""A task that augments: each epoch draws a new, reproducible variant; every evaluation uses the same one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from budwood.contract.examples import Example
from budwood.contract.types import Generator
from budwood.model.text_tasks import CausalLM
from budwood.recipe.schema import Recipe
from budwood.training.loop import tune

Seen = dict[tuple[int, bytes], list[int]]
TRAIN = {"epochs": 2, "batch_examples": 8, "learning_rate": 1e-3, "precision": "fp32", "eval_generate": 0}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The first tokens that the task drew for each prompt, in the order of the calls."""
    seen: Seen = defaultdict(list)

    def vary(self: CausalLM, example: Example, generator: Generator) -> Example:
        ids = example.inputs["input_ids"].copy()
        original = (int(example.key), ids.tobytes())
        ids[0] = int(torch.randint(10, 300, (), generator=generator.torch_generator))
        seen[original].append(int(ids[0]))
        return replace(example, inputs={**example.inputs, "input_ids": ids})

    monkeypatch.setattr(CausalLM, "vary", vary)
    return seen


def test_each_epoch_draws_a_variant_and_evaluations_share_one(
    make_recipe: Callable[..., Recipe], tmp_path: Path, seen: Seen
) -> None:
    tune(make_recipe("run", train=TRAIN), quiet=True)
    first = {key: tuple(sorted(set(values))) for key, values in seen.items()}
    assert sum(len(values) > 1 for values in first.values()) > 0.9 * len(first), "two epochs, two draws"
    seen.clear()
    smaller: dict[str, Any] = {**TRAIN, "micro_tokens": 128}
    tune(make_recipe("again", train=smaller), quiet=True)
    second = {key: tuple(sorted(set(values))) for key, values in seen.items()}
    assert {k: set(v) for k, v in second.items()} == {k: set(v) for k, v in first.items()}, (
        "independent of micro-batches"
    )
    seen.clear()
    run = tune(make_recipe("with-eval", evaluate=True, train={**TRAIN, "epochs": 1}), quiet=True)
    assert run.eval_examples is not None and run.examples is not None
    own = {
        int(run.eval_examples[i].key): run.eval_examples[i].inputs["input_ids"] for i in range(len(run.eval_examples))
    }
    twice = [values for (key, ids), values in seen.items() if key in own and ids == own[key].tobytes()]
    assert len(twice) == len(own) and all(len(values) >= 2 and len(set(values)) == 1 for values in twice)

"""How many logits of the head are in memory at once: by the memory of the GPU, as a plan for it counts too."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from budwood.model.device import planned_device
from budwood.model.evaluation import CHUNK, head_rows
from budwood.planning.rehearsal import rehearse
from budwood.recipe.schema import load_recipe

GIB = 1 << 30


@pytest.mark.parametrize(
    ("classes", "gib", "users", "rows"),
    [
        (128256, 80, 1, 2048), (128256, 23.6, 1, 768), (128256, 7.7, 1, CHUNK), (128256, 80, 3, 512),
        (32000, 80, 1, 8192),
    ],
)  # fmt: skip
def test_a_larger_card_takes_larger_chunks(classes: int, gib: float, users: int, rows: int) -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=classes))
    run: Any = SimpleNamespace(model=SimpleNamespace(config=config), device=torch.device("cpu"))
    assert head_rows(run, users) == CHUNK
    with planned_device("cuda", memory=int(gib * GIB)):
        assert head_rows(run, users) == rows
    with planned_device("cpu", memory=int(gib * GIB)):
        assert head_rows(run, users) == CHUNK


def test_a_planned_step_computes_the_head_in_chunks_of_the_card(tiny_base: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": "hello there x y z " * 20}) for _ in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {{model: {tiny_base}}}\ndata: {{train: {tmp_path / 'train.jsonl'}, eval: none}}\n"
        "strategies: [lora: {rank: 8}]\ntrain: {steps: 1, batch_examples: 8}\n"
    )
    counts = []
    for memory in (0, 80 * GIB):
        planned = planned_device("cuda", (9, 0), memory)
        with planned, rehearse(load_recipe(str(recipe)), torch.bfloat16, cuda=True) as rehearsal:
            micro = rehearsal.steps[0][0]
            rehearsal.take_step([micro])
            names = [op.name for op in rehearsal.trace.operations if op.in_pass]
            counts.append(names.count("index_add_"))
    assert micro.labels > 2 * CHUNK
    assert counts[0] - counts[1] == -(-micro.labels // CHUNK) - 1  # one addition to the gradient of a chunk's rows

"""Several processes give what one process gives: its adapters, metrics and answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.processes import run_in_processes

from budwood import InputError
from budwood.model.checks import skeleton
from budwood.model.sharding import check_shards
from budwood.recipe.schema import Recipe
from budwood.training.loop import tune

WORKER = """
import json
from pathlib import Path
from budwood.recipe.schema import load_recipe
from budwood.training.loop import tune
for name in {names!r}:
    run = tune(load_recipe(Path({folder!r}) / (name + ".yaml")), quiet=True)
    assert run.processes == {count}
    if run.world.first:
        Path({folder!r}, name + ".json").write_text(json.dumps([run.metrics, run.answers, run.base.bytes]))
"""
GRPO = {"rewards": [{"regex": {"pattern": "e"}}], "samples": 4, "max_new_tokens": 5, "minibatches": 2, "iterations": 2}
LORA = {"lora": {"rank": 4}}
SHARD = {"parallel": "shard"}
RECIPES: dict[str, tuple[list[Any], str, dict[str, Any]]] = {
    "sft": ([LORA], "none", {}),
    "grpo": ([LORA, {"grpo": GRPO}], "none", {"steps": 3, **SHARD}),
    "idle": ([LORA], "nf4", {"batch_examples": 1, "gradient_checkpointing": True, **SHARD}),
}
"""Strategies, quantisation, and changes to the section train. In "idle", one process has no example of any step."""


@pytest.fixture
def make(tiny_base: Path, tmp_path: Path) -> Callable[[str, int, Path], Recipe]:
    """Function that returns one of RECIPES, of fp32 steps on prompts with answers of different lengths."""
    words = "games section library terminal description runtime shared files data tokens".split()  # noqa: SIM905
    rows = [
        {"prompt": " ".join(words[: 1 + i % 7]) + ":", "completion": " " + " ".join(words[i % 5 : i % 5 + 1 + i % 3])}
        for i in range(23)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train = {
        "steps": 4, "batch_examples": 5, "micro_tokens": 64, "learning_rate": 1e-2, "precision": "fp32", "warmup": 0,
        "schedule": "constant", "eval_generate": 7,
    }  # fmt: skip

    def make(name: str, count: int, folder: Path) -> Recipe:
        strategies, quantization, changes = RECIPES[name]
        recipe = Recipe.from_dict({
            "base": {"model": str(tiny_base), "quantization": quantization},
            "data": {"train": str(data), "eval": str(data), "max_length": 96},
            "strategies": strategies, "train": {**train, **changes}, "output": str(tmp_path / f"{name}-{count}"),
        })  # fmt: skip
        (folder / f"{name}.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        return recipe

    return make


def test_two_processes_write_the_adapter_and_metrics_of_one(
    make: Callable[[str, int, Path], Recipe], tmp_path: Path
) -> None:
    """Steps of 5 examples in 2 processes, updates of GRPO's set in parts, answers to 7 prompts, a base in shards."""
    folder = tmp_path / "processes"
    folder.mkdir()
    for name in RECIPES:
        make(name, 2, folder)
    run_in_processes(WORKER.format(names=list(RECIPES), folder=str(folder), count=2), folder, 2)
    for name in RECIPES:
        one = tune(make(name, 1, folder), quiet=True)
        metrics, answers, size = json.loads((folder / f"{name}.json").read_text())
        assert answers == one.answers
        sharded = RECIPES[name][2].get("parallel") == "shard"
        assert (size < 0.97 * one.base.bytes) == sharded, "a process holds its share of the layers"
        for metric in ("loss", "gradient_norm", *(m for m in one.metrics if m.startswith("eval_"))):
            assert metrics[metric] == pytest.approx(one.metrics[metric], rel=1e-4, abs=1e-5), (name, metric)
        expected = load_file(one.directory / "adapter" / "adapter_model.safetensors")
        found = load_file(tmp_path / f"{name}-2" / "adapter" / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        gaps = torch.cat([(found[key] - tensor).abs().view(-1) for key, tensor in expected.items()])
        # Adam makes more than rounding of the few elements whose gradients almost cancel.
        assert float((gaps > 1e-5).float().mean()) < 0.01, name
        assert float(gaps.max()) < 1e-3, f"{name}: a tenth of a step"


def test_a_base_that_cannot_be_sharded_is_refused_by_name(
    make: Callable[[str, int, Path], Recipe], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = skeleton(str(tiny_base), "AutoModelForCausalLM")
    with pytest.raises(InputError, match=r"train\.parallel: weights in int8 cannot be sharded: use .*replicate, nf4"):
        check_shards(str(tiny_base), frame, "int8")
    monkeypatch.setattr("budwood.model.sharding.layers_of", lambda model: [])
    with pytest.raises(InputError, match="class LlamaForCausalLM names no layers to shard"):
        check_shards(str(tiny_base), frame, "nf4")

"""`adapter: DIR` of another task: what lies below the head goes on, and the head is new."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from budwood.adapters.store import read_adapter
from budwood.errors import InputError
from budwood.planning.composition import plan
from budwood.planning.rehearsal import rehearse
from budwood.recipe.schema import Recipe
from budwood.serving.verify import verify
from budwood.testing import tiny_encoder
from budwood.training.loop import tune

TEXTS = ["alice walks to paris", "bob sees rome today", "alice sees bob", "rome walks today"] * 2
PREFIX = "base_model.model."
ADALORA = {"initial_rank": 4, "target_rank": 2, "initial_phase": 0, "final_phase": 1, "interval": 1}
TYPES: dict[str, dict[str, Any]] = {"lora": {"rank": 3, "alpha": 5, "dora": True}, "adalora": ADALORA, "ia3": {}}


@pytest.fixture
def recipe_of(tmp_path: Path) -> Callable[..., Recipe]:
    tiny_encoder(tmp_path / "base", " ".join(TEXTS).split())
    rows: dict[str, Callable[[int, str], dict[str, Any]]] = {
        "masked-lm": lambda _, text: {"text": text},
        "sequence-classification": lambda i, text: {"text": text, "label": "ab"[i % 2]},
        "embedding": lambda _, text: {"anchor": text, "positive": text.upper()},
    }
    for task, row in rows.items():
        lines = [json.dumps(row(number, text)) for number, text in enumerate(TEXTS)]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines) + "\n")

    def make(task: str, *strategies: Any, output: str = "run", adapter: str | None = None, **train: Any) -> Recipe:
        return Recipe.from_dict(
            {
                "base": {"model": str(tmp_path / "base"), "task": task, "quantization": "none", "device": "cpu"},
                "data": {"train": str(tmp_path / f"{task}.jsonl"), "eval": "none"},
                "strategies": list(strategies),
                "train": {"steps": 4, "batch_examples": 4, "learning_rate": 1e-2, "precision": "fp32", **train},
                "output": str(tmp_path / output),
                **({"adapter": str(tmp_path / adapter)} if adapter else {}),
            }
        )

    return make


@pytest.mark.parametrize("kind", TYPES)
def test_the_encoder_goes_on_and_the_head_is_new(recipe_of: Callable[..., Recipe], tmp_path: Path, kind: str) -> None:
    more = {"modules_to_save": ["transform"]}
    tune(recipe_of("masked-lm", {kind: {**TYPES[kind], **more}}, output="parent"), quiet=True)
    parent = load_file(tmp_path / "parent" / "adapter" / "adapter_model.safetensors")
    head = {key for key in parent if ".cls." in key}
    assert head and head != parent.keys()
    for task, before, after in (("sequence-classification", "bert.", "bert."), ("embedding", "bert.", "")):
        recipe = recipe_of(
            task, kind, "l2-sp", output=task, adapter="parent/adapter", steps=1, learning_rate=1e-6, warmup=0
        )
        with rehearse(recipe, torch.float32) as rehearsed:
            planned = [tuple(p.shape) for p in rehearsed.run.trainable]
        run = tune(recipe, quiet=True)
        assert [tuple(p.shape) for p in run.trainable] == planned
        child = tmp_path / task / "adapter"
        found = load_file(child / "adapter_model.safetensors")
        kept = {f"{PREFIX}{key.removeprefix(PREFIX + before)}": parent[key] for key in parent.keys() - head}
        kept = {PREFIX + after + key.removeprefix(PREFIX): value for key, value in kept.items()}
        for key, value in kept.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)
        new = {key.split(".")[-2] for key in found.keys() - kept.keys()}
        assert new == ({"classifier", "dense"} if task == "sequence-classification" else set())  # bert.pooler.dense
        base = dict(run.base.model.named_parameters())
        for key in found.keys() - kept.keys():
            path, _, name = key.removeprefix(PREFIX).rpartition(".")
            torch.testing.assert_close(found[key], base[f"{path}.original_module.{name}"].data, rtol=0, atol=1e-5)
        assert read_adapter(child).manifest.parent == read_adapter(tmp_path / "parent" / "adapter").hashes
        assert ("loss/l2_sp_new" in run.metrics or "l2_sp_new" in str(run.metrics)) == bool(new)
        assert verify(child, device="cpu").exact


def test_what_cannot_go_on_is_refused_before_the_base_loads(
    recipe_of: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(recipe_of("masked-lm", {"lora": {"rank": 3}}, output="parent"), quiet=True)
    monkeypatch.setattr("budwood.model.base.read_tensors", lambda *given: pytest.fail("the base was read"))
    parent = tmp_path / "parent" / "adapter"
    with pytest.raises(InputError, match=r"rank: 2 is lower than that of 'bert\..*' in .*, 3: leave it out"):
        tune(recipe_of("sequence-classification", {"lora": {"rank": 2}}, adapter="parent/adapter"), quiet=True)
    config = json.loads((parent / "adapter_config.json").read_text())
    for change, message in (
        ({"trainable_token_indices": {"bert.embeddings.word_embeddings": [1]}}, "goes on only within its task"),
        ({"target_modules": ["cls.predictions.transform.dense"]}, "nothing below the head of masked-lm"),
    ):
        (parent / "adapter_config.json").write_text(json.dumps({**config, **change}))
        saved = read_adapter(parent, hashes=False)
        monkeypatch.setattr("budwood.recipe.continued.read_adapter", lambda *given, saved=saved, **options: saved)
        problems = plan(recipe_of("sequence-classification", "lora", adapter="parent/adapter")).problems
        assert any(message in problem for problem in problems), problems

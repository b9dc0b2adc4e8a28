"""Classification with thousands of classes: trained, saved, reopened, and reported readably."""

from __future__ import annotations

import json
from pathlib import Path

from budwood.recipe.schema import Recipe
from budwood.serving.pool import AdapterPool
from budwood.serving.verify import verify
from budwood.training.loop import tune

CLASSES = 5_000


def test_five_thousand_classes(tmp_path: Path, tiny_base: Path) -> None:
    train, evaluation = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    rows = [json.dumps({"text": f"files {i % 7}", "label": f"class {i}"}) for i in range(CLASSES)]
    train.write_text("\n".join(rows) + "\n")
    evaluation.write_text("\n".join(rows[-3:]) + "\n")
    recipe = {
        "base": {"model": str(tiny_base), "quantization": "none", "task": "sequence-classification"},
        "data": {"train": str(train), "eval": str(evaluation)},
        "strategies": ["lora"],
        "train": {"steps": 2, "batch_examples": 64, "learning_rate": 1e-2, "precision": "fp32"},
        "output": str(tmp_path / "run"),
    }
    run = tune(Recipe.from_dict(recipe), quiet=True)
    assert len(run.task.report.splitlines()) <= 3 + 2 * 3 + 4, "only classes that occur are listed"
    adapter = tmp_path / "run" / "adapter"
    assert verify(adapter).exact
    pool = AdapterPool(tiny_base, "none", precision="fp32", task="sequence-classification", labels=run.examples.labels)
    pool.load("a", adapter)
    pool.use("a")
    [answer] = pool.classify(["files 3"])
    assert answer.label in {f"class {i}" for i in range(CLASSES)}

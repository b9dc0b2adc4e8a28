"""Runs ready for their first step, on tiny bases, and the noise of their passes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from budwood.contract.types import Step
from budwood.recipe.schema import Recipe
from budwood.training import setup
from budwood.training.batches import optimizer_steps
from budwood.training.report import Report

WORDS = "games section library terminal description runtime shared files data model tokens small headers".split()  # noqa: SIM905
LORA = {"lora": {"rank": 4, "alpha": 8}}


def write_rows(path: Path, form: str, count: int = 12) -> Path:
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        words = draw.choices(WORDS, k=draw.randint(2, 12))
        if form == "prompt-completion":
            rows.append({"prompt": " ".join(words) + ":", "completion": f" {words[0]} {words[-1]}"})
        else:
            rows.append({"text": " ".join(words), "label": words[0][0] < "h"})
    rows = [{**row, "label": str(row["label"])} if "label" in row else row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make_recipe(tiny_base: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Function `make_recipe(adversarial options or None, base=…, train=…)` -> a short fp32 recipe."""

    def make(options: dict[str, Any] | None, name: str = "run", **sections: Any) -> Recipe:
        base = {"model": str(tiny_base), "quantization": "none", **sections.get("base", {})}
        form = "text-label" if base.get("task") == "sequence-classification" else "prompt-completion"
        train = {
            "steps": 3, "batch_examples": 12, "micro_tokens": 512, "learning_rate": 1e-2, "precision": "fp32",
            "schedule": "constant", "warmup": 0, "eval_generate": 0, "clip": 0, **sections.get("train", {}),
        }  # fmt: skip
        strategies = sections.get("strategies", [LORA])
        return Recipe.from_dict(
            {
                "base": base,
                "data": {"train": str(write_rows(tmp_path / f"{form}.jsonl", form)), "max_length": 128},
                "strategies": strategies if options is None else [*strategies, {"adversarial": options}],
                "train": train,
                "output": str(tmp_path / name),
            }
        )

    return make


class Ready:
    """A run before its first step, with a random adapter."""

    def __init__(self, recipe: Recipe) -> None:
        self.run, self.hooks, self.engine = setup.prepare(recipe, Report(quiet=True), True)
        torch.manual_seed(1)
        with torch.no_grad():
            for group in self.run.groups:
                for parameter in group.parameters.values():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        self.run.model.train()
        self.steps: list[Step] = []

    def step(self) -> dict[str, torch.Tensor]:
        """Run the passes of one optimizer step; return the gradients by parameter."""
        self.run.optimizer.zero_grad(set_to_none=True)
        todo, self.run.counts = next(optimizer_steps(self.run, self.hooks))
        for index, batch in enumerate(todo.batches):
            batch = self.hooks.chain("prepare_batch", "batch", batch, run=self.run)
            self.steps.append(Step(self.run, batch, self.engine, index))
            self.hooks.call("backward", step=self.steps[-1])
        self.hooks.call("before_clip", run=self.run)
        return {name: p.grad.clone() for g in self.run.groups for name, p in g.parameters.items() if p.grad is not None}


@pytest.fixture
def noises(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """The noise of every pass of a run, None for clean passes."""
    from budwood.model.task import Task

    recorded: list[Any] = []
    original = Task.noisy

    def record(self: Any, model: Any, noise: Any) -> Any:
        recorded.append(None if noise is None else noise.detach().clone())
        return original(self, model, noise)

    monkeypatch.setattr(Task, "noisy", record)
    return recorded


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random BERT, which pools by row."""
    from tests.conftest import make_tokenizer
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder

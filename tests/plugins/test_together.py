"""Combinations of the first-party strategies, three optimizer steps of each in the regular training loop."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import make_base, make_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from budwood.cli import app
from budwood.recipe.schema import Recipe
from budwood.training import batches, finish, loop, setup
from budwood.training.report import Report

from .combinations import COMBINATIONS, GRID, OBJECTIVES, PAGE, REFUSALS, Combination, Refusal, page

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LONGEST = 12
"""Tokens of the longest row; even three of the shortest rows exceed twice this."""
CORE_NUMBERS = {
    "kind", "step", "loss", "gradient_norm", "learning_rate", "skipped", "skipped_steps", "tokens", "tokens_per_second",
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a base, data for both tasks, and a teacher per task: different weights, the same tokenizer."""
    folder = tmp_path_factory.mktemp("together")
    make_base(folder / "base", **TINY)
    make_base(folder / "teacher-causal-lm", seed=1, **TINY)
    names = {0: "a", 1: "b", 2: "c"}
    config = LlamaConfig.from_pretrained(
        folder / "base", id2label=names, label2id={v: k for k, v in names.items()}, initializer_range=0.3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        LlamaForSequenceClassification(config).save_pretrained(folder / "teacher-sequence-classification")
    make_tokenizer(folder / "teacher-sequence-classification")
    draw = random.Random(0)
    texts = ["".join(draw.choices("bcdfghjklmnp", k=7 + number % 3)) for number in range(12)]
    rows = {
        "causal-lm": [
            {"prompt": text[:-3], "completion": text[-3 + number % 2 :]} for number, text in enumerate(texts)
        ],
        "sequence-classification": [{"text": text, "label": "abc"[n % 3]} for n, text in enumerate(texts)],
        "pairs": [
            {"prompt": text[:-3], "chosen": text[-3 + n % 2 :], "rejected": texts[n - 1][-3 + n % 2 :]}
            for n, text in enumerate(texts)
        ],
        "judged": [
            {"prompt": text[:-3], "completion": text[-3 + n % 2 :], "label": n % 2 == 0} for n, text in enumerate(texts)
        ],
        "prompts": [{"prompt": text[:-3]} for text in texts],
    }
    for task, task_rows in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task_rows), encoding="utf-8")
    return folder


def recipe_of(
    files: Path, task: str, strategies: list[Any], output: Path, quantization: str = "none", data: str = ""
) -> dict[str, Any]:
    return {
        "base": {"model": str(files / "base"), "quantization": quantization, "task": task},
        "data": {"train": str(files / f"{data or task}.jsonl"), "max_length": LONGEST},
        "strategies": strategies,
        "train": {
            "steps": 3, "batch_examples": 4, "micro_tokens": 4 * LONGEST, "learning_rate": 1e-2, "precision": "fp32",
            "schedule": "constant", "warmup": 0, "clip": 0,
        },
        "output": str(output),
    }  # fmt: skip


class ObservedRun:
    """A run of a combination, with the gradients before each optimizer step."""

    def __init__(self, recipe: dict[str, Any], micro_tokens: int) -> None:
        recipe["train"]["micro_tokens"] = micro_tokens
        self.report = Report(quiet=True)
        self.run, self.hooks, self.engine = setup.prepare(Recipe.from_dict(recipe), self.report, True)
        self.micro_batches: list[list[int]] = []
        self.strays: list[str] = []
        self.without: list[str] = []
        self.largest = 0.0
        for group in self.run.optimizer.param_groups:
            group["eps"] = 1.0  # with the default 1e-8, AdamW divides rounding errors by gradients of the same size
        self.run.optimizer.register_step_pre_hook(lambda *_: self.record_gradients())

    def record_gradients(self) -> None:
        named = {id(p): name for g in self.run.groups for name, p in g.parameters.items()}
        for name, parameter in [*self.run.model.named_parameters(), *self.teacher_parameters()]:
            if id(parameter) not in named and parameter.grad is not None:
                self.strays.append(f"step {self.run.step + 1}: {name}")
        self.without += [
            f"step {self.run.step + 1}: {named[id(p)]}" for p in self.run.trainable if p.numel() and p.grad is None
        ]
        if self.run.step == 0:
            self.first = {named[id(p)]: (p.detach().clone(), p.grad.clone()) for p in self.run.trainable}
        self.last = {named[id(p)]: p.grad.abs().max() for p in self.run.trainable if p.numel() and p.grad is not None}
        self.largest = max(self.largest, *map(float, self.last.values()))

    def teacher_parameters(self) -> list[tuple[str, Tensor]]:
        teachers = [s.teacher for s in self.run.strategies if s.name == "distillation"]
        return [(f"teacher's {name}", p) for teacher in teachers for name, p in teacher.model.named_parameters()]

    def frozen(self) -> dict[str, Tensor]:
        """Copies of all frozen tensors, including the constants of the quantiser."""
        trained = {p.data_ptr() for p in self.run.trainable}
        state = {f"model.{k}": v for k, v in self.run.model.state_dict().items() if v.data_ptr() not in trained}
        state |= dict(self.teacher_parameters())
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def train(self, monkeypatch: pytest.MonkeyPatch) -> ObservedRun:
        with monkeypatch.context() as patch:
            patch.setattr(finish, "write_results", lambda *_, **__: None)  # tested elsewhere
            split_micro = batches.split_micro

            def split(*args: Any) -> Any:
                rows = split_micro(*args)
                self.micro_batches.append([len(row) for row in rows])
                return rows

            patch.setattr(batches, "split_micro", split)
            loop.train(self.run, self.hooks, self.engine, self.report)
        self.report.close()
        return self

    def adapter(self) -> dict[str, Tensor]:
        return {name: p.detach() for g in self.run.groups for name, p in g.parameters.items()}

    def steps(self) -> list[dict[str, float]]:
        lines = (self.run.directory / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["kind"] == "step"]


def declared(case: Combination) -> tuple[dict[str, float], set[str]]:
    """Return the weight of each loss term by its name in the log, and the names of other logged values."""
    share, objective = 0.4 if case.teacher != "none" else 0.0, OBJECTIVES[case.objective]
    terms = {case.task.replace("-", "_"): objective.task * (1 - share), **objective.terms}
    if case.teacher != "none":
        terms["distillation"] = share
    if case.adapter == "adalora":
        terms["orthogonality"] = 0.1
    if case.adversary in ("smart", "vat"):
        terms[case.adversary] = 1.0
    others = {"rank_budget"} if case.adapter == "adalora" else set()
    return terms, others | ({"adversarial_gain"} if case.adversary not in ("none", "neftune") else set())


@pytest.mark.parametrize("case", COMBINATIONS, ids=[case.id for case in COMBINATIONS])
def test_combination(case: Combination, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategies = case.strategies(str(files / f"teacher-{case.task}"))
    objective = OBJECTIVES[case.objective]
    data = case.task if case.objective == "sft" else objective.data
    recipe = recipe_of(files, case.task, strategies, tmp_path / "run", case.quantization, data)
    count = objective.examples
    whole = ObservedRun(recipe, count * LONGEST)
    assert whole.run.packed
    before = whole.frozen()
    assert any(tensor.dtype == torch.uint8 for tensor in before.values()) == (case.quantization == "nf4")
    whole.train(monkeypatch)

    terms, others = declared(case)
    steps = whole.steps()
    assert len(steps) == 3
    for step in steps:
        signed = set(objective.logged)
        assert set(step) - CORE_NUMBERS - signed == (set(terms) | others) - signed
        assert all(step[name] > 0 for name in (set(terms) | others) - signed), "a term without effect"
        assert step["loss"] == pytest.approx(sum(weight * step[name] for name, weight in terms.items()), rel=1e-5)
    assert all(torch.isfinite(tensor).all() for tensor in whole.adapter().values())

    assert not whole.strays, "a gradient on a frozen parameter"
    assert not whole.without, "no gradient on a trainable parameter"
    assert not [name for name, size in whole.last.items() if size == 0], "a gradient of zero after two steps"
    if case.adapter == "adalora":  # E starts at zero: in the first step only the penalty contributes to A's gradient
        right = {name: pair for name, pair in whole.first.items() if name.endswith("lora_A")}
        for vectors, gradient in right.values():
            penalty = 4 * (vectors @ vectors.T - torch.eye(len(vectors))) @ vectors / len(right)
            # Each element is a sum over a row and the ranks; the identity cancels what is nearly orthonormal.
            largest = (
                4 * ((vectors.abs() @ vectors.abs().T).max() + 1) * vectors.abs().max() * len(vectors) / len(right)
            )
            rounding = float(0.1 * largest) * (vectors.shape[1] + len(vectors)) * torch.finfo(torch.float32).eps
            torch.testing.assert_close(gradient, 0.1 * penalty, rtol=1e-5, atol=rounding, msg="the penalty counts once")
    after = whole.frozen()
    assert after.keys() == before.keys()
    assert not [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]

    halves = ObservedRun(recipe, count // 2 * LONGEST).train(monkeypatch)
    assert whole.micro_batches == [[count]] * 3
    assert all(len(sizes) == 2 and sum(sizes) == count for sizes in halves.micro_batches)
    # The longest sums in the backward pass: over the batch's tokens, a layer's width, the vocabulary.
    summands = count * LONGEST + TINY["intermediate_size"] + 300
    rounding = whole.largest * summands * torch.finfo(torch.float32).eps  # of a gradient, of AdamW's m and of √v
    bound = len(steps) * recipe["train"]["learning_rate"] * 2 * rounding
    torch.testing.assert_close(halves.adapter(), whole.adapter(), rtol=1e-6, atol=bound)


@pytest.mark.parametrize("refusal", REFUSALS, ids=[refusal.title for refusal in REFUSALS])
def test_invalid_combinations_are_refused_before_the_base_loads(
    refusal: Refusal, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "load_base", lambda *_: pytest.fail("the base loads"))
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe_of(files, refusal.task, refusal.strategies, tmp_path / "run")), encoding="utf-8")
    assert app.run(["tune", str(path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert refusal.message in line
    assert not (tmp_path / "run").exists()


def test_the_page_of_combinations_is_up_to_date() -> None:
    outcomes = {case.id: True for case in GRID}  # the tests above and `make combinations` fail otherwise
    assert PAGE.read_text(encoding="utf-8") == page(outcomes), "run `make combinations`"

"""The size of micro-batches where the recipe leaves it open."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import budwood
from budwood.contract.discovery import PluginError
from budwood.planning import admission, process, sizes
from budwood.planning.estimate import Estimate
from budwood.planning.options import GIB, Device
from budwood.recipe.schema import Recipe
from budwood.training.loop import tune
from budwood.training.micro_tokens import wanted

LONGEST = 500


@dataclass
class Step:
    """A rehearsed step that needs 4 GiB and 1 MiB a token."""

    tokens: int

    @property
    def work(self) -> int:
        return self.tokens << 20

    @property
    def needed(self) -> int:
        return 4 * GIB + self.work


def chosen(gib: float, kind: str = "cpu", fixed: float = 0.0) -> tuple[int, int]:
    """Return the size for a memory, and how many sizes were rehearsed; `fixed` GiB of the work do not shrink."""
    seen: list[int] = []
    rows = SimpleNamespace(lengths=np.array([LONGEST, 200, 100]), groups=np.arange(3))
    recipe = SimpleNamespace(micro_tokens=2048, train=SimpleNamespace(batch_tokens=None, batch_examples=3))
    run = SimpleNamespace(recipe=recipe, examples=rows, steps=1, seed=0, hooks=SimpleNamespace(calls=lambda name: []))
    rehearsal: Any = SimpleNamespace(run=run, lengths=rows.lengths, groups=rows.groups, split=seen.append)
    rehearsal.wanted = lambda kind: wanted(run, kind)

    class More(Step):
        @property
        def work(self) -> int:
            return (self.tokens << 20) + int(fixed * GIB)

    result = sizes.choose(rehearsal, kind, int(gib * GIB), lambda: More(seen[-1]))
    assert result.tokens == seen[-1]
    return seen[-1], len(seen)


def test_the_largest_useful_size_that_fits_is_chosen() -> None:
    assert chosen(64) == (2048, 1)
    assert chosen(64, "cuda") == (2048, 1)  # a step has 800 tokens
    size, count = chosen(6)
    assert count == 2 and size % 64 == 0 and 0 <= sizes.ROOM * 6 * 1024 - 4096 - size < 64
    size, count = chosen(6.5, fixed=1)  # scaling down is too optimistic at first
    assert (size, count) == (832, 3)


def test_no_size_is_below_the_longest_example() -> None:
    assert chosen(4.8) == (LONGEST, 2)
    assert chosen(1)[0] == LONGEST


def estimate_of(micro_tokens: int) -> Estimate:
    """Return an estimate of 1 GiB on a CPU with 4 GiB."""
    return Estimate(
        Device("this CPU", "cpu", 4 * GIB), GIB, {"activations": GIB}, "core", (0, ""), 0, 1.0, 1.0, 1.0, 100.0, 1.0,
        micro_tokens, 4, None, 0, 0, GIB, micro_tokens=micro_tokens, recomputed=1 + (micro_tokens > 96), layers=2,
    )  # fmt: skip


def test_the_size_is_recorded_and_resume_keeps_it(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine with other memory would choose otherwise, and dropout masks depend on the size."""
    monkeypatch.setattr(admission, "MARGIN", 10**9)
    sections: dict[str, Any] = {"strategies": [{"lora": {"rank": 2, "dropout": 0.2}}]}
    train = {
        "gradient_checkpointing": "auto",
        "micro_tokens": None,
        "learning_rate": None,
        "save_every": 1,
        "steps": 2,
        "keep_checkpoints": 9,
    }

    def run(output: str, size: int, **options: Any) -> Any:
        monkeypatch.setattr(process, "estimate_in_process", lambda *a, **k: estimate_of(size))
        return tune(make_recipe(output, train=train, **sections), planner=admission.admit, **options)

    one = run("one", 96)
    said = capsys.readouterr().err
    assert (
        "micro-batches of at most 96 tokens" in said and "at most 96 tokens at once (train.micro_tokens: auto)" in said
    )
    manifest = json.loads((one.directory / "manifest.json").read_text())
    assert manifest["micro_tokens"] == manifest["planned"]["step"]["micro_tokens"] == 96
    for line in ("micro_tokens: 96", "gradient_checkpointing: 1"):
        assert line in (one.directory / "recipe.yaml").read_text()
    assert "96 tokens; 1 of 2 layers recompute" in said
    weights = (one.directory / "adapter" / "adapter_model.safetensors").read_bytes()
    again = run("one", 512, resume=True)  # finished; what it chose is no change
    assert again.step == 2
    manifest["finished"] = False
    (one.directory / "manifest.json").write_text(json.dumps(manifest))
    newest = max((one.directory / "checkpoints").glob("step-*"))
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    (one.directory / "adapter" / "adapter_model.safetensors").unlink()
    resumed = run("one", 512, resume=True, quiet=True)
    assert (resumed.micro_tokens, resumed.recipe.train.gradient_checkpointing) == (96, 1)
    assert (one.directory / "adapter" / "adapter_model.safetensors").read_bytes() == weights


def test_a_run_from_python_is_planned_as_that_of_the_command(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MARGIN", 10**9)
    monkeypatch.setattr(process, "estimate_in_process", lambda *a, **k: estimate_of(96))
    recipe = make_recipe(train={"micro_tokens": None, "gradient_checkpointing": "auto", "steps": 1})
    run = budwood.tune(recipe, quiet=True)
    assert (run.micro_tokens, run.recipe.train.gradient_checkpointing) == (96, 1) and run.planned
    plain = budwood.tune(recipe, quiet=True, overwrite=True, planner=None)
    assert (plain.micro_tokens, plain.recipe.train.gradient_checkpointing) == (2048, True) and not plain.planned


def test_what_cannot_be_planned_runs_with_the_usual_size(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: Any, **options: Any) -> Estimate:
        raise PluginError("strategy 'x' reads the values of tensors")

    monkeypatch.setattr(process, "estimate_in_process", fails)
    recipe = make_recipe(train={"micro_tokens": None, "steps": 1})
    ample = tune(
        recipe.with_train(recipe.train.model_copy(update={"gradient_checkpointing": "auto"})),
        planner=admission.admit, quiet=True,
    )  # fmt: skip
    assert ample.micro_tokens == 2048 and ample.recipe.train.gradient_checkpointing is False  # not planned
    monkeypatch.setattr(admission, "MARGIN", 10**9)
    auto = recipe.train.model_copy(update={"gradient_checkpointing": "auto"})
    run = tune(recipe.with_train(auto), planner=admission.admit, overwrite=True)
    assert run.micro_tokens == 2048 and run.recipe.train.micro_tokens == 2048
    assert run.recipe.train.gradient_checkpointing is True  # which takes the least memory
    assert "note: memory and time were not planned: strategy 'x' reads" in capsys.readouterr().err


def test_examples_above_the_given_size_are_named(
    make_recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    tune(make_recipe(train={"micro_tokens": 50, "steps": 1}, data={"eval": "none"}))
    line = r"note: \d+ examples are larger than train.micro_tokens \(50\); .* of \d+ tokens \(.*train.jsonl:\d+\)"
    assert re.search(line, capsys.readouterr().err)


def test_a_run_of_small_steps_is_not_planned_where_micro_batches_of_the_usual_size_might_not_fit(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan takes longer than such a run."""
    planned: list[int] = []

    def estimate(recipe: Recipe, *args: Any, **options: Any) -> Estimate:
        planned.append(recipe.train.batch_examples or 0)
        return estimate_of(2048)

    monkeypatch.setattr(process, "estimate_in_process", estimate)
    monkeypatch.setattr(admission, "available", lambda run: 100_000_000)
    for rows in (4, 24):
        train = {"micro_tokens": None, "steps": 1, "batch_examples": rows}
        assert tune(make_recipe(f"of {rows}", train=train), planner=admission.admit, quiet=True).micro_tokens == 2048
    assert planned == [24]

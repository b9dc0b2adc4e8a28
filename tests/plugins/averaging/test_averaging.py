"""Averages in runs: the definitions in float64, the same state evaluated and saved, training unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from budwood import AdapterPool, InputError, PluginError, Run, Strategy, hookimpl, tune
from budwood.contract.loading import build_strategy
from budwood.errors import Interrupted
from budwood.recipe.schema import Recipe
from budwood.serving.verify import verify
from budwood.training import progress, setup
from budwood.training.loop import train
from budwood.training.report import Report

from .conftest import named

Make = Callable[..., Recipe]
Values = list[dict[str, Tensor]]
LORA = {"lora": {"rank": 4}}
ADALORA = {"adalora": {"initial_rank": 4, "target_rank": 1, "initial_phase": 1, "final_phase": 3, "interval": 1}}


def ema(steps: Values, decay: float) -> dict[str, Tensor]:
    """Compute the average from its definition, in float64."""
    average = dict(steps[0])
    for t, values in enumerate(steps[1:], start=1):
        d = min(decay, (1 + t) / (10 + t))
        average = {name: d * average[name] + (1 - d) * values[name] for name in average}
    return average


def mean(steps: Values) -> dict[str, Tensor]:
    return {name: torch.stack([values[name] for values in steps]).mean(0) for name in steps[0]}


def assert_averaged(run: Run, expected: dict[str, Tensor]) -> None:
    """Compare up to a few fp32 roundings of values below 1."""
    for name, parameter in named(run).items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("decay", "adapter"), [(0.3, LORA), (0.3, ADALORA), (0.999, LORA)])
def test_ema_matches_its_definition(make_recipe: Make, watched: Any, adapter: Any, decay: float) -> None:
    """At 0.3 the decay dominates from the sixth step on, at 0.999 the warm-up."""
    run, steps = watched(make_recipe([adapter, {"ema": {"decay": decay}}], evaluate=False, steps=8))
    assert len(steps) == 8
    assert_averaged(run, ema(steps, decay))
    last = steps[-1]
    assert any((p.detach().double() - last[name]).abs().max() > 1e-3 for name, p in named(run).items())


@pytest.mark.parametrize(
    ("options", "averaged", "adapter"),
    [
        ({"start": 3, "every": 2}, [3, 5, 7], ADALORA),
        ({"start": 0.5}, [4, 5, 6, 7, 8], LORA),
        ({"start": 0, "every": 3}, [1, 4, 7], LORA),
        ({"start": 0, "every": 3}, [1, 4, 7], ADALORA),  # steps before, during and after the ranks are pruned
        ({}, [6, 7, 8], LORA),
        ({"start": 8}, [8], LORA),
    ],
)
def test_swa_is_the_mean_of_its_steps(
    make_recipe: Make, watched: Any, adapter: Any, options: dict[str, Any], averaged: list[int]
) -> None:
    run, steps = watched(make_recipe([adapter, {"swa": options}], evaluate=False, steps=8))
    assert_averaged(run, mean([steps[step - 1] for step in averaged]))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_same_state_is_evaluated_saved_and_reported_and_training_is_unchanged(
    make_recipe: Make, watched: Any, tiny_base: Path, quantization: str
) -> None:
    """Each evaluation uses the parameters given by the definition, and the best ones are saved."""
    evaluated: list[tuple[float, list[Tensor]]] = []

    class RecordEvaluations:
        @hookimpl(wrapper=True)
        def evaluate(self, run: Run) -> Generator[None, list[dict[str, float]], list[dict[str, float]]]:
            metrics = yield
            evaluated.append((metrics[0]["eval_loss"], [p.detach().clone() for p in run.trainable]))
            return metrics

    recipe = make_recipe([LORA, {"ema": {"decay": 0.5}}], "with", quantization, eval_every=2)
    run, steps = watched(recipe, RecordEvaluations())
    for (_, parameters), count in zip(evaluated[1:], (2, 4, 6), strict=True):
        expected = ema(steps[:count], 0.5)
        for name, value in zip(named(run), parameters, strict=True):
            torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-5)
    best = min(evaluated[1:], key=lambda evaluation: evaluation[0])
    assert run.metrics["eval_loss"] == best[0]
    assert all(torch.equal(p, value) for p, value in zip(run.trainable, best[1], strict=True))
    assert run.task.measure(run)["eval_loss"] == best[0]
    saved = load_file(run.directory / "adapter" / "adapter_model.safetensors")
    for name, parameter in named(run).items():
        path, _, part = name.removeprefix("lora_A/").removeprefix("lora_B/").rpartition(".")
        assert torch.equal(saved[f"base_model.model.{path}.{part}.weight"], parameter.detach())
    assert verify(run.directory / "adapter").exact, "golden outputs are those of the average"
    without, plain = watched(make_recipe([LORA], "without", quantization, eval_every=2))
    for ours, theirs in zip(steps, plain, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = []
    for directory in (run.directory, without.directory):
        records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        losses.append([record["loss"] for record in records if record["kind"] == "step"])
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
def test_an_interrupted_evaluation_restores_the_parameters_bitwise(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, exception: type[BaseException]
) -> None:
    before: list[Tensor] = []
    restored: list[bool] = []
    put, back = progress.put_average, progress.put_back

    def put_average(run: Run) -> list[Tensor]:
        before[:] = [p.detach().clone() for p in run.trainable]
        return put(run)

    def put_back(run: Run, own: list[Tensor]) -> None:
        back(run, own)
        restored.append(all(torch.equal(p, raw) for p, raw in zip(run.trainable, before, strict=True)))

    class Fail:
        @hookimpl
        def evaluate(self, run: Run) -> dict[str, float]:
            if run.step == 4:
                assert any(not torch.equal(p, raw) for p, raw in zip(run.trainable, before, strict=True))
                raise exception
            return {}

    recipe = make_recipe([LORA, {"ema": {"decay": 0.5}}], eval_every=2)
    run, hooks, engine = setup.prepare(recipe, report := Report(quiet=True), False)
    hooks.register_core(Fail(), "fail")
    monkeypatch.setattr(progress, "put_average", put_average)
    monkeypatch.setattr(progress, "put_back", put_back)
    with pytest.raises(Interrupted if exception is KeyboardInterrupt else ValueError):
        train(run, hooks, engine, report)
    assert restored == [True, True, True], "steps 0, 2 and 4"


def test_an_interrupted_run_saves_the_average_so_far(
    make_recipe: Make, watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe([LORA, {"swa": {"start": 2}}], "whole", evaluate=False)
    _, steps = watched(recipe)

    class Stop:
        @hookimpl
        def before_clip(self, run: Run) -> None:
            if run.step == 4:
                raise KeyboardInterrupt

    run, hooks, engine = setup.prepare(
        make_recipe([LORA, {"swa": {"start": 2}}], evaluate=False), report := Report(quiet=True), False
    )
    hooks.register_core(Stop(), "stop")
    with pytest.raises(Interrupted, match="the adapter of step 4 is kept"):
        train(run, hooks, engine, report)
    assert_averaged(run, mean(steps[1:4]))


@pytest.mark.parametrize(
    ("stop", "note"),
    [
        (
            None,
            "note: the best evaluation, of step 2, came before averaging began at step 5: the adapter is that step's",
        ),
        (3, "note: the best evaluation, of step 2, came before averaging began at step 5: the adapter is that step's"),
    ],
)
def test_a_best_step_before_averaging_is_reported(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, stop: int | None, note: str
) -> None:
    lines: list[str] = []

    class Script:
        @hookimpl(wrapper=True)
        def evaluate(self, run: Run) -> Generator[None, list[dict[str, float]], list[dict[str, float]]]:
            metrics = yield
            return [{**metrics[0], "eval_loss": abs(run.step - 2.0)}]

        @hookimpl
        def before_clip(self, run: Run) -> None:
            if run.step == stop:
                raise KeyboardInterrupt

    recipe = make_recipe([LORA, {"swa": {"start": 5}}], eval_every=2)
    run, hooks, engine = setup.prepare(recipe, report := Report(quiet=True), False)
    run.say = lines.append
    hooks.register_core(Script(), "script")
    try:
        train(run, hooks, engine, report)
    except Interrupted:
        assert stop
    assert lines.count(note) == 1


def test_it_trains_with_an_adversary_a_teacher_and_adalora(
    make_recipe: Make, watched: Any, tiny_bases: Callable[..., Path], tiny_base: Path
) -> None:
    others = [
        ADALORA,
        {"adversarial": {"method": "fgm", "epsilon": 0.5}},
        {"distillation": {"teacher": str(tiny_bases("teacher", seed=1)), "weight": 0.4}},
    ]
    run, steps = watched(make_recipe([*others, {"ema": {"decay": 0.6}}], steps=8))
    assert run.metrics["best_step"] == 8 and sum(run.strategies[0].ranks().values()) == 14
    assert_averaged(run, ema(steps, 0.6))
    assert run.metrics["eval_loss"] < run.before["eval_loss"]
    pool = AdapterPool(tiny_base, precision="fp32", device="cpu")
    pool.load("a", run.directory / "adapter")


def test_shadows_are_fp32_copies_on_the_same_device(make_recipe: Make) -> None:
    run, _, _ = setup.prepare(make_recipe([LORA, "ema"]), Report(quiet=True), False)
    assert list(run.average.shadows) == run.trainable
    for parameter, shadow in run.average.shadows.items():
        assert shadow.dtype == torch.float32 and shadow.device == parameter.device and shadow.shape == parameter.shape
        assert not shadow.requires_grad and shadow.data_ptr() != parameter.data_ptr()


def test_two_averages_are_refused(make_recipe: Make) -> None:
    with pytest.raises(InputError, match="'ema' .* and strategy 'swa' .* both own the slot 'average': leave one out"):
        tune(make_recipe([LORA, "ema", "swa"]), quiet=True)


@pytest.mark.parametrize("planned", [{"steps": 6}, {"epochs": 2, "steps": None}])
def test_averaging_after_the_end_of_the_run_is_refused_before_the_base_loads(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, planned: dict[str, Any]
) -> None:
    monkeypatch.setattr(setup, "load_base", lambda *a, **k: pytest.fail("the base was loaded"))
    with pytest.raises(InputError, match="'swa' .*: start: averaging would begin at step 7 of 6: lower it"):
        tune(make_recipe([LORA, {"swa": {"start": 7}}], **planned), quiet=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ema", {"decay": 1}, "decay: must be less than 1"),
        ("ema", {"decay": 0}, "decay: must be greater than 0"),
        ("swa", {"start": -0.1}, "start: must be greater than or equal to 0"),
        ("swa", {"start": 2.5}, "start: values of 1 and above are steps and must be integers"),
        ("swa", {"every": 0}, "every: must be greater than or equal to 1"),
    ],
)
def test_options_are_bounded(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_strategy(name, options, lambda *place: "recipe")


def third_party(**calls: Any) -> type[Strategy]:
    """Return a strategy that calls `average_with` in hooks: name of the hook → arguments of each call."""

    class Third(Strategy):
        """Calls `average_with` incorrectly."""

        @hookimpl
        def prepare_model(self, run: Run, model: Any) -> Any:
            for arguments in calls.get("prepare_model", ()):
                run.average_with(lambda shadow, parameter, updates: shadow.copy_(parameter), **arguments)
            return model

        @hookimpl
        def after_optimizer_step(self, run: Run) -> None:
            for arguments in calls.get("after_optimizer_step", ()):
                run.average_with(lambda shadow, parameter, updates: shadow.copy_(parameter), **arguments)

    return Third


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ({"prepare_model": [{}, {}]}, 'the run already has an average; declare slots = ("average",)'),
        ({"prepare_model": [{"every": 0}]}, "start 1 and every 0 must be at least 1"),
        ({"after_optimizer_step": [{}]}, "average_with: call it in prepare_model"),
    ],
)
def test_invalid_averages_name_the_strategy(make_recipe: Make, calls: dict[str, Any], message: str) -> None:
    from budwood.testing.bench import register

    name = register(third_party(**calls))
    with pytest.raises(PluginError) as caught:
        tune(make_recipe([LORA, name]), quiet=True)
    assert f"strategy '{name}'" in str(caught.value) and message in str(caught.value)

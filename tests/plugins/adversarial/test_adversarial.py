"""Adversarial training in runs: refused options, independence from micro-batches, logging, warnings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.processes import run_in_two_processes
from torch import nn

from budwood import Event, Options, PluginError, Strategy, hookimpl
from budwood.contract.loading import build_strategy
from budwood.contract.types import Plan
from budwood.errors import InputError
from budwood.model.text_tasks import CausalLM
from budwood.training.loop import tune
from budwood_adversarial import Adversarial
from budwood_adversarial.noise import measure
from budwood_adversarial.options import DEFAULTS, AdversarialOptions, Scale

from .conftest import Ready

ALL = [
    {"method": "fgm", "epsilon": 0.5},
    {"method": "pgd", "epsilon": 0.5, "steps": 2},
    {"method": "freelb", "epsilon": 0.5, "steps": 2},
    {"method": "smart", "epsilon": 0.02},
    {"method": "vat"},
    {"method": "neftune"},
]


def name(options: dict[str, Any]) -> str:
    return str(options["method"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0}, "adversarial.epsilon: must be greater than 0 (got 0)."),
        ({"epsilon": -1}, "adversarial.epsilon: must be greater than 0 (got -1)."),
        ({"method": "pgd", "steps": 0}, "adversarial.steps: must be greater than or equal to 1 (got 0)."),
        ({"method": "freelb", "steps": 1}, "freelb with steps: 1 would train on random noise alone; use 2 or more."),
        (
            {"method": "fgm", "steps": 3},
            "steps is not an option of fgm (options: epsilon, norm, weight, clean_weight)",
        ),
        ({"method": "neftune", "epsilon": 1.0}, "epsilon is not an option of neftune (options: alpha); remove it."),
        ({"epsilon": 0.1, "relative_epsilon": 0.1}, "epsilon and relative_epsilon are the same size in two units;"),
        ({"method": "neftune", "relative_epsilon": 0.1}, "relative_epsilon is not an option of neftune"),
        ({"relative_epsilon": 0}, "adversarial.relative_epsilon: must be greater than 0 (got 0)."),
        ({"method": "vat", "norm": "linf"}, "norm is not an option of vat"),
        ({"method": "freelb", "clean_weight": 1.0}, "clean_weight is not an option of freelb"),
        ({"method": "fmg"}, "adversarial.method: "),
        ({"epsilom": 1}, "adversarial.epsilom: unknown key. Did you mean 'epsilon'?"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        build_strategy("adversarial", options, "recipe.yaml:7")
    assert str(error.value).startswith("recipe.yaml:7: ")
    assert message in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("method", list(DEFAULTS))
def test_written_options_are_read_again(method: str) -> None:
    options = AdversarialOptions(method=method)
    again = AdversarialOptions.model_validate(options.model_dump(mode="json"))
    assert again == options
    for option in DEFAULTS[method]:
        assert again.value(option, Scale(1.0, 16))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "fgm"}, {"epsilon": 0.2}),
        ({"method": "fgm", "norm": "linf"}, {"epsilon": 0.02 * 2 / 4}),
        ({"method": "pgd", "steps": 5}, {"epsilon": 0.2, "step_size": 0.1}),
        ({"method": "freelb", "relative_epsilon": 0.3, "steps": 2}, {"epsilon": 0.6, "step_size": 0.75}),
        ({"method": "smart"}, {"epsilon": 0.01, "sigma": 0.01, "step_size": 1.0}),
        ({"method": "vat"}, {"epsilon": 0.2, "xi": 0.2}),
        ({"method": "vat", "epsilon": 5.0, "xi": 0.3}, {"epsilon": 5.0, "xi": 0.3}),
    ],
)
def test_sizes_are_relative_to_the_embeddings_unless_given(options: dict[str, Any], expected: dict[str, float]) -> None:
    scale = Scale(norm=2.0, width=16)
    built = AdversarialOptions(**options)
    assert {name: built.value(name, scale) for name in expected} == pytest.approx(expected)


def test_the_scale_is_that_of_what_the_embeddings_return() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 3

    table = Scaled(20_001, 4)
    with torch.no_grad():
        table.weight[7] = 1000.0
    model = SimpleNamespace(get_input_embeddings=lambda: table)
    scale = measure(SimpleNamespace(task=CausalLM(), model=model))
    assert scale.width == 4
    assert scale.norm == pytest.approx(float(3 * table.weight.detach().norm(dim=1).median()), rel=1e-6)
    assert not scale.norm > 10, "the median ignores outliers"


def test_models_without_embeddings_are_refused_before_the_base_loads() -> None:
    class Blind(nn.Module):
        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError

    strategy = Adversarial(AdversarialOptions(skip_masked=True), "adversarial")
    recipe = SimpleNamespace(base=SimpleNamespace(task="sequence-classification"))
    for model in (Blind(), nn.Linear(2, 2)):
        plan = Plan(recipe, [strategy], model=model)
        strategy.check_plan(plan=plan)
        assert len(plan.problems) == 2
        assert "in a classification no token is a label" in plan.problems[0]
        assert f"{type(model).__name__} has no input embeddings to put noise on" in plan.problems[1]
        with pytest.raises(InputError, match="no input embeddings"):
            strategy.prepare_model(run=None, model=model)


def test_noise_on_unused_embeddings_is_an_error() -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.Embedding(4, 2)

        def get_input_embeddings(self) -> nn.Module:
            return self.embeddings

    refused = pytest.raises(InputError, match="Deaf does not call its input embeddings")
    with refused, CausalLM().noisy(Deaf(), torch.zeros(1, 1, 2)):
        pass


@pytest.mark.parametrize("options", ALL, ids=name)
def test_a_step_does_not_depend_on_micro_batches(make_recipe: Callable, options: Any) -> None:
    """Of a classification; `test_conformance` splits the steps of a language model."""
    task = "sequence-classification"
    results = []
    for size in (1024, 160):
        ready = Ready(make_recipe(options, f"run-{size}", base={"task": task}, train={"micro_tokens": size}))
        gradients = ready.step()
        values = {**ready.engine.finish_step(), **ready.run.logged}
        results.append((len(ready.steps), gradients, {key: float(value) for key, value in values.items()}))
    (single, one, logged), (several, other, logged_too) = results
    assert single == 1 < several
    for key, gradient in one.items():
        torch.testing.assert_close(other[key], gradient, atol=1e-5, rtol=1e-4)
    assert logged_too == pytest.approx(logged, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "task"),
    [*((options, "causal-lm") for options in ALL), *((options, "sequence-classification") for options in ALL[2:4])],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_it_trains_on_a_four_bit_base_in_bf16(make_recipe: Callable, options: Any, task: str) -> None:
    base = {"quantization": "nf4", "task": task}
    train = {"precision": "bf16", "gradient_checkpointing": True, "steps": 2}
    run = tune(make_recipe(options, base=base, train=train), quiet=True)
    assert run.metrics["gradient_norm"] > 0
    assert ("adversarial_gain" in run.metrics) == (options["method"] != "neftune")
    if options["method"] in ("fgm", "pgd", "smart", "vat"):
        assert run.metrics["adversarial_gain"] > 0
    log = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    terms = {"smart", "vat"} & {options["method"]} | {task.replace("-", "_"), "loss"}
    assert terms <= log[0].keys()


@pytest.mark.scale
def test_two_processes_equal_one(make_recipe: Callable, tmp_path: Path) -> None:
    options = {"method": "pgd", "epsilon": 0.5, "steps": 2}
    train = {"micro_tokens": 128, "steps": 2}
    one = tune(make_recipe(options, "one", train=train), quiet=True)
    path = tmp_path / "two.yaml"
    path.write_text(make_recipe(options, "two", train=train).to_yaml(), encoding="utf-8")
    run_in_two_processes(
        "import torch\n"
        "from budwood.training.loop import tune\n"
        f"assert tune({str(path)!r}, quiet=True).processes == 2\n",
        tmp_path,
    )
    two = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    for term in ("loss", "adversarial_gain", "gradient_norm"):
        assert two[-1][term] == pytest.approx(one.metrics[term], rel=1e-3)


class Breaks(Strategy):
    """Fails in the second pass of a step."""

    Options = Options
    passes = 0

    @hookimpl(wrapper=True)
    def forward(self, step: Any) -> Any:
        outputs = yield
        self.passes += 1
        if self.passes == 2:
            raise RuntimeError("broken")
        return outputs


@pytest.mark.parametrize("options", ALL[:5], ids=name)
def test_the_model_is_restored_after_an_exception(make_recipe: Callable, options: Any) -> None:
    ready = Ready(make_recipe(options))
    ready.hooks.register_core(Breaks(), "broken")
    with pytest.raises(PluginError, match="broken"):
        ready.step()
    assert not ready.run.model.get_input_embeddings()._forward_hooks
    assert all(parameter.requires_grad for parameter in ready.run.trainable)
    assert ready.engine._pass is None


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"method": "fgm", "epsilon": 1e-6}, "bfloat16 rounds off most noise; raise epsilon"),
        ({"method": "smart", "epsilon": 1e-7}, "bfloat16 rounds off most noise; raise epsilon"),
        ({"method": "fgm", "epsilon": 1000.0, "clean_weight": 0.0, "norm": "linf"}, None),
    ],
)
def test_a_perturbation_without_effect_causes_one_warning(
    make_recipe: Callable, capsys: Any, options: dict[str, Any], cause: str | None
) -> None:
    train = {"precision": "bf16", "steps": 21, "batch_examples": 2, "learning_rate": 1e-4}
    run = tune(make_recipe(options, train=train))
    gain = run.metrics["adversarial_gain"]
    for step in range(22, 46):
        run.hooks.notify(Event("step", step, {"adversarial_gain": gain}), run.say)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "did not raise the loss" in line]
    if cause is None:
        assert not warnings
    else:
        assert len(warnings) == 1
        assert cause in warnings[0]
        assert "in 20 steps" in warnings[0]


def test_a_mask_without_tokens_causes_a_warning(make_recipe: Callable, capsys: Any) -> None:
    ready = Ready(make_recipe({"method": "fgm", "epsilon": 0.5, "skip_special": True}))
    strategy = next(s for s in ready.run.strategies if s.name == "adversarial")
    ready.run.task.special_positions = lambda run, batch: batch.example_of_position >= 0
    lines: list[str] = []
    ready.run.say = lines.append
    ready.step()
    strategy.on_event(event=Event("step", 1, {"adversarial_gain": 0.0}))
    strategy.on_event(event=Event("step", 2, {"adversarial_gain": 0.0}))
    assert not lines
    strategy.on_event(event=Event("step", 3, {"adversarial_gain": 0.0}))
    assert len(lines) == 1
    assert "exclude all tokens from noise" in lines[0]


def test_the_logged_gain_is_the_perturbed_minus_the_clean_loss(make_recipe: Callable) -> None:
    ready = Ready(make_recipe({"method": "fgm", "epsilon": 0.7}, train={"micro_tokens": 200}))
    ready.step()
    assert len(ready.steps) > 1
    clean = float(ready.engine.finish_step()["loss"])
    gain = float(ready.run.logged["adversarial_gain"])
    perturbed = 0.0
    for step in ready.steps:
        step.replay(noise_of(step, 0.7), 1.0)
        perturbed += float(step.loss)
    assert gain == pytest.approx(perturbed - clean, rel=1e-4)
    assert gain > 0.01


def noise_of(step: Any, epsilon: float) -> torch.Tensor:
    """Return FGM's noise, computed in a loop over examples."""
    gradient = step.noise_grad
    noise = torch.zeros_like(gradient).flatten(0, 1)
    for index in range(len(step.batch.keys)):
        positions = step.batch.example_of_position == index
        part = gradient.flatten(0, 1)[positions]
        noise[positions] = epsilon * part / part.norm()
    return noise.view_as(gradient)


def test_a_run_says_the_size_that_follows_from_the_base(make_recipe: Callable, capsys: Any) -> None:
    run = tune(make_recipe({"method": "fgm"}, train={"steps": 1}))
    norm = float(run.model.get_input_embeddings().weight.detach().norm(dim=1).median())
    said = f"adversarial (fgm): epsilon {0.1 * norm:.2g}; the base's embeddings have a median norm of {norm:.2g}"
    assert said in capsys.readouterr().err


def test_it_runs_with_dropout(make_recipe: Callable) -> None:
    strategies = [{"lora": {"rank": 4, "dropout": 0.2}}]
    run = tune(make_recipe(ALL[2], strategies=strategies), quiet=True)
    assert run.step == 3


def test_the_readme_names_every_option() -> None:
    text = (Path(__file__).parents[3] / "plugins" / "adversarial" / "README.md").read_text(encoding="utf-8")
    for option in AdversarialOptions.model_fields:
        assert f"`{option}`" in text

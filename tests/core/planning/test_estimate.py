"""Estimates of memory, time and disk: against real steps, for other devices, and for input that is not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.plan import RECIPES, build, make_base, write_rows
from tests.core.model.test_experts import make_family

from budwood.contract.discovery import PluginError
from budwood.errors import ResourceError
from budwood.planning import admission
from budwood.planning.devices import GIB, Device, find_device
from budwood.planning.estimate import estimate, refusal
from budwood.recipe.schema import Recipe
from budwood.testing.allocations import measured_peak

COMPARED = (
    "lora, nf4, bf16", "lora, fp4, dropout, gradient checkpointing", "adalora, nf4", "lora, adversarial (smart)",
    "lora, dpo", "lora, grpo", "lora, distillation", "lora, sequence-classification",
)  # fmt: skip
CPU = Device("a CPU", "cpu", 64 * GIB)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A small base and rows of every kind."""
    folder = tmp_path_factory.mktemp("plan")
    for seed, part in enumerate(("base", "teacher")):
        make_base(folder / part, hidden=64, inner=172, layers=2, vocabulary=600, seed=seed)
    return folder / "base", write_rows(folder, words=3)


@pytest.fixture
def case(files: tuple[Path, dict[str, Path]], tmp_path: Path) -> Callable[..., Recipe]:
    """Function `case(name, **changes)` -> the recipe of that name with changes to its entry."""

    def make(name: str, **changes: Any) -> Recipe:
        return build({**RECIPES[name], **changes}, *files, tmp_path / "run")

    return make


@pytest.mark.parametrize("name", COMPARED)
def test_the_peak_is_that_of_a_real_run(case: Callable[..., Recipe], name: str):
    """The base is so small that activations are almost all of it; a cache of layouts in bf16 attention is 1.7 MB."""
    planned = estimate(case(name), CPU)
    actual = measured_peak(case(name))
    assert planned.peak == sum(planned.parts.values())
    assert planned.parts["activations"] > planned.peak / 3
    assert planned.peak == pytest.approx(actual, rel=0.05 if "bf16" not in name else 0.12)


def test_the_peak_of_a_mixture_is_that_of_a_real_run(files: tuple[Path, dict[str, Path]], tmp_path: Path):
    make_family("Mixtral", tmp_path / "base")
    recipes = [
        build(RECIPES["lora, fp4, dropout, gradient checkpointing"], tmp_path / "base", files[1], tmp_path / run)
        for run in ("a", "b")
    ]
    planned = estimate(recipes[0], CPU)
    assert "experts: planned with the same number of tokens for each" in planned.notes
    assert planned.parts["base, quantised"] > 0
    assert planned.peak == pytest.approx(measured_peak(recipes[1]), rel=0.12)


def test_what_a_plan_says(case: Callable[..., Recipe]):
    plain = estimate(case("lora"), CPU)
    assert (plain.seconds, plain.steps, plain.fits) == (None, 2, True)
    assert plain.micro_batches > 1 and plain.largest_micro <= 2048
    base = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 172)  # weights: a product each, and one for the inputs' gradient
    assert 0.9 < plain.flops / (4 * base * plain.tokens) < 2  # adapters, attention and the head come on top
    saved = estimate(case("lora", train={"gradient_checkpointing": True}), CPU)
    assert saved.peak < plain.peak and saved.flops > 1.15 * plain.flops
    card = find_device("RTX 4090")
    cuda = estimate(case("lora", quantization="nf4", train={"precision": "auto"}), card)
    assert cuda.parts["CUDA's context"] and cuda.parts["base, quantised"] < plain.parts["base, not quantised"]
    assert cuda.seconds is not None and 0 < cuda.seconds[0] < cuda.seconds[1]
    assert json.loads(json.dumps(cuda.as_dict()))["memory"]["peak_bytes"] == cuda.peak
    assert type(cuda).from_dict(json.loads(json.dumps(cuda.as_dict())), card) == cuda


def test_without_data_the_tokens_decide(case: Callable[..., Recipe]):
    recipe = case("lora, dpo", train={"steps": None, "epochs": 1})
    given = estimate(recipe, CPU, tokens=512)
    assert given.largest_micro <= 512 and given.steps is None
    assert "without data" in given.notes[0]


def test_a_strategy_that_reads_values_is_named(case: Callable[..., Recipe], distribution: Callable[..., Path]):
    distribution(
        "reader",
        """
        class Reader(Strategy):
            '''Reads the loss.'''
            Options = Options
            api = 2

            @hookimpl
            def before_clip(self, run):
                if float(run.trainable[0].grad.sum()) > 0:
                    run.log("positive", 1)
        """,
        {"reader": "Reader"},
    )
    with pytest.raises(PluginError, match=r"strategy 'reader'.*reads the values of tensors.*run\.planning"):
        estimate(case("lora", strategies=[{"lora": {}}, {"reader": {}}]), CPU)


def test_what_cannot_fit_is_refused_before_the_base_loads(case: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch):
    recipe = case("lora")
    tight = estimate(recipe, Device("a small CPU", "cpu", 1 << 20))
    text = refusal(tight, recipe)
    assert not tight.fits
    assert "a small CPU has 1.0 MiB" in text and "GiB are libraries" in text
    small = estimate(recipe, Device("a card", "cuda", 4 * GIB))
    small.parts = {"activations": 3 * GIB, "base, quantised": GIB, "CUDA's context": GIB // 2}
    assert "3.00 GiB are activations: set train.gradient_checkpointing: true" in refusal(small, recipe)
    from budwood.planning import process
    from budwood.training.loop import tune

    planned = []
    monkeypatch.setattr(process, "estimate_in_process", lambda *a, **k: planned.append(a) or tight)
    monkeypatch.setattr("budwood.training.setup.load_base", lambda *a, **k: pytest.fail("the base was loaded"))
    monkeypatch.setattr(admission, "MARGIN", 10**9)
    with pytest.raises(ResourceError, match="memory: the run needs"):
        tune(recipe, quiet=True, planner=admission.admit)
    assert len(planned) == 1
    monkeypatch.setattr(admission, "MARGIN", 4)  # this job is small beside the memory of any machine
    with pytest.raises(BaseException, match="the base was loaded"):
        tune(recipe, quiet=True, planner=admission.admit)
    assert len(planned) == 1

"""The search for settings that fit, with a made-up device."""

from __future__ import annotations

from budwood.planning.devices import GIB, Device
from budwood.planning.estimate import Estimate
from budwood.planning.fit import Fit, fit
from budwood.recipe.schema import Recipe

RECIPE = Recipe.from_dict(
    {
        "base": {"model": "base", "quantization": "none"}, "data": {"train": "rows.jsonl"}, "strategies": ["lora"],
        "train": {"micro_tokens": 4096}, "output": "run",
    }
)  # fmt: skip


def search(memory: float, longest: int = 256, recipe: Recipe = RECIPE) -> Fit:
    """Fit a recipe that needs 4 GiB, and 4 GiB for 1,024 tokens or 0.5 GiB with checkpointing, which takes longer."""
    calls = []

    def estimate(candidate: Recipe) -> Estimate:
        train = candidate.train
        calls.append(train)
        tokens = max(train.micro_tokens, longest)
        work = int(tokens / 1024 * GIB * (0.5 if train.gradient_checkpointing else 4))
        seconds = (4 / 3 if train.gradient_checkpointing else 1) * (100 + 40 * 4096 / tokens)
        return Estimate(
            Device("x", "cuda", int(memory * GIB)), 4 * GIB + work, {"activations": work, "base, quantised": 4 * GIB},
            "", (0, ""), 0, 1.0, 1.0, 1.0, 4096.0, 1.0, tokens, 10, (seconds, 2 * seconds), 0, 0, 0,
        )  # fmt: skip

    found = fit(recipe, estimate)
    assert len(calls) == len(found.candidates) <= 8
    return found


def test_a_recipe_that_fits_is_left_alone():
    found = search(24)
    assert found.chosen is not None and found.chosen.changes == {} and len(found.candidates) == 1


def test_the_fastest_setting_that_fits_is_chosen():
    found = search(14)  # 2,380 tokens fit as they are; all with checkpointing, which takes longer
    assert found.chosen is not None
    assert found.chosen.overrides == "-o train.micro_tokens=2368"
    assert {c.changes.get("gradient_checkpointing") for c in found.candidates if c.estimate.fits} == {None, True}


def test_small_micro_batches_are_slower_than_checkpointing():
    found = search(6.5)
    assert found.chosen is not None and found.chosen.overrides == "-o train.gradient_checkpointing=true"


def test_what_nothing_can_fix_is_said():
    found = search(4.05, longest=2048)
    assert found.chosen is None
    assert "base, quantised 4.00 GiB" in found.reason and "data.max_length" in found.reason
    assert "quantization: nf4" in found.reason
    assert "the parts that no setting changes exceed it" in search(3).reason

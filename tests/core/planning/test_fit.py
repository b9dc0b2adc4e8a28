"""The search for settings that fit, with a made-up device."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from budwood.errors import InputError, ResourceError
from budwood.planning import frontier
from budwood.planning.estimate import Estimate, advice
from budwood.planning.fit import Fit, changed, fit
from budwood.planning.frontier import draw, fit_run, free_path, show_fit, write_recipe
from budwood.planning.options import GIB, Device, allowed
from budwood.planning.table import show_estimate
from budwood.recipe.schema import Recipe, load_recipe

RECIPE = Recipe.from_dict(
    {
        "base": {"model": "base", "quantization": "none"}, "data": {"train": "rows.jsonl", "max_length": 2048},
        "strategies": [{"lora": {"rank": 64}}], "train": {"micro_tokens": 4096}, "output": "run",
    }
)  # fmt: skip


def estimates(memory: float, longest: int) -> Callable[[Recipe], Estimate]:
    """Return an estimate of 4 GiB for the base (1 in nf4), 16 MiB for each rank, and 4 GiB for 1,024 tokens.

    With all of 8 layers recomputed, which takes longer, the tokens need an eighth, and an eighth of that with their
    inputs on the host. The size of micro-batches and the number of layers are chosen as in a plan.
    """

    def estimate(recipe: Recipe) -> Estimate:
        given = recipe.train.gradient_checkpointing
        if given == "auto":
            sized = [with_layers(recipe, count) for count in range(9)]
            return next((e for e in sized if e.fits and (e.largest_micro >= 2048 or e.recomputed == 8)), sized[-1])
        return with_layers(recipe, 8 * given if isinstance(given, bool) else given)

    def with_layers(recipe: Recipe, count: int) -> Estimate:
        train, each = recipe.train, GIB / 1024 * (4 - 3.5 * count / 8)
        each /= 8 if train.activation_offloading else 1
        least = min(longest, recipe.data.max_length or longest)
        base = GIB * (1 if recipe.base.quantization == "nf4" else 4)
        trained = int(recipe.strategies[0].options["rank"]) << 24
        trained //= 4 if recipe.strategies[-1].name == "adamw-8bit" else 1
        room = int((0.9 * memory * GIB - base - trained) / each) // 64 * 64
        tokens = max(train.micro_tokens or min(room, 4096), least)
        work = int(tokens * each)
        seconds = (1 + count / 24) * (100 + 40 * 4096 / tokens)
        parts = {"activations": work, "base, quantised": base, "optimizer": trained}
        return Estimate(
            Device("x", "cuda", int(memory * GIB)), base + trained + work, parts, "", (0, ""), 0, 1.0, 1.0, 1.0, 4096.0,
            1.0, tokens, 10, (seconds, 2 * seconds), 0, 0, 0, micro_tokens=tokens,
            recomputed=count, layers=8,
        )  # fmt: skip

    return estimate


def search(memory: float, longest: int = 256, allow: tuple[str, ...] = (), recipe: Recipe = RECIPE) -> Fit:
    found = fit(recipe, estimates(memory, longest), allow)
    assert len(found.candidates) <= 11
    return found


def overrides(found: Fit) -> str:
    assert found.chosen is not None
    return found.chosen.overrides


def test_a_recipe_that_fits_is_left_alone() -> None:
    found = search(24)
    assert overrides(found) == "" and len(found.candidates) == 1


def test_the_fastest_setting_that_fits_is_chosen() -> None:
    found = search(16)  # 2,400 tokens fit as they are; all with checkpointing, which takes longer
    assert overrides(found) == "-o train.micro_tokens=2368"
    assert [c.overrides for c in found.candidates] == ["", "-o train.micro_tokens=2368"]  # auto is the same
    assert overrides(search(13)) == "-o train.gradient_checkpointing=2 -o train.micro_tokens=2176"
    some = changed(RECIPE, {"train.gradient_checkpointing": 1})
    assert overrides(search(13, recipe=some)) == "-o train.gradient_checkpointing=2 -o train.micro_tokens=2176"
    auto = changed(RECIPE, {"train.gradient_checkpointing": "auto"})
    assert overrides(search(15, recipe=auto)) == ""
    left_open = changed(RECIPE, {"train.micro_tokens": None})
    assert overrides(search(24, recipe=left_open)) == overrides(search(16, recipe=left_open)) == ""
    small = "-o train.gradient_checkpointing=7 -o train.micro_tokens=2368"
    assert overrides(search(8)) == small  # small micro-batches are slower


def test_inputs_of_layers_leave_the_device_where_nothing_else_fits() -> None:
    settings = "train.gradient_checkpointing=true -o train.activation_offloading=true -o train.micro_tokens=256"
    found = search(5.1)
    assert overrides(found) == f"-o {settings}" and [c.estimate.fits for c in found.candidates] == [False] * 3 + [True]
    assert found.fitted is not None and found.fitted.train.activation_offloading
    recomputes = changed(RECIPE, {"train.gradient_checkpointing": True})
    assert overrides(search(5.1, recipe=recomputes)) == "-o train.activation_offloading=true -o train.micro_tokens=256"
    on_cpu = fit(RECIPE, lambda recipe: replace(estimates(5.1, 256)(recipe), device=Device("x", "cpu", 5 * GIB)))
    assert not any("offloading" in c.overrides for c in on_cpu.candidates)


def test_what_changes_the_result_is_only_suggested() -> None:
    found = search(3.5)
    assert found.chosen is None and found.fitted is None
    assert "base, quantised 4.00 GiB" in found.reason
    assert [c.alters for c in found.suggestions] == [("quantization",)]
    console = Console(file=io.StringIO(), width=200)
    show_fit(found, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "--allow quantization makes the change" in printed and "█" in printed
    assert "would fit: -o base.quantization=nf4 -o train.micro_tokens=2304" in printed
    found = search(3.5, allow=("quantization",))
    assert "base.quantization=nf4" in overrides(found) and found.fitted is not None
    assert found.fitted.base.quantization == "nf4" and not found.fitted.train.gradient_checkpointing
    assert found.fitted.strategies[0].options == {"rank": 64}


def test_rank_and_length() -> None:
    found = search(5.1, longest=2048)
    assert found.chosen is None
    assert [c.alters for c in found.suggestions] == [("optimizer",), ("quantization",), ("rank",), ("max_length",)]
    fitted = search(5.1, longest=2048, allow=("rank",)).fitted
    assert fitted is not None and 4 <= fitted.strategies[0].options["rank"] < 64
    fitted = search(5.1, longest=2048, allow=("max_length",)).fitted
    assert fitted is not None and 64 <= (fitted.data.max_length or 0) < 2048


def test_an_optimizer_with_smaller_states() -> None:
    found = search(5.1, longest=2048, allow=("optimizer",))
    assert found.fitted is not None and [s.name for s in found.fitted.strategies] == ["lora", "adamw-8bit"]
    given = """-o 'strategies=[{"lora": {"rank": 64}}, "adamw-8bit"]'"""
    assert given in overrides(found)
    again = Recipe.from_dict(RECIPE.to_dict(), [shlex.split(given)[1]])
    assert again.strategies == found.fitted.strategies
    json.dumps(found.as_dict())
    assert not any("optimizer" in c.alters for c in search(5.1, longest=2048, recipe=found.fitted).candidates)


def test_what_is_needed_whatever_changes_ends_the_search_at_once() -> None:
    found = search(0.9, recipe=changed(RECIPE, {"base.quantization": "nf4"}))
    assert found.chosen is None and len(found.candidates) == 1
    assert "base, quantised 1.00 GiB" in found.reason


def test_several_together_and_what_nothing_can_fix() -> None:
    found = search(1.5, longest=2048, allow=("quantization", "rank", "max_length"))
    assert found.chosen is not None and len(found.chosen.alters) > 1
    found = search(0.5, longest=2048, allow=("quantization", "rank", "max_length"))
    assert found.chosen is None and not found.suggestions
    assert "take a smaller base" in frontier.verdict(found)[-1]


def test_the_work_of_a_step_is_named_first_where_less_of_it_can_be_enough() -> None:
    """The base is the largest part; a device that is only a little too small needs no smaller one."""
    plan = replace(estimates(24, 1024)(RECIPE), layers=8, recomputed=0)
    plan.peak, plan.parts = 8 * GIB, {"base, quantised": 5 * GIB, "activations": 3 * GIB}
    recipe = changed(RECIPE, {"base.quantization": "nf4"})
    for memory, remedy in ((6, "set train.gradient_checkpointing: true"), (5, "take a smaller base")):
        plan.device = Device("a card", "cuda", memory * GIB)
        assert remedy in advice(plan, recipe)


def test_names_of_changes() -> None:
    assert allowed("rank, max_length") == {"rank", "max_length"} and allowed("") == set()
    with pytest.raises(InputError, match=r"--allow: 'ranks' is not known. Did you mean 'rank'\?"):
        allowed("ranks")


def test_the_files(tmp_path: Path) -> None:
    found = search(16)
    path = free_path(tmp_path / "mine.yaml", ".yaml")
    assert path.name == "mine-fit.yaml"
    write_recipe(found, path)
    (tmp_path / "rows.jsonl").touch()
    again = load_recipe(path, [f"data.train={tmp_path / 'rows.jsonl'}"])
    assert again.train.micro_tokens == 2368 and again.strategies == RECIPE.strategies
    assert free_path(tmp_path / "mine.yaml", ".yaml").name == "mine-fit-2.yaml"
    with pytest.raises(InputError, match="exists"):
        write_recipe(found, path)
    draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_with_the_settings_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    def estimate(recipe: Recipe, device: Device, keep: bool) -> Estimate:
        assert keep and device.kind == "cpu"
        return estimates(device.memory / GIB, 256)(recipe)

    monkeypatch.setattr(frontier, "estimate_in_process", estimate)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options: Any = {"allow": (), "say": lines.append}
    assert fit_run(RECIPE, "16GiB", **options).train.micro_tokens == 2368
    left_open = changed(RECIPE, {"train.micro_tokens": None, "train.gradient_checkpointing": "auto"})
    train = fit_run(left_open, "13GiB", **options).train  # this machine may have more
    assert (train.micro_tokens, train.gradient_checkpointing) == (2176, 2)
    assert lines[0].startswith("fit: ") and "-o train.micro_tokens=2368" in lines[0]
    with pytest.raises(ResourceError, match="nothing fits without changing the result: .*--allow quantization"):
        fit_run(RECIPE, "3.5GiB", **options)


@pytest.mark.parametrize(("kind", "held"), [("cpu", "libraries 0.56 GiB"), ("cuda", "CUDA's context 0.50 GiB")])
def test_where_libraries_alone_do_not_fit_no_setting_is_advised(kind: str, held: str) -> None:
    plan = replace(estimates(24, 1024)(RECIPE), device=Device("small", kind, GIB // 4), layers=8, recomputed=0)
    plan.peak, plan.parts = GIB // 2, {"CUDA's context": GIB // 2} if kind == "cuda" else {"activations": 1000}
    plan.host = 2 * GIB // 3
    assert advice(plan, RECIPE) == f"libraries alone take {held[-8:]}: take a device with more memory"
    found = fit(RECIPE, lambda recipe: plan)
    assert held in found.reason
    console = Console(file=io.StringIO(), width=200)
    show_estimate(plan, RECIPE, console, advised=False)
    assert "does not fit" in (printed := console.file.getvalue()) and "take" not in printed  # type: ignore[attr-defined]

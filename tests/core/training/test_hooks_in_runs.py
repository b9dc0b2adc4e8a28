"""A plugin that fails in each hook in turn, in real runs and on live models; and the cost of hooks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from budwood import BudwoodError, PluginError, hookimpl, tune
from budwood.adapters.export import export
from budwood.cli import app as cli
from budwood.contract.hookspecs import HookSpecs
from budwood.contract.loading import CORE, HOOKS
from budwood.serving.material.combine import combine
from budwood.serving.pool import AdapterPool

OWNERS = [hook for hook in HOOKS if getattr(HookSpecs, hook).call_style == "adapter owner"]
BEFORE = HOOKS[: HOOKS.index("prepare_batch")]
STEPS = HOOKS[HOOKS.index("prepare_batch") : HOOKS.index("after_optimizer_step") + 1]

FAILS = """
class Fails(Strategy):
    @hookimpl{mark}
    def {hook}(self):
        raise ArithmeticError("no\\nmore")
        {rest}
"""
PAIRED = """
    @hookimpl
    def {other}(self):
        return {returned}
"""
OTHER = {
    "state_dict": ("load_state_dict", "None"),
    "load_state_dict": ("state_dict", "{}"),
    "step_values": ("step_terms", "None"),
    "step_terms": ("step_values", "{'x': __import__('torch').ones(1)}"),
}
"""The other hook of a pair, and its return value."""
RESUMED = """
    @hookimpl
    def before_clip(self, run):
        if run.step == 1:
            raise ValueError("stop here")
"""


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook not in (*OWNERS, "planned_examples")])
def test_a_plugin_that_fails_in_a_hook_of_a_run_is_named(hook, distribution, make_recipe, capsys):
    own = hook in CORE
    source = FAILS.format(hook=hook, mark="(wrapper=True)" if own else "", rest="yield" if own else "")
    if hook in OTHER:
        source += PAIRED.format(other=OTHER[hook][0], returned=OTHER[hook][1])
    source += RESUMED if hook == "load_state_dict" else ""
    distribution("sprout", source, {"fails": "Fails"})
    train = {"steps": 2, "save_every": 1}
    recipe = make_recipe(strategies=[{"lora": {"rank": 2}}, "fails"], evaluate=True, train=train)
    who = "strategy 'fails' (sprout 1.0)"
    if hook == "on_event":
        tune(recipe)
        said = capsys.readouterr().err
        assert said.count(f"{who} failed in on_event and is disabled: ArithmeticError: no") == 1
        assert (recipe.output / "adapter" / "adapter_config.json").exists()
        return
    if hook == "load_state_dict":
        with pytest.raises(PluginError, match="stop here"):
            tune(recipe, quiet=True)
    with pytest.raises(PluginError) as error:
        tune(recipe, quiet=True, resume=hook == "load_state_dict")
    when = "" if hook in BEFORE else ", step 1" if hook in STEPS else ", after step "
    assert str(error.value).startswith(f"{who}, hook {hook}{when}")
    assert ": ArithmeticError: no. Report it to its author; --debug shows the traceback" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_adapter_is_kept_when_a_later_step_fails(distribution, make_recipe):
    source = """
        class Fails(Strategy):
            @hookimpl
            def before_clip(self, run):
                if run.step == 2:
                    raise ArithmeticError("no")
    """
    distribution("sprout", source, {"fails": "Fails"})
    recipe = make_recipe(strategies=[{"lora": {"rank": 2}}, "fails"])
    with pytest.raises(
        PluginError, match="hook before_clip, step 3: ArithmeticError: no.* the adapter of step 2 is kept"
    ):
        tune(recipe, quiet=True)
    assert (recipe.output / "adapter" / "adapter_config.json").exists()


def test_an_autograd_error_names_the_loss_terms(distribution, make_recipe):
    source = """
        import torch
        from budwood import LossTerm

        class Mine(Strategy):
            @hookimpl
            def loss_terms(self, step, outputs):
                scale = torch.ones(3)
                values = outputs.hidden.square().mean() * (scale * outputs.hidden.mean()).square().sum()
                scale.add_(1)  # overwrites a tensor saved for the backward pass
                return LossTerm("mine", values, "step")
    """
    distribution("sprout", source, {"mine": "Mine"})
    recipe = make_recipe(strategies=[{"lora": {"rank": 2}}, "mine"])
    message = r"^step 1: the backward pass of the loss terms 'causal_lm' of task 'causal-lm' \(budwood .*\), "
    with pytest.raises(
        PluginError, match=message + r"'mine' of strategy 'mine' \(sprout 1.0\) failed: RuntimeError: one of"
    ):
        tune(recipe, quiet=True)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (
            "LossTerm('causal_lm', zero, 'step')",
            "task 'causal-lm' .* and strategy 'mine' .*: two loss terms are called",
        ),
        ("[LossTerm('x', zero, 'step')] * 2", "two loss terms are called 'x': rename one"),
        (
            "LossTerm('x', zero, 'label')",
            r"strategy 'mine' \(sprout 1.0\): loss term 'x' of loss_terms: values must be",
        ),
        (
            "LossTerm('x', 0.0, 'step')",
            r"strategy 'mine' \(sprout 1.0\), hook loss_terms, step 1: returned a LossTerm; it",
        ),
        (
            "LossTerm('x', zero.long(), 'step')",
            "each with a name, a floating-point tensor of values, a unit and",
        ),
        ("LossTerm('x', zero, 'stepp')", r"of unit 'example' or .* of unit 'step', not \[\] of unit 'stepp'"),
        (
            "LossTerm('loss', zero, 'step')",
            r"'mine' \(sprout 1.0\), hook loss_terms, step 1: 'loss' is one of core's own metrics",
        ),
    ],
)
def test_an_invalid_loss_term_names_its_strategy(distribution, make_recipe, terms, message):
    source = f"""
        import torch
        from budwood import LossTerm

        class Mine(Strategy):
            @hookimpl
            def loss_terms(self, step, outputs):
                zero = torch.zeros(())
                return {terms}
    """
    distribution("sprout", source, {"mine": "Mine"})
    with pytest.raises(PluginError, match=message):
        tune(make_recipe(strategies=[{"lora": {"rank": 2}}, "mine"]), quiet=True)


@pytest.mark.parametrize("hook", OWNERS)
def test_a_plugin_that_fails_on_a_live_model_is_named(hook, tiny_base, make_recipe, tmp_path, monkeypatch):
    import budwood_lora

    tune(recipe := make_recipe(train={"steps": 1}), quiet=True)
    saved = recipe.output / "adapter"
    pool = AdapterPool(tiny_base, precision="fp32")
    if hook in ("attach_adapter", "use_adapters", "detach_adapter"):  # as of an owner without entries for the table
        monkeypatch.setattr(budwood_lora.LoRA, "live_adapter", hookimpl(lambda self: None))
    if hook in ("detach_adapter", "merge_adapter"):
        pool.load("first", saved)

    @hookimpl
    def fails(self):
        raise ArithmeticError("no")

    monkeypatch.setattr(budwood_lora.LoRA, hook, fails, raising=False)
    does: dict[str, Callable[[], Any]] = {
        "attach_adapter": lambda: pool.load("first", saved),
        "live_adapter": lambda: pool.load("first", saved),
        "use_adapters": lambda: pool.load("first", saved),
        "detach_adapter": lambda: pool.unload("first"),
        "convert_adapter": lambda: export(saved, tmp_path / "other", "adalora"),
        "combine_adapters": lambda: combine([saved, saved], tmp_path / "other"),
        "merge_adapter": lambda: pool.merge("first"),
    }
    with pytest.raises(
        BudwoodError, match=rf"strategy 'lora' \(budwood .*\), hook {hook}: ArithmeticError: no\. This is a bug"
    ):
        does[hook]()


def test_the_manifest_records_the_cost_of_hooks(make_recipe):
    tune(recipe := make_recipe(evaluate=True), quiet=True)
    manifest = json.loads((recipe.output / "manifest.json").read_text())
    rows = {(row["owner"], row["hook"]): row for row in manifest["hooks"]}
    assert {
        ("lora", "prepare_model"),
        ("lora", "export"),
        ("core", "load_base"),
        ("task causal-lm", "evaluate"),
    } <= set(rows)
    assert rows["core", "backward"]["calls"] == rows["task causal-lm", "forward"]["calls"] == 4
    assert rows["core", "backward"]["seconds"] >= rows["task causal-lm", "forward"]["seconds"]
    assert 0 < sum(row["own_seconds"] for row in manifest["hooks"]) <= manifest["seconds"]
    assert {("core", name) for name in ("startup", "setup", "read_data", "steps", "finish")} <= set(rows)
    grown = [row["peak_growth_bytes"] for row in manifest["hooks"]]
    assert all(isinstance(bytes_, int) and bytes_ >= 0 for bytes_ in grown)


def test_every_second_of_a_command_is_in_a_row(make_recipe, tmp_path):
    """From the start of the process: imports, checks, the base, steps and the final writes."""
    recipe = make_recipe(evaluate=True)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "budwood", "tune", str(tmp_path / "recipe.yaml")], check=True)
    ended = time.perf_counter() - started
    manifest = json.loads((recipe.output / "manifest.json").read_text())
    rows = sum(row["own_seconds"] for row in manifest["hooks"])
    assert 0.97 * manifest["seconds"] < rows <= manifest["seconds"] <= ended + 0.1
    startup = next(row for row in manifest["hooks"] if row["hook"] == "startup")
    assert sys.platform != "linux" or startup["seconds"] > 0


@pytest.mark.parametrize(
    ("end", "train"),
    [({"interrupt": {"step": 3}}, {}), ({"poison": {"step": 2, "example": 3}}, {"batch_examples": 24})],
    ids=["interrupted", "diverged"],
)
def test_writing_the_adapter_of_a_run_that_ends_early_is_in_a_row(
    make_recipe: Any, test_strategies: Any, end: dict[str, Any], train: dict[str, Any]
) -> None:
    recipe = make_recipe(strategies=["lora", end], evaluate=True, train={"eval_every": 1, **train})
    with pytest.raises(BudwoodError, match="step 2 is kept in"):
        tune(recipe, quiet=True)
    rows = {
        (row["owner"], row["hook"]): row for row in json.loads((recipe.output / "manifest.json").read_text())["hooks"]
    }
    assert rows["core", "finish"]["seconds"] >= rows["lora", "export"]["seconds"] > 0, "export is a part of it"


def test_a_profile_is_shown_with_memory(make_recipe, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")  # lines are not wrapped in a narrow terminal
    tune(recipe := make_recipe(), profile=True)
    manifest = json.loads((recipe.output / "manifest.json").read_text())
    assert all(isinstance(row["peak_growth_bytes"], int) for row in manifest["hooks"])
    lines = capsys.readouterr().err.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("owner "))
    table = lines[start + 1 :]
    assert len(table) == len(manifest["hooks"]) + 1 and table[-1].split()[:2] == ["core", "everything"]
    shares = [float(share.rstrip("%")) for line in table for share in line.split() if share.endswith("%")]
    assert shares[:-1] == sorted(shares[:-1], reverse=True) and 98 < sum(shares) < 102


def run_command(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    """Run `budwood tune` in this process; return the exit code."""
    monkeypatch.setattr(cli, "silence_libraries", lambda debug: None)
    monkeypatch.setenv("BUDWOOD_DEBUG", "")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    return cli.run(["tune", str(path), *more])


def failing(hook: str, error: str) -> str:
    """Return the source of a strategy whose `hook` raises `error`."""
    return f"class Fails(Strategy):\n    @hookimpl\n    def {hook}(self):\n        raise {error}\n"


@pytest.mark.parametrize(
    ("hook", "error", "code", "message"),
    [
        ("prepare_model", "KeyError('x')", 3, "error: WHO, hook prepare_model: KeyError: 'x'. Report it to its author"),
        ("prepare_model", "SystemExit(0)", 3, "error: WHO, hook prepare_model: SystemExit: 0. Report it"),
        ("prepare_model", "MemoryError", 3, "error: out of memory in WHO, hook prepare_model: lower train."),
        ("before_clip", "MemoryError", 3, "error: step 1: out of memory in WHO, hook before_clip, step 1 (Memory"),
        ("prepare_model", "OSError(28, 'No space', '/x')", 3, "error: /x: No space in WHO, hook prepare_model.\n"),
        ("prepare_model", "__import__('budwood').InputError('x: is wrong.')", 2, "error: x: is wrong.\n"),
        ("before_clip", "__import__('budwood').DivergedError('all is zero')", 5, "error: all is zero; "),
    ],
)  # fmt: skip
def test_the_command_ends_with_the_code_of_the_error(
    hook, error, code, message, distribution, make_recipe, tmp_path, monkeypatch, capsys
):
    distribution("sprout", failing(hook, error), {"fails": "Fails"})
    recipe = make_recipe(strategies=[{"lora": {"rank": 2}}, "fails"])
    assert run_command(recipe, tmp_path, monkeypatch) == code
    shown = capsys.readouterr().err
    assert message.replace("WHO", "strategy 'fails' (sprout 1.0)") in shown and "Traceback" not in shown


def test_debug_shows_the_authors_traceback(distribution, make_recipe, tmp_path, monkeypatch, capsys):
    observer = failing("on_event", "ConnectionError('gone')").replace("Fails", "Sees")
    folder = distribution(
        "sprout", failing("before_clip", "KeyError('x')") + observer, {"fails": "Fails", "sees": "Sees"}
    )
    recipe = make_recipe(strategies=[{"lora": {"rank": 2}}, "fails", "sees"])
    assert run_command(recipe, tmp_path, monkeypatch, "--debug") == 3
    shown = capsys.readouterr().err
    assert "strategy 'sees' (sprout 1.0) failed in on_event and is disabled: ConnectionError: gone" in shown
    for line in ("raise KeyError('x')", "raise ConnectionError('gone')"):
        assert line in shown
    assert shown.count(f'File "{folder}/sprout.py"') == 2


def test_a_broken_plugin_matters_only_in_recipes_that_name_it(distribution, make_recipe, tmp_path, monkeypatch, capsys):
    distribution("broken", "raise RuntimeError('no GPU')", {"broken": "Broken"})
    distribution("shapeless", "class Shapeless: pass", {"shapeless": "Shapeless"}, "budwood.formats")
    distribution(
        "older", "from budwood import Attack\nclass Older(Attack): api = 0", {"older": "Older"}, "budwood.attacks"
    )
    lora = {"lora": {"rank": 2}}
    assert run_command(make_recipe(strategies=[lora]), tmp_path, monkeypatch) == 0
    capsys.readouterr()
    recipe = make_recipe(strategies=[lora, "broken"], output="other")
    assert run_command(recipe, tmp_path, monkeypatch) == 3
    assert "error: plugin 'broken' of broken 1.0 (broken:Broken) cannot be imported: RuntimeError: no GPU. " in (
        capsys.readouterr().err
    )
    assert not recipe.output.exists()

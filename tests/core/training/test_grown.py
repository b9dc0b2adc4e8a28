"""`adapter: DIR` with a higher rank: the run starts from the same model, and its adapter has the rank everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.core.model.test_experts import make_family
from transformers import AutoModelForCausalLM

from budwood.adapters.store import read_adapter
from budwood.cli.app import run as command
from budwood.errors import InputError
from budwood.planning.composition import plan
from budwood.planning.rehearsal import rehearse
from budwood.recipe.schema import Recipe
from budwood.serving.verify import verify
from budwood.training import loop, setup
from budwood.training.loop import tune
from budwood.training.report import Report
from budwood_lora.adapter import merge

IDS = torch.arange(3, 23)[None]
EXPERTS = {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
PATTERN = {"r": 2, "lora_alpha": 6, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 5}}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "patterns": (
        {**PATTERN, "target_modules": ["q_proj", "v_proj"]}, {"init": "gaussian"},
        "rank 2 to 3 grown to 7, with the same effect: new columns of B are 0, the others times 1.944 to 3.5, as the "
        "scale is now 0.8571 (alpha 5 to 6 changed to 6)",
    ),
    "dora": (
        {"r": 4, "lora_alpha": 8, "use_dora": True, "use_rslora": True, "target_modules": ["q_proj"]}, {"alpha": 14},
        "rank 4 grown to 7, with the same effect: new columns of B are 0, the others times 0.7559, as the scale is now "
        "5.292 (alpha 8 changed to 14)",
    ),
    "bias": ({"r": 4, "lora_alpha": 8, "lora_bias": True, "target_modules": ["q_proj"]}, {}, "rank 4 grown to 7"),
    "experts": ({"r": 3, "lora_alpha": 12, **EXPERTS}, {}, "rank 3 grown to 7"),
}  # fmt: skip


class Killed(BaseException):
    """Simulates a killed process."""


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(IDS, use_cache=False).logits
    return result


def base_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def stock(base: Path, folder: Path, **config: Any) -> torch.Tensor:
    """Save an adapter of stock PEFT; returns its logits."""
    torch.manual_seed(1)
    model = get_peft_model(base_of(base), LoraConfig(init_lora_weights=False, **config))
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_grown_adapter_starts_as_it_was_and_trains_on(
    name: str, make_recipe: Any, tiny_base: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config, options, line = VARIANTS[name]
    base = tiny_base
    if name == "experts":
        from transformers import AutoTokenizer

        base = tmp_path / "base"
        make_family("Qwen3Moe", base)
        AutoTokenizer.from_pretrained(tiny_base).save_pretrained(base)
    parent = stock(base, tmp_path / "parent", **config)
    assert (parent - logits(base_of(base))).abs().max() > 0.05
    strategies = [{"lora": {"rank": 7, **options}}]
    recipe = make_recipe("child", strategies=strategies, base={"model": str(base)}, train={"steps": 2, "save_every": 1})
    recipe = Recipe.from_dict({**recipe.to_dict(), "adapter": str(tmp_path / "parent")})
    with rehearse(recipe, torch.float32) as rehearsed:
        planned = [tuple(p.shape) for p in rehearsed.run.trainable]
    run, hooks, engine = setup.prepare(recipe, Report(quiet=True), overwrite=True)
    assert [tuple(p.shape) for p in run.trainable] == planned
    assert {p.dtype for p in run.trainable} == {torch.float32}
    torch.testing.assert_close(logits(run.model), parent, atol=1e-5, rtol=1e-5)
    assert [text for text in said if line in text]
    loop.train(run, hooks, engine, Report(quiet=True))
    starts = {id(parameter): start for parameter, start in zip(run.trainable, run.start, strict=True)}
    for group, axis in (("lora_A", 1), ("lora_B", 0)) if name != "experts" else ():  # no token comes to some experts
        parameters = next(found.parameters for found in run.groups if found.name == group)
        factors = [parameter for path, parameter in parameters.items() if path.endswith(group)]
        assert factors and all((p != starts[id(p)]).any(axis).all() for p in factors), "new rows and columns train too"

    child, trained = run.directory / "adapter", logits(run.model)
    saved = read_adapter(child)
    assert saved.config["r"] == 7 and not saved.config["rank_pattern"] and not saved.config["alpha_pattern"]
    ranks = [config["r"], *config.get("rank_pattern", {}).values()]
    assert saved.manifest is not None and saved.manifest.grown_from == [min(ranks), max(ranks)]
    assert saved.manifest.parent == read_adapter(tmp_path / "parent").hashes
    assert json.loads((run.directory / "manifest.json").read_text())["grown_from"] == saved.manifest.grown_from
    assert verify(child).exact
    peer = PeftModel.from_pretrained(base_of(base), child)
    torch.testing.assert_close(logits(peer), trained, atol=1e-5, rtol=1e-5)
    if name != "bias":  # the base has no biases to merge into
        merge(run.model, "default")
        torch.testing.assert_close(logits(run.model), trained, atol=1e-5, rtol=1e-5)
    if name != "patterns":
        return

    assert command(["adapter", "info", str(child)]) == 0
    assert ", grown from rank 2 to 3\n" in capsys.readouterr().out
    files = {path.name: path.read_bytes() for path in child.iterdir()}
    original: Callable[[Any], None] = loop.sum_gradients

    def die(run: Any) -> None:
        if run.step == 1:
            raise Killed
        original(run)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "sum_gradients", die)
        tune(recipe, quiet=True, overwrite=True)
    resumed = tune(recipe, quiet=True, resume=True)
    assert {path.name: path.read_bytes() for path in (resumed.directory / "adapter").iterdir()} == files


def test_what_does_not_raise_the_rank_is_refused_before_the_base_loads(
    make_recipe: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock(tiny_base, tmp_path / "parent", **PATTERN, target_modules=["q_proj", "v_proj"])
    monkeypatch.setattr(setup, "load_base", lambda *_: pytest.fail("the base loads"))

    def recipe(**options: Any) -> Recipe:
        plain = make_recipe("child", strategies=[{"lora": options}])
        return Recipe.from_dict({**plain.to_dict(), "adapter": str(tmp_path / "parent")})

    shrink = rf"leave it out, or lower it first, which is lossy: budwood adapter shrink {tmp_path}/parent OUT --rank 1"
    for options, message in (
        ({"rank": 1}, rf"rank: 1 is lower than that of 'model\.layers\.0\.self_attn\.v_proj' in .*, 3: {shrink}"),
        ({"alpha": 5}, "alpha: 5 contradicts the adapter in .*, which has 6: leave it out, or raise the rank as well"),
        ({"init": "gaussian"}, "init: the run continues an adapter, which is not initialised"),
        ({"rank": 7, "rslora": True}, r"rslora: True contradicts the adapter in .*, which has False: leave it out"),
    ):
        with pytest.raises(InputError, match=message) as refusal:
            tune(recipe(**options), quiet=True, overwrite=True)
        assert "\n" not in str(refusal.value)
    shown = plan(recipe(rank=1))
    assert shown.exit_code == 2 and "rank: 1 is lower" in shown.problems[0]
    assert not plan(recipe(rank=2)).problems, "the file's own r keeps all ranks"

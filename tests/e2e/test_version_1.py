"""Strategies of version 1 of the contract, unchanged: they plan, train, resume, save, load, merge and share a batch."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from budwood import AdapterPool, plan, tune
from budwood.contract.loading import load_strategy
from budwood.serving.merge import merge
from budwood.testing.files import Files, make_files
from budwood.training import loop
from budwood.training.evaluate import evaluate_adapter

PACKAGES = Path(__file__).parents[1] / "fixtures" / "version_1"
MODULES = ("budwood_base_kl", "budwood_scaling")


@pytest.fixture(scope="module")
def files() -> Files:
    return make_files("causal-lm")


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the packages on the path, with the metadata that an installer derives from pyproject.toml."""
    for source in sorted(path for path in PACKAGES.iterdir() if path.is_dir()):
        project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        module, folder = project["name"].replace("-", "_"), tmp_path / "site" / project["name"]
        shutil.copytree(source / module, folder / module)
        info = folder / f"{module}-{project['version']}.dist-info"
        info.mkdir()
        head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        (info / "METADATA").write_text(head, encoding="utf-8")
        points = [f"{key} = {value}" for key, value in project["entry-points"]["budwood"].items()]
        (info / "entry_points.txt").write_text("\n".join(["[budwood]", *points, ""]), encoding="utf-8")
        monkeypatch.syspath_prepend(folder)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        del sys.modules[name]


@pytest.fixture
def make(files: Files, tmp_path: Path) -> Callable[..., Any]:
    """Function `make(output, strategies, **train)` -> a recipe of three steps on the kit's base."""
    from budwood.recipe.schema import Recipe

    def recipe(output: str, strategies: list[Any], **train: Any) -> Any:
        default = {"steps": 3, "batch_examples": 4, "micro_tokens": 48, "learning_rate": 0.05, "precision": "fp32"}
        return Recipe.from_dict(
            {
                "base": {"model": str(files.base), "quantization": "none"},
                "data": {"train": str(files.train), "eval": str(files.eval), "max_length": 12},
                "strategies": strategies,
                "train": {**default, **train},
                "output": str(tmp_path / output),
            }
        )

    return recipe


def log(run: Any, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize("name", ["scaling", "base-kl"])
def test_an_undeclared_api_is_version_1(name: str) -> None:
    cls, entry = load_strategy(name)
    assert cls.api == 1 and "api" not in vars(cls) and entry.version == "0.1.0"


def test_an_adapter_type_trains_saves_loads_and_merges(make: Callable, files: Files, tmp_path: Path) -> None:
    recipe = make("scaling", ["scaling"])
    outline = plan(recipe)
    assert outline.problems == [] and [part.api for part in outline.parts] == [1]
    run = tune(recipe, quiet=True)
    assert run.metrics["eval_loss"] < run.before["eval_loss"]
    saved = recipe.output / "adapter"
    tensors = load_file(saved / "adapter_model.safetensors")
    assert tensors and all(float((vector - 1).abs().max()) > 0.01 for vector in tensors.values())
    assert json.loads((saved / "budwood.json").read_text())["adapter_type"] == "scaling"
    again = evaluate_adapter(saved, files.eval, quiet=True)
    assert again.adapter["eval_loss"] == run.metrics["eval_loss"], "exactly equal"

    pool = AdapterPool(files.base, precision="fp32", device="cpu")
    prompts = ["the quick", "brown fox"]
    base = pool.logits(prompts)
    pool.load("s", saved)
    pool.use("s")
    attached = pool.logits(prompts)
    assert float((attached - base).abs().max()) > 0.01
    pool.use(None)
    assert torch.equal(pool.logits(prompts), base)
    pool.use("s")
    pool.merge("s")
    torch.testing.assert_close(pool.logits(prompts), attached, atol=1e-4, rtol=1e-4)
    merge(saved, tmp_path / "merged", dtype="fp32")
    whole = AdapterPool(tmp_path / "merged", precision="fp32", device="cpu")
    torch.testing.assert_close(whole.logits(prompts), attached, atol=1e-4, rtol=1e-4)


def test_it_shares_a_batch_with_a_lora_and_the_base(make: Callable, files: Files) -> None:
    """Its `use_adapters` receives one name per row, as in version 1."""
    recipes = {"scaling": make("scaling", ["scaling"]), "lora": make("lora", [{"lora": {"rank": 2}}])}
    pool = AdapterPool(files.base, precision="fp32", device="cpu")
    for name, recipe in recipes.items():
        tune(recipe, quiet=True)
        pool.load(name, recipe.output / "adapter")
    names = ["scaling", None, "lora", "scaling"]
    prompts = ["the quick", "brown fox", "jumps over", "the lazy"]
    mixed = pool.generate(prompts, adapters=names, max_new_tokens=8)
    for prompt, name, answer in zip(prompts, names, mixed, strict=True):
        pool.use(name)
        assert pool.generate([prompt], max_new_tokens=8)[0].text == answer.text
    pool.unload("scaling")
    pool.use("lora")
    assert pool.generate(prompts[2:3], max_new_tokens=8)[0].text == mixed[2].text


def test_a_regulariser_keeps_the_model_near_its_base(make: Callable) -> None:
    """It caches values in `step.kept` and disables the adapter itself."""
    terms = {}
    for weight in (1e-6, 30.0):
        run = tune(make(f"kl-{weight}", [{"lora": {"rank": 2}}, {"base-kl": {"weight": weight}}], steps=6), quiet=True)
        terms[weight] = log(run, "base-kl")
        loss = [a + weight * b for a, b in zip(log(run, "causal_lm"), terms[weight], strict=True)]
        assert log(run, "loss") == pytest.approx(loss, rel=1e-5)
    assert all(abs(term[0]) < 1e-5 for term in terms.values()), "the adapter starts as the base"
    assert 1e-4 < terms[30.0][-1] < terms[1e-6][-1] * 0.7


@pytest.mark.parametrize("strategies", [["scaling"], [{"lora": {"rank": 2}}, "base-kl"]])
def test_an_interrupted_run_resumes_with_a_bitwise_identical_result(
    make: Callable, strategies: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = make("whole", strategies, save_every=1), make("cut", strategies, save_every=1)
    tune(whole, quiet=True)
    original = loop.sum_gradients

    def fails(run: Any) -> None:
        if run.step == 2:
            raise SystemError("power cut")
        original(run)

    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(loop, "sum_gradients", fails)
        tune(cut, quiet=True)
    assert not (cut.output / "adapter").exists()
    assert tune(cut, quiet=True, resume=True).step == 3
    files = [recipe.output / "adapter" / "adapter_model.safetensors" for recipe in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes()

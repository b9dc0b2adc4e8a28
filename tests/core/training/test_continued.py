"""`adapter: DIR` continues an adapter; objectives compare with it as it was, never with the bare base instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from budwood import AdapterPool, ResourceError, Run, hookimpl, read_reference
from budwood.adapters.store import read_adapter
from budwood.cli.app import run as command
from budwood.contract.types import Step
from budwood.errors import BudwoodError, CorruptError, InputError
from budwood.planning.composition import plan
from budwood.recipe.schema import Recipe
from budwood.serving.verify import verify
from budwood.training import loop, reference, setup
from budwood.training.loop import tune
from budwood.training.report import Report
from budwood_lora import LoRA

Make = Callable[..., Recipe]
PARENTS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "alpha": 5},
    "adalora": {
        "initial_rank": 4, "target_rank": 1, "initial_phase": 0, "final_phase": 1, "interval": 1,
    },
}  # fmt: skip
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
OBJECTIVE = """
from torch import Tensor
from budwood import LossTerm, Run, Step, reference_log_probs


class Preference(Strategy):
    \"\"\"Squared distance from the reference's log-probabilities, plus a margin.\"\"\"
    api = 2
    uses_reference = "start"
    SEEN = []

    class Options(Options):
        cached: bool = False

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.caches_reference = self.options.cached

    @hookimpl
    def sequence_terms(self, step: Step, log_probs: Tensor) -> LossTerm:
        reference = step.reference_log_probs()
        self.SEEN.append((step.run.step, step.batch.keys, reference.clone()))
        return LossTerm("preference", (log_probs - reference - 1).square())

    @hookimpl
    def evaluate(self, run: Run) -> dict[str, float]:
        from budwood import batches_of
        batch = next(batches_of(run, [0, 1]))
        return {"reference": float(reference_log_probs(run, batch).sum())}
"""


class Killed(BaseException):
    """Simulates a killed process."""


@pytest.fixture
def objective(distribution: Callable[..., Path]) -> Any:
    """Install a strategy `own-preference` that needs the reference; returns its class."""
    from budwood.contract.loading import load_strategy

    distribution("own-objective", OBJECTIVE, {"own-preference": "Preference"})
    return load_strategy("own-preference")[0]


def continued(recipe: Recipe, adapter: Path, **sections: Any) -> Recipe:
    return Recipe.from_dict({**recipe.to_dict(), "adapter": str(adapter), **sections})


@pytest.fixture
def parent(make_recipe: Make, write: Any) -> Callable[..., Path]:
    """Function (strategy, …) -> the adapter of a finished run."""

    def make(name: str, options: dict[str, Any] | None = None, **sections: Any) -> Path:
        chosen = {name: PARENTS[name] if options is None else options}
        return tune(make_recipe("parent", strategies=[chosen], **sections), quiet=True).directory / "adapter"

    return make


@pytest.mark.parametrize("name", PARENTS)
def test_a_run_starts_from_the_adapter_and_resumes_to_the_same_bytes(
    name: str, parent: Any, make_recipe: Make, objective: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = parent(name)
    recipe = continued(
        make_recipe("child", evaluate=True), adapter, strategies=[name, "own-preference"], train={
            **make_recipe().to_dict()["train"], "steps": 4, "micro_tokens": 128, "save_every": 1,
        },
    )  # fmt: skip
    run, hooks, engine = setup.prepare(recipe, Report(quiet=True), overwrite=True)
    owner = next(strategy for strategy in run.strategies if strategy.name == name)
    own = {"rank": 3, "alpha": 5} if name == "lora" else {"initial_rank": 4, "target_rank": 1}
    assert own.items() <= owner.options.model_dump().items(), "shape options default to the adapter's"
    saved = load_file(adapter / "adapter_model.safetensors")
    live = {parameter.data_ptr(): parameter for parameter in run.trainable}
    assert len(live) == len(saved)
    assert sorted(float(p.sum()) for p in live.values()) == sorted(float(t.sum()) for t in saved.values())

    pool = AdapterPool(recipe.base.model, precision="fp32", device="cpu")
    pool.load("start", adapter)
    batch = run.task.collate([run.examples[i] for i in range(3)], run.model, run.tokenizer, False)

    def log_probs(name: str | None) -> torch.Tensor:
        pool.use(name)
        with torch.no_grad():
            outputs = run.task.outputs(pool.model, batch)
            return run.task.log_probs(outputs.head(outputs.hidden.flatten(0, 1)[batch.label_positions]), batch.labels)

    close = {"atol": 1e-5, "rtol": 1e-5}
    at_start, bare = log_probs("start"), log_probs(None)
    assert float((at_start - bare).abs().max()) > 0.01, "the adapter must matter"
    step = Step(run, batch, engine)
    torch.testing.assert_close(step.reference().log_probs, at_start, **close)
    torch.testing.assert_close(step.reference("base").log_probs, bare, **close)
    assert not step.reference().log_probs.requires_grad
    loop.train(run, hooks, engine, Report(quiet=True))
    torch.testing.assert_close(read_reference(run, batch).log_probs, at_start, **close, msg="it stays frozen")
    moved = [float((p.detach() - value).abs().max()) for p, value in zip(run.trainable, run.start, strict=True)]
    assert min(moved) > 0

    first, result = objective.SEEN[0], json.loads((run.directory / "adapter" / "budwood.json").read_text())
    whole = {p.name: p.read_bytes() for p in (run.directory / "adapter").iterdir()}
    hashes = read_adapter(adapter).hashes.model_dump()
    assert result["parent"] == hashes == json.loads((run.directory / "manifest.json").read_text())["adapter"]
    assert verify(run.directory / "adapter").exact
    shapes = {
        key: tensor.shape for key, tensor in load_file(run.directory / "adapter/adapter_model.safetensors").items()
    }
    assert shapes == {key: tensor.shape for key, tensor in saved.items()}
    assert command(["adapter", "info", str(run.directory / "adapter")]) == 0

    objective.SEEN.clear()
    original = loop.sum_gradients

    def die(run: Any) -> None:
        if run.step == 2:
            raise Killed
        original(run)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "sum_gradients", die)
        tune(recipe, quiet=True, overwrite=True)
    kept = tmp_path / "kept"
    shutil.copytree(run.directory, kept)
    resumed = tune(recipe, quiet=True, resume=True)
    assert {p.name: p.read_bytes() for p in (resumed.directory / "adapter").iterdir()} == whole
    assert torch.equal(objective.SEEN[0][2], first[2]), "the first batch's reference is the same again"

    shutil.rmtree(resumed.directory)
    kept.rename(resumed.directory)
    other = parent_again(parent, name, tmp_path)
    shutil.rmtree(adapter)
    other.rename(adapter)
    for accept in (False, True):
        with pytest.raises(InputError, match=r"belongs to a different adapter or base: adapter\.weights: .* cannot be"):
            tune(recipe, quiet=True, resume=True, accept_changes=accept)
    assert any((resumed.directory / "checkpoints").iterdir())


def parent_again(parent: Any, name: str, tmp_path: Path) -> Path:
    """Return another adapter of the same shape."""
    options = {**PARENTS[name]}
    shutil.move(tmp_path / "parent", tmp_path / "first")
    other = parent(name, options, train={"seed": 5}).rename(tmp_path / "other")
    shutil.rmtree(tmp_path / "parent")
    shutil.move(tmp_path / "first", tmp_path / "parent")
    return other


@pytest.fixture
def lora(parent: Any) -> Path:
    """The adapter of a run with LoRA."""
    return parent("lora", {"rank": 3, "alpha": 5, "targets": ["q_proj", "v_proj"]})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"strategies": [{"lora": {"dora": True}}]}, r"strategies\.lora\.dora: True contradicts .*, which has False"),
    ({"strategies": [{"lora": {"targets": "all-linear"}}]}, "targets and layers select 'model.layers.0.mlp.down_proj'"),
    ({"strategies": [{"lora": {"targets": ["q_proj"]}}]}, "leave out 'model.layers.0.self_attn.v_proj', which the ada"),
    ({"strategies": [{"lora": {"init": "gaussian"}}]}, "init: the run continues an adapter, which is not initialised"),
    ({"strategies": ["lora", "ia3"]}, "'lora' .* and strategy 'ia3' .* both own the slot 'adapter': leave one out"),
    ({"strategies": ["adalora"]}, "is of type 'lora', and a run continues only an adapter of its own type"),
    ({"base": "other"}, "was trained on the base '.*tiny' .*, not on '.*other'"),
    ({"adapter": "nowhere"}, "adapter: nowhere: no such folder"),
    ({"output": "parent"}, "is in the output folder, which --overwrite empties"),
]


def test_what_contradicts_the_adapter_is_refused_before_the_base_loads(
    lora: Path, make_recipe: Make, tiny_bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "load_base", lambda *_: pytest.fail("the base loads"))
    recipe = make_recipe("child")
    for changes, message in REFUSED:
        sections = {"strategies": ["lora"], **changes}
        if sections.get("base") == "other":
            sections["base"] = {"model": str(tiny_bases("other", seed=3)), "quantization": "none"}
        if sections.get("output"):
            sections["output"] = str(tmp_path / "parent")
        changed = continued(recipe, sections.pop("adapter", lora), **sections)
        with pytest.raises(InputError, match=message) as refusal:
            tune(changed, quiet=True, overwrite=True)
        assert "\n" not in str(refusal.value)
        shown = plan(changed)
        assert shown.exit_code == 2 and any(text in str(refusal.value) for text in shown.problems), shown.problems
    fine = plan(continued(recipe, lora, strategies=["lora"]))
    assert not fine.problems and fine.parts[0].options["rank"] == 3
    stock = altered(lora, tmp_path / "wide", lambda tensors: tensors.update({KEY: torch.randn(3, 48)}))
    with pytest.raises(
        InputError, match=r"lora_A\.weight' of the adapter .* is \[3, 48\], but .* has 64 inputs"
    ) as refusal:
        tune(continued(recipe, stock, strategies=["lora"]), quiet=True, overwrite=True)
    damaged = lora / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert plan(continued(recipe, lora, strategies=["lora"])).exit_code == 4


def altered(adapter: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Return a copy of an adapter as stock PEFT would have saved it, with other tensors."""
    folder.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    shutil.copy(adapter / "adapter_config.json", folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


DAMAGES: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any], type[BudwoodError], str]] = [
    (
        "less",
        lambda t: t.pop(KEY),
        InputError,
        r"lora_A\.weight' missing\. Give the base that it was trained on, or its",
    ),
    ("more", lambda t: t.update({KEY.replace("q_proj", "x"): t[KEY].clone()}), InputError, r"self_attn\.x\.lora_A"),
    ("nan", lambda t: t[KEY].fill_(torch.nan), CorruptError, r"lora_A\.weight"),
]


@pytest.mark.parametrize(("name", "damage", "error", "message"), DAMAGES, ids=[each[0] for each in DAMAGES])
def test_an_adapter_whose_tensors_do_not_fit_is_named_before_the_base_loads(
    lora: Path, make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, damage: Callable[[dict[str, torch.Tensor]], Any], error: type[BudwoodError], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(setup, "load_base", lambda *_: pytest.fail("the base loads"))
    stock = altered(lora, tmp_path / name, damage)
    with pytest.raises(error, match=rf"{name}.*{message}"):
        tune(continued(make_recipe("child"), stock, strategies=["lora"]), quiet=True, overwrite=True)


def test_a_strategy_that_needs_the_weights_to_attach_an_adapter_continues_it(
    lora: Path, make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def attach(self: Any, model: Any, config: Any, tensors: Any, name: str) -> None:
        asked.append(next(model.parameters()).is_meta)
        next(model.parameters()).sum().item()

    monkeypatch.setattr(LoRA, "attach_adapter", hookimpl(attach))
    run = tune(continued(make_recipe("child"), lora, strategies=["lora"]), quiet=True, overwrite=True)
    assert asked == [True] and (run.directory / "adapter").exists()


def test_a_rank_that_is_not_that_of_the_tensors_is_refused_before_the_base_loads(
    lora: Path, make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "load_base", lambda *_: pytest.fail("the base loads"))
    stock = altered(lora, tmp_path / "edited", lambda tensors: None)
    config = json.loads((stock / "adapter_config.json").read_text())
    (stock / "adapter_config.json").write_text(json.dumps({**config, "r": 6}))
    with pytest.raises(InputError, match=r"edited: .*is \[3, 64\]; config and base require \[6, 64\]\. Give .* files"):
        tune(continued(make_recipe("child"), stock, strategies=["lora"]), quiet=True, overwrite=True)


@pytest.mark.filterwarnings("ignore")
def test_modules_that_stock_peft_trained_whole_go_on_whatever_it_calls_them(
    make_recipe: Make, tiny_base: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["norm", "pooler"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config)  # it takes input_layernorm for norm, and passes over pooler
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "stock")
    recipe = continued(make_recipe("child"), tmp_path / "stock", strategies=["lora"])
    assert not plan(recipe).problems
    run, _, _ = setup.prepare(recipe, Report(quiet=True), overwrite=True)
    before = load_file(tmp_path / "stock" / "adapter_model.safetensors")
    whole = [key for key in before if "norm.weight" in key]
    assert len(whole) == 5 and len(run.trainable) == len(before)
    for key in whole:
        wrapper = run.model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".weight"))
        assert torch.equal(wrapper.weight, before[key])


def test_a_head_and_rows_of_new_tokens_are_continued(
    parent: Any, make_recipe: Make, write: Any, tiny_base: Path, tmp_path: Path, said: list[str]
) -> None:
    labelled = str(write([{"text": f"{'ab'[i % 2]} {i}", "label": "xyz"[i % 3]} for i in range(12)], "labelled.jsonl"))
    task = {"base": {"task": "sequence-classification"}, "data": {"train": labelled}, "train": {"learning_rate": 0.05}}
    adapter = parent("lora", **task)
    recipe = continued(make_recipe("child", **task), adapter, strategies=[{"lora": {"rank": 5}}])
    run, _, _ = setup.prepare(recipe, Report(quiet=True), overwrite=True)
    saved = load_file(adapter / "adapter_model.safetensors")
    assert torch.equal(run.model.score.weight, saved["base_model.model.score.weight"])
    assert any("continued" in line for line in said)
    rows = [json.loads(line) for line in Path(labelled).read_text().splitlines()]
    others = str(write([{**row, "label": row["label"].replace("z", "w")} for row in rows], "others.jsonl"))
    with pytest.raises(InputError, match="was trained on the classes x, y, z, and the data has w, x, y: they must be"):
        tune(
            continued(make_recipe("child", **{**task, "data": {"train": others}}), adapter, strategies=["lora"]),
            overwrite=True,
        )

    grown = tmp_path / "grown"
    shutil.copytree(tiny_base, grown)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(grown)
    tokenizer.add_tokens([f"<|filler{i}|>" for i in range(300 - len(tokenizer))] + ["<|call|>"])
    tokenizer.save_pretrained(grown)
    train = str(write([{"prompt": f"model {i}:", "completion": " <|call|>"} for i in range(12)], "tokens.jsonl"))
    shutil.rmtree(tmp_path / "parent")
    tokens = {"base": {"model": str(grown), "resize_embeddings": True}, "data": {"train": train}}
    adapter = parent("lora", **tokens)
    child = make_recipe("child", **tokens)
    higher = continued(child, adapter, strategies=[{"lora": {"rank": 5}}])
    run, _, _ = setup.prepare(higher, Report(quiet=True), overwrite=True)
    rows_of = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    (group,) = (group for group in run.groups if group.name == "tokens")
    assert any(torch.equal(parameter, rows_of[key]) for parameter in group.parameters.values())
    without = {**child.to_dict()["base"], "resize_embeddings": False}
    with pytest.raises(InputError, match="has embeddings of new tokens: set base.resize_embeddings to true"):
        tune(continued(child, adapter, strategies=["lora"], base=without), overwrite=True)


def forwards(run: Any, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record for each forward of the model whether it has a gradient."""
    seen: list[bool] = []
    original = run.task.outputs

    def counted(model: Any, batch: Any) -> Any:
        seen.append(torch.is_grad_enabled())
        return original(model, batch)

    monkeypatch.setattr(run.task, "outputs", counted)
    return seen


def test_objectives_share_one_reference_and_a_cached_one_costs_none(
    lora: Path, make_recipe: Make, objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {**make_recipe().to_dict()["train"], "steps": 2, "batch_examples": 8, "micro_tokens": 128}
    teacher = {"distillation": {"teacher": "base", "weight": 0.5}}
    seen: dict[str, Any] = {}
    for kind, extra, sections in (
        ("new", teacher, {}), ("continued", teacher, {"adapter": str(lora)}),
        ("live", None, {"adapter": str(lora)}), ("cached", None, {"adapter": str(lora)}),
    ):  # fmt: skip
        strategies = ["lora", {"own-preference": {"cached": kind == "cached"}}, *([extra] if extra else [])]
        recipe = Recipe.from_dict({**make_recipe(kind).to_dict(), "strategies": strategies, "train": train, **sections})
        run, hooks, engine = setup.prepare(recipe, Report(quiet=True), overwrite=True)
        objective.SEEN.clear()
        with monkeypatch.context() as patch:
            calls = forwards(run, patch)
            loop.train(run, hooks, engine, Report(quiet=True))
        micro_steps = len(objective.SEEN)
        assert micro_steps > 2 and calls.count(True) == micro_steps
        seen[kind] = (calls.count(False) / micro_steps, {keys: values for _, keys, values in objective.SEEN})
    assert seen["new"][0] == 1, "the objective and the teacher are the same base"
    assert seen["continued"][0] == 2, "the objective compares with the adapter, and the teacher is the bare base"
    assert seen["live"][0] == 1 and seen["cached"][0] == 0
    for keys, values in seen["live"][1].items():
        torch.testing.assert_close(seen["cached"][1][keys], values, atol=1e-5, rtol=1e-5)


def test_out_of_memory_while_a_reference_is_cached(
    make_recipe: Make, objective: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is computed again in smaller batches, also when the run resumes with more memory."""
    train = {**make_recipe().to_dict()["train"], "steps": 3, "micro_tokens": 512, "save_every": 1}
    recipe = make_recipe("run", strategies=["lora", {"own-preference": {"cached": True}}], train=train, evaluate=True)
    read, sizes, said = reference.read_reference, [], []

    def limited(run: Run, batch: Any, which: Any = "start") -> Any:
        sizes.append(sum(batch.lengths))
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(run, batch, which)

    monkeypatch.setattr(reference, "read_reference", limited)
    limit = 200
    report = Report(quiet=True)
    monkeypatch.setattr(report, "say", said.append)
    run, hooks, engine = setup.prepare(recipe, report, overwrite=True)
    assert run.reference_tokens <= limit < max(sizes)
    assert any("the reference is computed again, with at most" in line for line in said)
    expected = [values.columns[reference.CACHED].values for values in (run.examples[0], run.eval_examples[0])]
    original = loop.sum_gradients

    def die(run: Any) -> None:
        if run.step == 2:
            raise Killed
        original(run)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "sum_gradients", die)
        loop.train(run, hooks, engine, Report(quiet=True))
    limit, tokens = 10_000, run.reference_tokens
    sizes.clear()
    resumed = tune(recipe, quiet=True, resume=True)
    assert resumed.reference_tokens == tokens >= max(sizes)
    again = [values.columns[reference.CACHED].values for values in (resumed.examples[0], resumed.eval_examples[0])]
    for values, before in zip(again, expected, strict=True):
        assert np.array_equal(values, before)

    limit = 2
    with pytest.raises(ResourceError, match=r"out of memory: one example of \d+ tokens .* does not fit by itself"):
        setup.prepare(recipe, Report(quiet=True), overwrite=True)

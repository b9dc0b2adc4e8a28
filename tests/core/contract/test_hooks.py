"""Each hook has its documentation, an implementer and a test: its example, run in one run or one adapter's life."""

from __future__ import annotations

import inspect
import json
import runpy
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import budwood
from budwood import AdapterPool, InputError, ask_owner, hookimpl
from budwood.adapters.use import use_adapters
from budwood.contract.examples import Batch, Example
from budwood.contract.hookspecs import HookSpecs
from budwood.contract.loading import HOOKS, check_hooks, load_strategy
from budwood.contract.registry import Composition
from budwood.contract.types import LossTerm, Outputs
from budwood.model.base import load_base
from budwood.recipe.schema import Choice, Recipe
from budwood.testing.fake import run_on_fake_tensors

ROOT = Path(__file__).parents[3]
PAGE = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "make_hooks_page.py")))
STRATEGIES = {
    "long-enough": "LongEnough", "only-short": "OnlyShort", "rounded-base": "RoundedBase",
    "output-scale": "OutputScale", "momentum": "Momentum", "equal-say": "EqualSay", "perturbed": "Perturbed",
    "hidden-noise": "HiddenNoise", "small-hidden": "SmallHidden", "long-answers": "LongAnswers", "apart": "Apart",
    "centred": "Centred", "gradient-noise": "GradientNoise", "steadiness": "Steadiness", "diary": "Diary",
}  # fmt: skip
ALONE = ("shorter", "Shorter")
"""One that makes its examples itself, in a run of its own."""
STEPS = 3
EXERCISED: dict[str, str] = {}
"""Hook → name of the test that exercises it."""
RAN: set[str] = set()


@pytest.fixture(autouse=True)
def ran(request: pytest.FixtureRequest) -> Any:
    """Note each test that runs."""
    RAN.add(request.node.originalname)


def exercises(*hooks: str) -> Callable[[Any], Any]:
    """Mark a test as the one of these hooks."""

    def note(test: Any) -> Any:
        EXERCISED.update(dict.fromkeys(hooks, test.__name__))
        return test

    return note


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The module docs/hook_examples.py, its strategies installed as those of the distribution hook-examples 1.0."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "hook_examples-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hook-examples\nVersion: 1.0\n")
    lines = [f"{name} = hook_examples:{value}" for name, value in [*STRATEGIES.items(), ALONE]]
    (info / "entry_points.txt").write_text("\n".join(["[budwood]", *lines, ""]))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.syspath_prepend(ROOT / "docs")
        import hook_examples

        yield hook_examples
        sys.modules.pop("hook_examples")


@pytest.fixture(scope="module")
def run(examples: Any, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run with every example in it; `seen[hook]` are the arguments and results of its calls, in order."""
    folder = tmp_path_factory.mktemp("hooks")
    rows = [{"prompt": "games section " * (i % 4 + 1), "completion": " library" * (i % 3 + 1)} for i in range(12)]
    rows.append({"prompt": "long " * 60, "completion": " end"})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval.jsonl").write_text(
        "".join(json.dumps(row | {"prompt": "held " + row["prompt"]}) + "\n" for row in rows[:4])
    )
    options: dict[str, Any] = {
        "long-enough": {"steps": STEPS}, "only-short": {"tokens": 64}, "diary": {"file": str(folder / "diary.txt")},
    }  # fmt: skip
    recipe = Recipe.from_dict(
        {
            "base": {"model": str(tiny_base), "quantization": "none", "device": "cpu"},
            "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "max_length": 256},
            "strategies": [{name: options.get(name)} for name in STRATEGIES],
            "train": {
                "steps": STEPS, "batch_examples": 4, "micro_tokens": 256, "learning_rate": 1e-2, "precision": "fp32",
                "warmup": 0, "eval_generate": 0,
            },
            "output": str(folder / "run"),
        }
    )  # fmt: skip
    seen: dict[str, list[tuple[Any, dict[str, Any], Any]]] = {hook: [] for hook in HOOKS}
    with pytest.MonkeyPatch.context() as patch:
        for name in STRATEGIES.values():
            cls = getattr(examples, name)
            for hook in HOOKS:
                method = getattr(cls, hook, None)
                if hasattr(method, "budwood_impl"):
                    patch.setattr(cls, hook, recorded(method, seen[hook]))
        finished = budwood.tune(recipe, quiet=True)
    return SimpleNamespace(run=finished, seen=seen, folder=folder, recipe=recipe)


def recorded(method: Any, calls: list[Any]) -> Any:
    """The method, which notes what it is given (copies of gradients too) and what it returns."""
    names = list(inspect.signature(method).parameters)[1:]

    def note(self: Any, arguments: tuple[Any, ...], result: Any) -> None:
        given = dict(zip(names, arguments, strict=True))
        if "run" in given and getattr(given["run"], "groups", None):
            given["gradients"] = [None if p.grad is None else p.grad.clone() for p in given["run"].trainable]
            given["parameters"] = [p.detach().clone() for p in given["run"].trainable]
            given["at"] = given["run"].step
        calls.append((self, given, result))

    def plain(self: Any, *arguments: Any) -> Any:
        result = method(self, *arguments)
        note(self, arguments, result)
        return result

    def around(self: Any, *arguments: Any) -> Any:
        result = yield from method(self, *arguments)
        note(self, arguments, result)
        return result

    wrapper = method.budwood_impl["wrapper"]
    scope: dict[str, Any] = {"inner": around if wrapper else plain}
    given = ", ".join(["self", *names])
    result = f"yield from inner({given})" if wrapper else f"inner({given})"
    exec(f"def {method.__name__}({given}):\n    return ({result})", scope)  # pluggy reads the names of its arguments
    return hookimpl(wrapper=wrapper)(scope[method.__name__])


@pytest.fixture(scope="module")
def saved(run: Any) -> Path:
    """The adapter that the run left."""
    return run.folder / "run" / "adapter"


@exercises("check_plan")
def test_check_plan(run):
    assert [given["plan"].steps for _, given, _ in run.seen["check_plan"]][-1] == STEPS
    shorter = Recipe.from_dict(run.recipe.to_dict(), ["train.steps=2"])
    problems = budwood.plan(shorter).problems
    assert problems == [
        "strategy 'long-enough' (hook-examples 1.0): 2 steps are too few: raise train.epochs, or lower "
        "long-enough.steps."
    ]


@exercises("prepare_examples")
def test_prepare_examples(run):
    ((_, given, kept),) = run.seen["prepare_examples"]
    assert (len(given["examples"]), len(kept)) == (13, 12)
    assert all(isinstance(example, Example) for example in kept)
    assert len(run.run.examples) == 12
    assert run.run.metrics["eval_loss"] > 0  # evaluation examples are left alone


@exercises("load_base")
def test_load_base(run):
    ((_, _, base),) = run.seen["load_base"]
    weight = base.model.get_submodule("model.layers.0.mlp.up_proj").weight
    assert all(len(row.unique()) <= 15 for row in weight)
    assert run.run.base is base


@exercises("prepare_model", "trainable_parameters")
def test_prepare_model_and_trainable_parameters(run, examples):
    ((_, given, model),) = run.seen["prepare_model"]
    ((_, _, groups),) = run.seen["trainable_parameters"]
    assert run.run.model is model is given["model"]
    assert len(examples.scaled(model)) == 4  # k_proj and v_proj of two layers
    trained = {name: p for group in groups for name, p in group.parameters.items()}
    assert [id(p) for p in run.run.trainable] == [id(p) for p in trained.values()]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{path}.scales.default" for path in trained
    }
    assert all(p.dtype == torch.float32 and p.abs().max() > 0 for p in trained.values())


@exercises("build_optimizer", "build_scheduler")
def test_build_optimizer_and_scheduler(run):
    ((_, given, optimizer),) = run.seen["build_optimizer"]
    ((_, also, scheduler),) = run.seen["build_scheduler"]
    assert [set(group) >= {"params", "lr", "weight_decay", "name"} for group in given["groups"]] == [True]
    assert run.run.optimizer is optimizer is also["optimizer"]
    assert run.run.scheduler is scheduler
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.99**STEPS)  # ten times the recipe's, then decayed


@exercises("batch_counts", "sequence_terms")
def test_terms_of_log_probabilities_over_a_unit_of_ones_own(run):
    counts = [result["long_label"] for _, _, result in run.seen["batch_counts"]]
    assert sum(counts) > 0
    for _, given, term in run.seen["sequence_terms"]:
        assert term.unit == "long_label"
        assert given["log_probs"].shape == given["step"].batch.labels.shape
        assert (given["log_probs"] <= 0).all()
        assert given["log_probs"].requires_grad
    logged = [json.loads(line) for line in (run.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["long_answers"] > 0 for row in logged if row["kind"] == "step")


@exercises("next_examples", "planned_examples")
def test_examples_that_the_run_makes_itself(examples, run, monkeypatch):
    """A set for each step, sampled with the model as it is; planning asks for sizes instead."""
    seen = {"next_examples": [], "planned_examples": []}
    for hook in seen:
        monkeypatch.setattr(examples.Shorter, hook, recorded(getattr(examples.Shorter, hook), seen[hook]))
    recipe = run.recipe.model_copy(
        update={
            "strategies": [choice_of("lora"), choice_of("shorter")],
            "output": run.folder / "sampled",
            "data": run.recipe.data.model_copy(update={"eval": None}),
        }
    )
    budwood.tune(recipe, quiet=True)
    assert not seen["planned_examples"]
    assert len(seen["next_examples"]) == STEPS
    for _, given, sets in seen["next_examples"]:
        assert [len(made) for made in sets] == [2 * len(given["indices"])]
        assert all(example.columns["advantage"].axis == "example" for example in sets[0])
    run_on_fake_tensors(recipe)
    assert len(seen["planned_examples"]) == 1
    assert len(seen["next_examples"]) == STEPS


def choice_of(name):
    return Choice(name=name)


@exercises("step_values", "step_terms")
def test_terms_of_the_whole_step(run):
    """Once a step, however many passes it has; the values are of all of its examples."""
    assert len(run.seen["step_terms"]) == STEPS
    for _, given, term in run.seen["step_terms"]:
        assert term.unit == "step"
        assert given["values"]["answers"].shape == (4, 64)
    assert len(run.seen["step_values"]) > 2 * STEPS, "gathered, and in each pass"


@exercises("prepare_batch")
def test_prepare_batch(run):
    calls = run.seen["prepare_batch"]
    assert len(calls) >= STEPS
    for _, given, batch in calls:
        assert isinstance(batch, Batch)
        assert batch.columns["share"].sum() == pytest.approx(len(given["batch"].keys))


@exercises("backward", "forward")
def test_backward_and_forward(run):
    passes = Counter(step.replaying for _, given, _ in run.seen["forward"] for step in [given["step"]])
    assert len(run.seen["backward"]) == len(run.seen["prepare_batch"])
    assert len(run.seen["forward"]) >= 2 * len(run.seen["backward"])  # its own pass and the replay
    assert passes
    assert all(isinstance(outputs, Outputs) for _, _, outputs in run.seen["forward"])
    step = run.seen["backward"][0][1]["step"]
    assert step.noise_grad is not None
    assert step.noise_grad.shape == (step.batch.rows, step.batch.width, 64)


@exercises("token_terms", "loss_terms")
def test_token_terms_and_loss_terms(run):
    for hook, unit in (("token_terms", "label"), ("loss_terms", "example")):
        for _, given, term in run.seen[hook]:
            assert isinstance(term, LossTerm)
            assert term.unit == unit
            size = len(given["positions"]) if unit == "label" else len(given["step"].batch.keys)
            assert term.values.shape == (size,)
    logged = [json.loads(line) for line in (run.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged if "equal_say" in line]
    assert len(steps) == STEPS
    for line in steps:
        expected = line["causal_lm"] + 0.5 * line["equal_say"] + 0.01 * line["small_hidden"]
        expected += 0.1 * line["long_answers"] + 0.1 * line["apart"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)


@exercises("before_clip", "before_optimizer_step", "after_optimizer_step")
def test_the_hooks_around_the_optimizer(run):
    order = ("before_clip", "before_optimizer_step", "after_optimizer_step")
    for step, (clip, before, after) in enumerate(zip(*(run.seen[hook] for hook in order), strict=True)):
        assert {given["at"] for _, given, _ in (clip, before, after)} == {step}
        assert all(float(gradient.mean().abs()) < 1e-5 for gradient in clip[1]["gradients"])
        noise = [b - c for b, c in zip(before[1]["gradients"], clip[1]["gradients"], strict=True)]
        deviation = float(torch.cat(noise).std())
        assert deviation == pytest.approx((0.01 / (1 + step) ** 0.55) ** 0.5, rel=0.4)  # clipping apart
        pairs = zip(before[1]["parameters"], after[1]["parameters"], strict=True)
        assert any(not torch.equal(old, new) for old, new in pairs)
        assert all(gradient is not None for gradient in after[1]["gradients"])
    assert len(run.seen["after_optimizer_step"]) == STEPS
    assert run.run.metrics["unsteadiness"] > 0


@exercises("on_event")
def test_on_event(run):
    lines = (run.folder / "diary.txt").read_text().splitlines()
    kinds = [line.partition(":")[0] for line in lines]
    steps = [f"step {i + 1}" for i in range(STEPS)]
    assert kinds == ["evaluation 0", "start 0", *steps, f"evaluation {STEPS}", f"end {STEPS}"]


@exercises("evaluate")
def test_evaluate(run):
    first, last = run.seen["evaluate"]
    assert first[2] == {"eval_unsteadiness": 0.0}
    assert last[2]["eval_unsteadiness"] > 0
    assert run.run.metrics["eval_unsteadiness"] == last[2]["eval_unsteadiness"]


@exercises("state_dict", "load_state_dict")
def test_state_dict_and_load_state_dict(run, examples):
    steady = next(s for s in run.run.strategies if s.name == "steadiness")
    hooks = Composition([examples.Steadiness(name="steadiness")])
    ((_, state),) = Composition([steady]).collect("state_dict", run=run.run)
    hooks.ask("load_state_dict", "steadiness", run=run.run, state=state)
    ((_, again),) = hooks.collect("state_dict", run=run.run)
    assert list(again) == list(state)
    assert len(state) == 1 + len(run.run.trainable)
    assert all(np.array_equal(again[key], state[key]) for key in state)
    with pytest.raises(InputError, match="version 2"):
        hooks.ask("load_state_dict", "steadiness", run=run.run, state={"version": 2})


@exercises("export")
def test_export(run, saved):
    ((_, given, _),) = run.seen["export"]
    assert not given["directory"].exists()  # it was renamed
    tensors = load_file(saved / "adapter_model.safetensors")
    assert sorted(tensors) == json.loads((saved / "adapter_config.json").read_text())["modules"]
    trained = run.run.groups[0].parameters
    assert all(torch.equal(tensors[path], p.detach()) for path, p in trained.items())


@exercises("attach_adapter", "use_adapters", "detach_adapter")
def test_an_adapter_is_attached_used_and_taken_off(run, saved, tiny_base, examples):
    pool = AdapterPool(tiny_base, precision="fp32", device="cpu")
    before = [(path, id(module)) for path, module in pool.model.named_modules()]
    prompt = ["games section"]
    base = pool.logits(prompt)
    pool.load("mine", saved)
    assert torch.equal(pool.logits(prompt), base)  # not in use yet
    pool.use("mine")
    changed = pool.logits(prompt)
    assert not torch.equal(changed, base)
    (key,) = {key for module in examples.scaled(pool.model).values() for key in module.scales}
    use_adapters(examples.OutputScale(), pool.model, [key], [-1, 0])  # one for each row
    ids = torch.tensor([pool.tokenizer(prompt[0])["input_ids"]] * 2)
    with torch.no_grad():
        torch.testing.assert_close(pool.model(input_ids=ids).logits[:, -1], torch.cat([base, changed]))
    pool.use("mine")
    pool.unload("mine")
    assert torch.equal(pool.logits(prompt), base)
    assert [(path, id(module)) for path, module in pool.model.named_modules()] == before


def test_an_adapter_that_does_not_fit_is_refused(run, saved, tiny_base, examples):
    base = load_base(tiny_base, "none", "AutoModelForCausalLM", torch.float32)
    with pytest.raises(InputError, match="fits no linear"):
        examples.OutputScale().attach_adapter(base.model, {}, {"model.layers.0.self_attn.k_proj": torch.ones(3)}, "x")


@exercises("convert_adapter")
def test_convert_adapter_gives_what_peft_reads(run, saved, tiny_base, examples, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    owner = examples.OutputScale(name="output-scale")
    config = json.loads((saved / "adapter_config.json").read_text())
    tensors = load_file(saved / "adapter_model.safetensors")
    assert ask_owner(owner, "convert_adapter", config=config, tensors=tensors, adapter_type="lora") is None
    values, converted = ask_owner(owner, "convert_adapter", config=config, tensors=tensors, adapter_type="ia3")
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    save_file({key: tensor.contiguous() for key, tensor in converted.items()}, tmp_path / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path).eval()
    pool = AdapterPool(tiny_base, precision="fp32", device="cpu")
    pool.load("mine", saved)
    pool.use("mine")
    ids = torch.tensor([pool.tokenizer("games section")["input_ids"]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
    torch.testing.assert_close(pool.logits(["games section"]), expected, rtol=1e-5, atol=1e-5)


@exercises("merge_adapter")
def test_merge_adapter(run, saved, tiny_base):
    pool = AdapterPool(tiny_base, precision="fp32", device="cpu")
    pool.load("mine", saved)
    pool.use("mine")
    expected = pool.logits(["games section"])
    pool.merge("mine")
    torch.testing.assert_close(pool.logits(["games section"]), expected, rtol=1e-5, atol=1e-5)
    assert not [path for path, module in pool.model.named_modules() if type(module).__name__ == "Scaled"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_has_documentation_an_implementer_an_example_and_a_test(hook, examples, request):
    about = PAGE.documentation(hook)
    assert {"summary", "When", "May change"} <= set(about), f"{hook}: its docstring in hookspecs.py says too little"
    assert all(about.values())
    if inspect.signature(getattr(HookSpecs, hook)).return_annotation != "None":
        assert "Returns" in about, f"{hook}: its docstring does not say what it returns"
    owners = [
        name
        for name, value in [*STRATEGIES.items(), ALONE]
        if hasattr(getattr(getattr(examples, value), hook, None), "budwood_impl")
    ]
    assert PAGE.implementers(hook) or owners, f"{hook}: nobody implements it"
    assert owners, f"{hook}: docs/hook_examples.py has no example of it"
    for name in owners:
        check_hooks(load_strategy(name)[0], name)
    assert f"def {hook}(" in "\n".join(PAGE.example(hook))
    assert hook in EXERCISED, f"{hook}: no test here exercises it"
    test = globals()[EXERCISED[hook]]
    assert test.__name__.startswith("test_")
    assert not [mark for mark in getattr(test, "pytestmark", []) if mark.name in ("skip", "skipif", "xfail")]
    if EXERCISED[hook] in {getattr(item, "originalname", "") for item in request.session.items}:
        assert EXERCISED[hook] in RAN, f"{hook}: its test was collected and did not run"


def test_every_example_is_shown():
    shown = {PAGE.example(hook)[0].partition("(")[0].removeprefix("class ") for hook in HOOKS}
    assert shown == {*STRATEGIES.values(), ALONE[1]}


def test_the_page_is_up_to_date():
    assert (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8") == PAGE.page(), "run `make docs`"

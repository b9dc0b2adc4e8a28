"""Each hook has documentation, an implementer, and a test that runs its example."""

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
from budwood.serving.material.combine import combine
from budwood.serving.verify import verify
from budwood.testing.fake import run_on_fake_tensors

ROOT = Path(__file__).parents[3]
PAGE = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "make_hooks_page.py")))
STRATEGIES = {
    "long-enough": "LongEnough", "only-short": "OnlyShort", "rounded-base": "RoundedBase",
    "output-scale": "OutputScale", "momentum": "Momentum", "balanced-examples": "BalancedExamples",
    "perturbed": "Perturbed", "hidden-noise": "HiddenNoise", "small-hidden": "SmallHidden",
    "long-answers": "LongAnswers", "repulsion": "Repulsion", "gradient-centralization": "GradientCentralization",
    "gradient-noise": "GradientNoise", "oscillation": "Oscillation", "event-log": "EventLog",
}  # fmt: skip
SAMPLING = ("shorter", "Shorter")
"""The strategy that samples its examples; it needs a separate run."""
STEPS = 3
EXERCISED: dict[str, str] = {}
"""Hook → name of the test that exercises it."""
RAN: set[str] = set()


@pytest.fixture(autouse=True)
def ran(request: pytest.FixtureRequest) -> Any:
    """Record each test that runs."""
    RAN.add(request.node.originalname)


def exercises(*hooks: str) -> Callable[[Any], Any]:
    """Mark a test as the one that exercises these hooks."""

    def mark(test: Any) -> Any:
        EXERCISED.update(dict.fromkeys(hooks, test.__name__))
        return test

    return mark


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The module docs/hook_examples.py, with its strategies installed as the distribution hook-examples 1.0."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "hook_examples-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hook-examples\nVersion: 1.0\n")
    lines = [f"{name} = hook_examples:{value}" for name, value in [*STRATEGIES.items(), SAMPLING]]
    (info / "entry_points.txt").write_text("\n".join(["[budwood]", *lines, ""]))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.syspath_prepend(ROOT / "docs")
        import hook_examples

        yield hook_examples
        sys.modules.pop("hook_examples")


@pytest.fixture(scope="module")
def run(examples: Any, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of every example; `calls[hook]` holds (strategy, arguments, result) of each call, in order."""
    folder = tmp_path_factory.mktemp("hooks")
    rows = [{"prompt": "games section " * (i % 4 + 1), "completion": " library" * (i % 3 + 1)} for i in range(12)]
    rows.append({"prompt": "long " * 60, "completion": " end"})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval.jsonl").write_text(
        "".join(json.dumps(row | {"prompt": "held " + row["prompt"]}) + "\n" for row in rows[:4])
    )
    options: dict[str, Any] = {
        "long-enough": {"steps": STEPS}, "only-short": {"tokens": 64},
        "event-log": {"file": str(folder / "events.txt")},
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
    calls: dict[str, list[tuple[Any, dict[str, Any], Any]]] = {hook: [] for hook in HOOKS}
    with pytest.MonkeyPatch.context() as patch:
        for name in STRATEGIES.values():
            cls = getattr(examples, name)
            for hook in HOOKS:
                method = getattr(cls, hook, None)
                if hasattr(method, "budwood_impl"):
                    patch.setattr(cls, hook, recorded(method, calls[hook]))
        finished = budwood.tune(recipe, quiet=True)
    return SimpleNamespace(run=finished, calls=calls, folder=folder, recipe=recipe)


def recorded(method: Any, calls: list[Any]) -> Any:
    """Wrap a method so that it records its arguments (with copies of gradients and parameters) and its result."""
    names = list(inspect.signature(method).parameters)[1:]

    def record(self: Any, arguments: tuple[Any, ...], result: Any) -> None:
        args = dict(zip(names, arguments, strict=True))
        if "run" in args and getattr(args["run"], "groups", None):
            args["gradients"] = [None if p.grad is None else p.grad.clone() for p in args["run"].trainable]
            args["parameters"] = [p.detach().clone() for p in args["run"].trainable]
            args["step"] = args["run"].step
        calls.append((self, args, result))

    def plain(self: Any, *arguments: Any) -> Any:
        result = method(self, *arguments)
        record(self, arguments, result)
        return result

    def wrapping(self: Any, *arguments: Any) -> Any:
        result = yield from method(self, *arguments)
        record(self, arguments, result)
        return result

    wrapper = method.budwood_impl["wrapper"]
    scope: dict[str, Any] = {"inner": wrapping if wrapper else plain}
    parameters = ", ".join(["self", *names])
    result = f"yield from inner({parameters})" if wrapper else f"inner({parameters})"
    exec(f"def {method.__name__}({parameters}):\n    return ({result})", scope)  # pluggy reads the parameter names
    return hookimpl(wrapper=wrapper)(scope[method.__name__])


@pytest.fixture(scope="module")
def saved(run: Any) -> Path:
    """The adapter that the run exported."""
    return run.folder / "run" / "adapter"


@exercises("check_plan")
def test_check_plan(run):
    assert [args["plan"].steps for _, args, _ in run.calls["check_plan"]][-1] == STEPS
    shorter = Recipe.from_dict(run.recipe.to_dict(), ["train.steps=2"])
    problems = budwood.plan(shorter).problems
    assert problems == [
        "strategy 'long-enough' (hook-examples 1.0): 2 steps are too few: raise train.epochs, or lower "
        "long-enough.steps."
    ]


@exercises("prepare_examples")
def test_prepare_examples(run):
    ((_, args, kept),) = run.calls["prepare_examples"]
    assert (len(args["examples"]), len(kept)) == (13, 12)
    assert all(isinstance(example, Example) for example in kept)
    assert len(run.run.examples) == 12
    assert run.run.metrics["eval_loss"] > 0  # evaluation examples do not pass through the hook


@exercises("load_base")
def test_load_base(run):
    ((_, _, base),) = run.calls["load_base"]
    weight = base.model.get_submodule("model.layers.0.mlp.up_proj").weight
    assert all(len(row.unique()) <= 15 for row in weight)
    assert run.run.base is base


@exercises("prepare_model", "trainable_parameters")
def test_prepare_model_and_trainable_parameters(run, examples):
    ((_, args, model),) = run.calls["prepare_model"]
    ((_, _, groups),) = run.calls["trainable_parameters"]
    assert run.run.model is model is args["model"]
    assert len(examples.scaled_linears(model)) == 4  # k_proj and v_proj of two layers
    trained = {name: p for group in groups for name, p in group.parameters.items()}
    assert [id(p) for p in run.run.trainable] == [id(p) for p in trained.values()]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{path}.scales.default" for path in trained
    }
    assert all(p.dtype == torch.float32 and p.abs().max() > 0 for p in trained.values())


@exercises("build_optimizer", "build_scheduler")
def test_build_optimizer_and_scheduler(run):
    ((_, args, optimizer),) = run.calls["build_optimizer"]
    ((_, scheduler_args, scheduler),) = run.calls["build_scheduler"]
    assert [set(group) >= {"params", "lr", "weight_decay", "name"} for group in args["groups"]] == [True]
    assert run.run.optimizer is optimizer is scheduler_args["optimizer"]
    assert run.run.scheduler is scheduler
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.99**STEPS)  # ten times the recipe's, then decayed


@exercises("batch_counts", "sequence_terms")
def test_terms_of_log_probabilities_with_a_custom_unit(run):
    counts = [result["long_label"] for _, _, result in run.calls["batch_counts"]]
    assert sum(counts) > 0
    for _, args, term in run.calls["sequence_terms"]:
        assert term.unit == "long_label"
        assert args["log_probs"].shape == args["step"].batch.labels.shape
        assert (args["log_probs"] <= 0).all()
        assert args["log_probs"].requires_grad
    logged = [json.loads(line) for line in (run.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["long_answers"] > 0 for row in logged if row["kind"] == "step")


@exercises("next_examples", "planned_examples")
def test_on_policy_examples(examples, run, monkeypatch):
    """One set per step, sampled with the current model; planning uses planned sizes instead."""
    calls = {"next_examples": [], "planned_examples": []}
    for hook in calls:
        monkeypatch.setattr(examples.Shorter, hook, recorded(getattr(examples.Shorter, hook), calls[hook]))
    recipe = run.recipe.model_copy(
        update={
            "strategies": [Choice(name="lora"), Choice(name="shorter")],
            "output": run.folder / "sampled",
            "data": run.recipe.data.model_copy(update={"eval": None}),
        }
    )
    budwood.tune(recipe, quiet=True)
    assert not calls["planned_examples"]
    assert len(calls["next_examples"]) == STEPS
    for _, args, sets in calls["next_examples"]:
        assert [len(examples) for examples in sets] == [2 * len(args["indices"])]
        assert all(example.columns["advantage"].axis == "example" for example in sets[0])
    run_on_fake_tensors(recipe)
    assert len(calls["planned_examples"]) == 1
    assert len(calls["next_examples"]) == STEPS


@exercises("step_values", "step_terms")
def test_terms_of_the_whole_step(run):
    """Called once per step, regardless of the number of passes, with the values of all examples."""
    assert len(run.calls["step_terms"]) == STEPS
    for _, args, term in run.calls["step_terms"]:
        assert term.unit == "step"
        assert args["values"]["answers"].shape == (4, 64)
    assert len(run.calls["step_values"]) > 2 * STEPS, "gathered, and in each pass"


@exercises("prepare_batch")
def test_prepare_batch(run):
    calls = run.calls["prepare_batch"]
    assert len(calls) >= STEPS
    for _, args, batch in calls:
        assert isinstance(batch, Batch)
        assert batch.columns["share"].sum() == pytest.approx(len(args["batch"].keys))


@exercises("backward", "forward")
def test_backward_and_forward(run):
    passes = Counter(step.replaying for _, args, _ in run.calls["forward"] for step in [args["step"]])
    assert len(run.calls["backward"]) == len(run.calls["prepare_batch"])
    assert len(run.calls["forward"]) >= 2 * len(run.calls["backward"])  # core's pass and the replay
    assert passes
    assert all(isinstance(outputs, Outputs) for _, _, outputs in run.calls["forward"])
    step = run.calls["backward"][0][1]["step"]
    assert step.noise_grad is not None
    assert step.noise_grad.shape == (step.batch.rows, step.batch.width, 64)


@exercises("token_terms", "loss_terms")
def test_token_terms_and_loss_terms(run):
    for hook, unit in (("token_terms", "label"), ("loss_terms", "example")):
        for _, args, term in run.calls[hook]:
            assert isinstance(term, LossTerm)
            assert term.unit == unit
            size = len(args["positions"]) if unit == "label" else len(args["step"].batch.keys)
            assert term.values.shape == (size,)
    logged = [json.loads(line) for line in (run.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged if "balanced" in line]
    assert len(steps) == STEPS
    for line in steps:
        expected = line["causal_lm"] + 0.5 * line["balanced"] + 0.01 * line["small_hidden"]
        expected += 0.1 * line["long_answers"] + 0.1 * line["repulsion"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)


@exercises("before_clip", "before_optimizer_step", "after_optimizer_step")
def test_hooks_around_the_optimizer_step(run):
    order = ("before_clip", "before_optimizer_step", "after_optimizer_step")
    for step, (clip, before, after) in enumerate(zip(*(run.calls[hook] for hook in order), strict=True)):
        assert {args["step"] for _, args, _ in (clip, before, after)} == {step}
        assert all(float(gradient.mean().abs()) < 1e-5 for gradient in clip[1]["gradients"])
        noise = [b - c for b, c in zip(before[1]["gradients"], clip[1]["gradients"], strict=True)]
        deviation = float(torch.cat(noise).std())
        assert deviation == pytest.approx((0.01 / (1 + step) ** 0.55) ** 0.5, rel=0.4)  # apart from clipping
        pairs = zip(before[1]["parameters"], after[1]["parameters"], strict=True)
        assert any(not torch.equal(old, new) for old, new in pairs)
        assert all(gradient is not None for gradient in after[1]["gradients"])
    assert len(run.calls["after_optimizer_step"]) == STEPS
    assert run.run.metrics["oscillation"] > 0


@exercises("on_event")
def test_on_event(run):
    lines = (run.folder / "events.txt").read_text().splitlines()
    kinds = [line.partition(":")[0] for line in lines]
    steps = [f"step {i + 1}" for i in range(STEPS)]
    assert kinds == ["evaluation 0", "start 0", *steps, f"evaluation {STEPS}", f"end {STEPS}"]


@exercises("evaluate")
def test_evaluate(run):
    first, last = run.calls["evaluate"]
    assert first[2] == {"eval_oscillation": 0.0}
    assert last[2]["eval_oscillation"] > 0
    assert run.run.metrics["eval_oscillation"] == last[2]["eval_oscillation"]


@exercises("state_dict", "load_state_dict")
def test_state_dict_and_load_state_dict(run, examples):
    strategy = next(s for s in run.run.strategies if s.name == "oscillation")
    hooks = Composition([examples.Oscillation(name="oscillation")])
    ((_, state),) = Composition([strategy]).collect("state_dict", run=run.run)
    hooks.ask("load_state_dict", "oscillation", run=run.run, state=state)
    ((_, again),) = hooks.collect("state_dict", run=run.run)
    assert list(again) == list(state)
    assert len(state) == 1 + len(run.run.trainable)
    assert all(np.array_equal(again[key], state[key]) for key in state)
    with pytest.raises(InputError, match="version 2"):
        hooks.ask("load_state_dict", "oscillation", run=run.run, state={"version": 2})


@exercises("export")
def test_export(run, saved):
    ((_, args, _),) = run.calls["export"]
    assert not args["directory"].exists()  # it was renamed
    tensors = load_file(saved / "adapter_model.safetensors")
    assert sorted(tensors) == json.loads((saved / "adapter_config.json").read_text())["modules"]
    trained = run.run.groups[0].parameters
    assert all(torch.equal(tensors[path], p.detach()) for path, p in trained.items())


@exercises("attach_adapter", "use_adapters", "detach_adapter")
def test_an_adapter_is_attached_used_and_detached(run, saved, tiny_base, examples, monkeypatch):
    monkeypatch.delattr(examples.OutputScale, "live_adapter")
    pool = AdapterPool(tiny_base, precision="fp32", device="cpu")
    before = [(path, id(module)) for path, module in pool.model.named_modules()]
    prompt = ["games section"]
    base = pool.logits(prompt)
    pool.load("mine", saved)
    assert torch.equal(pool.logits(prompt), base)  # not in use yet
    pool.use("mine")
    changed = pool.logits(prompt)
    assert not torch.equal(changed, base)
    (key,) = {key for module in examples.scaled_linears(pool.model).values() for key in module.scales}
    use_adapters(examples.OutputScale(), pool.model, [key], [-1, 0])  # one entry per row
    ids = torch.tensor([pool.tokenizer(prompt[0])["input_ids"]] * 2)
    with torch.no_grad():
        torch.testing.assert_close(pool.model(input_ids=ids).logits[:, -1], torch.cat([base, changed]))
    pool.use("mine")
    pool.unload("mine")
    assert torch.equal(pool.logits(prompt), base)
    assert [(path, id(module)) for path, module in pool.model.named_modules()] == before


@exercises("live_adapter")
def test_an_adapter_in_the_table_computes_what_it_does_attached(run, saved, tiny_base, examples, monkeypatch):
    pool = AdapterPool(tiny_base, precision="fp32", device="cpu")
    pool.load("mine", saved)
    pool.use("mine")
    found = pool.logits(["games section"])
    assert not examples.scaled_linears(pool.model)
    with pytest.raises(InputError, match="does not fit a linear"):
        examples.OutputScale().live_adapter(pool.model, {}, {"model.layers.0.self_attn.k_proj": torch.ones(3)})
    monkeypatch.delattr(examples.OutputScale, "live_adapter")
    other = AdapterPool(tiny_base, precision="fp32", device="cpu")
    other.load("mine", saved)
    other.use("mine")
    torch.testing.assert_close(found, other.logits(["games section"]), rtol=1e-5, atol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused(run, saved, tiny_base, examples):
    base = load_base(tiny_base, "none", "AutoModelForCausalLM", torch.float32)
    with pytest.raises(InputError, match="does not fit a linear"):
        examples.OutputScale().attach_adapter(base.model, {}, {"model.layers.0.self_attn.k_proj": torch.ones(3)}, "x")


@exercises("convert_adapter")
def test_convert_adapter_returns_what_peft_reads(run, saved, tiny_base, examples, tmp_path):
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


@exercises("combine_adapters")
def test_combine_adapters_adds_the_changes(run, saved, tmp_path):
    combine([saved, saved], tmp_path / "out", weights=[2, 1])
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (saved, tmp_path / "out"))
    assert all(torch.allclose(after[path], 3 * scale) for path, scale in before.items())
    assert verify(tmp_path / "out").exact


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
    assert {"summary", "When", "May change"} <= set(about), f"{hook}: its docstring in hookspecs.py is incomplete"
    assert all(about.values())
    if inspect.signature(getattr(HookSpecs, hook)).return_annotation != "None":
        assert "Returns" in about, f"{hook}: its docstring does not say what it returns"
    owners = [
        name
        for name, value in [*STRATEGIES.items(), SAMPLING]
        if hasattr(getattr(getattr(examples, value), hook, None), "budwood_impl")
    ]
    assert PAGE.implementers(hook) or owners, f"{hook}: nothing implements it"
    assert owners, f"{hook}: docs/hook_examples.py has no example of it"
    for name in owners:
        check_hooks(load_strategy(name)[0], name)
    assert f"def {hook}(" in "\n".join(PAGE.example(hook))
    assert hook in EXERCISED, f"{hook}: no test here exercises it"
    test = globals()[EXERCISED[hook]]
    assert test.__name__.startswith("test_")
    assert not [mark for mark in getattr(test, "pytestmark", []) if mark.name in ("skip", "skipif", "xfail")]
    if EXERCISED[hook] in {getattr(item, "originalname", "") for item in request.session.items}:
        assert EXERCISED[hook] in RAN, f"{hook}: its test was collected but did not run"


def test_every_example_is_shown():
    shown = {PAGE.example(hook)[0].partition("(")[0].removeprefix("class ") for hook in HOOKS}
    assert shown == {*STRATEGIES.values(), SAMPLING[1]}


def test_the_page_is_up_to_date():
    assert (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8") == PAGE.page(), "run `make docs`"

"""AdaLoRA in runs: the budget, the best adapter, the penalty, state, export, and refused input."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from budwood import AdapterPool, InputError, Run, hookimpl, tune
from budwood.adapters.export import export
from budwood.cli.app import run as command
from budwood.errors import Interrupted
from budwood.recipe.schema import Recipe
from budwood.serving.verify import verify
from budwood.training import setup
from budwood.training.loop import train
from budwood.training.report import Report
from budwood_adalora.strategy import AdaLoRA

Make = Callable[..., Recipe]
PROMPT = list(range(5, 25))


def records(run: Run, kind: str) -> list[dict[str, float]]:
    lines = (run.directory / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def config(run: Run) -> dict[str, object]:
    return json.loads((run.directory / "adapter" / "adapter_config.json").read_text())


def tensors(run: Run) -> dict[str, Tensor]:
    return load_file(run.directory / "adapter" / "adapter_model.safetensors")


def ranks(run: Run) -> dict[str, int]:
    return {key: len(tensor) for key, tensor in tensors(run).items() if key.endswith("lora_E")}


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    assert [t.shape for t in first.values()] == [t.shape for t in second.values()]
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def test_the_ranks_add_up_to_the_budget_and_some_modules_have_rank_0(trained: Run) -> None:
    saved_ranks = ranks(trained)
    assert sum(saved_ranks.values()) == 14
    assert len(saved_ranks) < 14, "at a mean rank of 1 some modules have rank 0"
    assert min(saved_ranks.values()) > 0
    assert len(config(trained)["target_modules"]) == len(saved_ranks)
    assert (trained.directory / "ranks.png").read_bytes().startswith(b"\x89PNG")
    budgets = [record["rank_budget"] for record in records(trained, "step")]
    assert budgets[0] == 84
    assert budgets[-1] == 14
    assert budgets == sorted(budgets, reverse=True)


def test_an_evaluation_before_the_budget_is_final_cannot_be_the_best(make_recipe: Make, tmp_path: Path) -> None:
    """With scripted losses step 3 is the best, and step 16 the best with final ranks (from step 14)."""
    kept: list[Tensor] = []

    class Script:
        @hookimpl(wrapper=True)
        def evaluate(self, run: Run) -> Generator[None, list[dict[str, float]], list[dict[str, float]]]:
            metrics = yield
            if run.step == 16:
                kept.extend(p.detach().clone() for p in run.trainable)
            return [{**metrics[0], "eval_loss": {3: -1.0, 16: 1.0}.get(run.step, 2.0)}]

    recipe = make_recipe(tmp_path / "run", {}, evaluate=True, eval_every=1, steps=20, patience=5)
    run, hooks, engine = setup.prepare(recipe, report := Report(quiet=True), False)
    hooks.register_core(Script(), "script")
    train(run, hooks, engine, report)
    assert run.step == 20, "evaluations before the final phase do not count for patience"
    assert run.metrics["best_step"] == 16
    assert all(torch.equal(p, old) for p, old in zip(run.trainable, kept, strict=True))
    assert sum(ranks(run).values()) == 28


def test_the_pool_and_stock_peft_open_the_adapter_of_a_run(trained: Run, tiny_base: Path) -> None:
    folder = trained.directory / "adapter"
    report = verify(folder, precision="fp32")
    assert report.exact, "golden outputs are replayed"
    pool = AdapterPool(tiny_base, precision="fp32", device="cpu")
    before = pool.logits([PROMPT])
    pool.load("a", folder)
    pool.use("a")
    on = pool.logits([PROMPT])
    assert (on - before).abs().max() > 1e-2
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    peer = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        expected = peer(torch.tensor([PROMPT])).logits[:, -1]
    torch.testing.assert_close(on, expected, atol=1e-5, rtol=1e-5)
    pool.unload("a")
    assert torch.equal(pool.logits([PROMPT]), before)


def test_it_is_exported_as_lora_with_the_same_function(trained: Run, tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    assert command(["adapter", "export", str(trained.directory / "adapter"), str(out), "--as", "lora"]) == 0
    pool = AdapterPool(tiny_base, precision="fp32", device="cpu")
    pool.load("adalora", trained.directory / "adapter")
    assert pool.load("lora", out).adapter_type == "lora"
    pool.use("adalora")
    expected = pool.logits([PROMPT])
    pool.use("lora")
    torch.testing.assert_close(pool.logits([PROMPT]), expected, atol=1e-5, rtol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        peer = PeftModel.from_pretrained(model, out).eval()(torch.tensor([PROMPT])).logits[:, -1]
    torch.testing.assert_close(peer, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="adapter type 'adalora' cannot be exported as 'ia3': use peft"):
        export(trained.directory / "adapter", tmp_path / "other", "ia3")


def test_the_adapter_does_not_depend_on_micro_batches(make_recipe: Make, tmp_path: Path) -> None:
    """On nf4; `test_conformance` splits the steps on an unquantised base."""
    runs = [
        tune(make_recipe(tmp_path / str(size), {"dropout": 0}, "nf4", micro_tokens=size), quiet=True)
        for size in (1024, 128)
    ]
    assert distance(tensors(runs[0]), tensors(runs[1])) < 1e-5
    for first, second in zip(records(runs[0], "step"), records(runs[1], "step"), strict=True):
        assert first["orthogonality"] == pytest.approx(second["orthogonality"], rel=1e-5)


def test_the_penalty_is_in_the_loss_but_not_in_evaluations(make_recipe: Make, tmp_path: Path) -> None:
    runs = [
        tune(make_recipe(tmp_path / str(weight), {"orthogonality": weight}, evaluate=True, steps=4), quiet=True)
        for weight in (0, 0.5, 50)
    ]
    assert len({run.before["eval_loss"] for run in runs}) == 1
    without, with_it = (records(run, "step")[0] for run in runs[:2])
    assert "orthogonality" not in without
    # Rows of A and columns of B are normal with variance 1/n, n their length: E ‖A Aᵀ − I‖² = r (r + 1) / n = 20 / n.
    assert 20 / 128 / 2 < with_it["orthogonality"] < 2 * 2 * 20 / 32
    assert with_it["loss"] == pytest.approx(with_it["causal_lm"] + 0.5 * with_it["orthogonality"], rel=1e-5)
    assert with_it["causal_lm"] == pytest.approx(without["causal_lm"], rel=1e-6)
    strong = [record["orthogonality"] for record in records(runs[2], "step")]
    assert strong[-1] < strong[0]
    evaluation = records(runs[2], "evaluation")[-1]
    assert evaluation["eval_loss"] < 20


def test_restored_state_leads_to_the_same_ranks(make_recipe: Make, tmp_path: Path) -> None:
    """The state of strategy, parameters and optimizer after step 5, restored in a new run, leads to the same steps."""
    saved: dict[str, object] = {}

    class Watch:
        """Saves the state after step 5, or restores it."""

        def __init__(self, restore: bool) -> None:
            self.restore = restore

        @hookimpl
        def after_optimizer_step(self, run: Run) -> None:
            strategy = run.strategies[0]
            if run.step == 4 and not self.restore:
                saved["strategy"] = copy.deepcopy(strategy.state_dict(run))
                saved["parameters"] = [p.detach().clone() for p in run.trainable]
                saved["optimizer"] = copy.deepcopy(run.optimizer.state_dict())
            elif run.step == 4:
                for p in run.trainable:  # discard this run's values
                    p.data.fill_(0.1)
                strategy.load_state_dict(run, saved["strategy"])
                for p, value in zip(run.trainable, saved["parameters"], strict=True):
                    p.data.copy_(value)
                run.optimizer.load_state_dict(saved["optimizer"])

    def train_run(name: str, restore: bool) -> Run:
        recipe = make_recipe(tmp_path / name, {"target_rank": 1}, steps=14)
        run, hooks, engine = setup.prepare(recipe, report := Report(quiet=True), False)
        hooks.register_core(Watch(restore), "watch")
        if restore:  # different values until then
            for p in run.trainable:
                p.data.add_(0.3)
        train(run, hooks, engine, report)
        return run

    first = train_run("first", restore=False)
    assert any(key.startswith("sensitivity.") for key in saved["strategy"])
    second = train_run("second", restore=True)
    assert ranks(first) == ranks(second)
    assert len(set(ranks(first).values())) > 1


def test_state_with_final_ranks_restores_the_shapes(trained: Run, make_recipe: Make, tmp_path: Path) -> None:
    strategy: AdaLoRA = trained.strategies[0]
    state = json.loads(json.dumps(strategy.state_dict(trained)))  # without tensors
    recipe = make_recipe(tmp_path / "fresh", {"initial_rank": 6, "target_rank": 1}, evaluate=True)
    run, _, _ = setup.prepare(recipe, Report(quiet=True), False)
    assert not run.adapter_final
    run.strategies[0].load_state_dict(run, state)
    assert [p.shape for p in run.trainable] == [p.shape for p in trained.trainable]
    assert run.adapter_final
    with pytest.raises(Exception, match="version 9"):
        run.strategies[0].load_state_dict(run, state | {"version": 9})


@pytest.mark.parametrize("train", [{"steps": 15}, {"epochs": 5}])
def test_a_run_that_is_too_short_is_refused_with_the_minimum_before_the_base_loads(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: dict[str, int]
) -> None:
    monkeypatch.setattr(setup, "load_base", lambda *a, **k: pytest.fail("the base was loaded"))
    recipe = make_recipe(tmp_path / "run", {"interval": 10}, **train)
    with pytest.raises(InputError, match="a run of 15 steps is too short .* it needs at least 17 steps"):
        tune(recipe, quiet=True)


def test_a_rank_beyond_the_matrix_and_a_second_owner_are_refused(make_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="initial_rank 40: 'model.layers.0.self_attn.k_proj' has 32 singular values"):
        tune(make_recipe(tmp_path / "run", {"initial_rank": 40}), quiet=True)
    recipe = make_recipe(tmp_path / "run", {}).model_dump()
    recipe["strategies"].append({"name": "lora", "options": {}})
    both = Recipe.from_dict({**recipe, "strategies": [{"adalora": {}}, "lora"]})
    with pytest.raises(InputError, match="both own the slot 'adapter'"):
        tune(both, quiet=True)


@pytest.mark.parametrize(("quantization", "precision"), [("nf4", "bf16"), ("int8", "bf16"), ("int8", "fp32")])
def test_it_trains_on_other_bases_and_in_16_bit(
    make_recipe: Make, tmp_path: Path, quantization: str, precision: str
) -> None:
    recipe = make_recipe(tmp_path / "run", {}, quantization, evaluate=True, precision=precision)
    run = tune(recipe, quiet=True)
    assert sum(ranks(run).values()) == 28
    assert run.metrics["eval_loss"] < run.before["eval_loss"]
    assert all(p.dtype == torch.float32 for p in run.trainable)
    assert verify(run.directory / "adapter").exact


def test_a_classifier_trains_its_head_with_it(make_recipe: Make, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"text": f"{word} " * (2 + i), "label": word} for i in range(6) for word in ("games", "files")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = make_recipe(tmp_path / "run", {}).model_dump(mode="json")
    recipe["base"]["task"] = "sequence-classification"
    recipe["data"] = {"train": str(data), "max_length": 128}
    recipe["strategies"] = [{"adalora": {"initial_rank": 4, "target_rank": 2, "interval": 2}}]
    recipe["train"] = {key: value for key, value in recipe["train"].items() if value is not None}
    run = tune(Recipe.from_dict(recipe), quiet=True)
    assert sum(ranks(run).values()) == 28
    assert config(run)["modules_to_save"] == ["score"]
    assert "base_model.model.score.weight" in tensors(run)
    assert verify(run.directory / "adapter", precision="fp32").exact


def test_an_interrupted_run_saves_its_adapter_and_reports_that_the_budget_was_not_reached(
    make_recipe: Make, tmp_path: Path, tiny_base: Path
) -> None:
    class Stop:
        @hookimpl
        def before_clip(self, run: Run) -> None:
            if run.step == 6:
                raise KeyboardInterrupt

    lines: list[str] = []
    run, hooks, engine = setup.prepare(make_recipe(tmp_path / "run", {}), report := Report(quiet=True), False)
    run.say = lines.append
    hooks.register_core(Stop(), "stop")
    with pytest.raises(Interrupted, match="the adapter of step 6 is kept"):
        train(run, hooks, engine, report)
    assert any("the budget was not reached; all 56 ranks are saved" in line for line in lines)
    assert sum(ranks(run).values()) == 56
    AdapterPool(tiny_base, precision="fp32", device="cpu").load("a", run.directory / "adapter")


@pytest.mark.plots
def test_a_run_without_pruning_reports_it_and_keeps_all_ranks(
    make_recipe: Make, tmp_path: Path, capsys: object
) -> None:
    run = tune(make_recipe(tmp_path / "run", {"initial_rank": 2, "target_rank": 2}))
    assert "no ranks will be pruned" in capsys.readouterr().err
    assert set(ranks(run).values()) == {2}
    assert len(ranks(run)) == 14
    assert (run.directory / "ranks.png").exists()

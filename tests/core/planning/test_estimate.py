"""Estimates of memory, time and disk: against real steps, for other devices, and for input that is not there."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.plan import RECIPES, build, make_bases, write_rows
from tests.core.model.test_experts import make_family

from budwood.contract.discovery import PluginError
from budwood.errors import InputError, ResourceError
from budwood.model.checks import skeleton
from budwood.model.halves.chain import Chain
from budwood.model.ops import tiles
from budwood.model.task import Task
from budwood.model.text_tasks import CausalLM
from budwood.planning import admission
from budwood.planning.devices import find_device
from budwood.planning.estimate import Estimate, _download, estimate, refusal
from budwood.planning.options import GIB, Device
from budwood.planning.passes import rehearse_passes
from budwood.planning.rehearsal import BASE, QUANTIZED, rehearse
from budwood.planning.sizes import ROOM
from budwood.planning.trace import CUDA_BLOCK
from budwood.recipe.schema import Recipe
from budwood.testing.allocations import measured_evaluation_peak, measured_peak

COMPARED = (
    "lora, nf4, bf16", "lora, fp4, dropout, gradient checkpointing", "adalora, nf4", "lora, adversarial (smart)",
    "lora, dpo", "lora, grpo", "lora, distillation", "lora, sequence-classification", "lora, int8, bf16",
    "lora, masked-lm", "lora, sequence-to-sequence", "lora, embedding", "lora with DoRA, nf4",
    "lora and a whole head, adamw-8bit",
)  # fmt: skip
CPU = Device("a CPU", "cpu", 64 * GIB)


@pytest.fixture(autouse=True)
def frozen() -> None:
    """Leave torch's cache of fake operations out of collections of garbage: a test has several, and it only grows."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A small base and rows of every kind."""
    folder = tmp_path_factory.mktemp("plan")
    make_bases(folder, hidden=64, inner=172, layers=2, vocabulary=600)
    return folder / "base", write_rows(folder, words=3)


@pytest.fixture
def case(files: tuple[Path, dict[str, Path]], tmp_path: Path) -> Callable[..., Recipe]:
    """Function `case(name, **changes)` -> the recipe of that name with changes to its entry."""

    def make(name: str, **changes: Any) -> Recipe:
        return build({**RECIPES[name], **changes}, *files, tmp_path / "run")

    return make


@pytest.fixture(scope="module")
def lora(files: tuple[Path, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> Estimate:
    """The plan of `lora` on the CPU."""
    return estimate(build(RECIPES["lora"], *files, tmp_path_factory.mktemp("lora") / "run"), CPU)


@pytest.mark.parametrize("name", COMPARED)
def test_the_peak_is_that_of_a_real_run(case: Callable[..., Recipe], name: str):
    """The base is so small that activations are almost all of it; a cache of layouts in bf16 attention is 1.7 MB."""
    planned = estimate(case(name), CPU)
    actual = measured_peak(case(name))
    assert planned.peak == sum(planned.parts.values())
    assert planned.parts["activations"] + planned.parts["temporaries"] > planned.peak / 3
    assert planned.peak == pytest.approx(actual, rel=0.05 if "bf16" not in name else 0.14)


def test_the_peak_of_an_evaluation_is_that_of_a_real_one(case: Callable[..., Recipe]):
    recipe = case("lora, nf4", train={"eval_generate": 0})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"eval": recipe.data.train})})
    with rehearse(recipe, torch.float32) as rehearsal:
        peak = rehearse_passes(rehearsal, CPU, 1).peak
    assert peak is not None and peak.parts["temporaries"] + peak.parts["activations"] > 0.8 * peak.total
    assert peak.total == pytest.approx(measured_evaluation_peak(recipe), rel=0.05)


@pytest.mark.parametrize("name", ["lora, fp4, dropout, gradient checkpointing", "lora, nf4, bf16"])
def test_the_peak_of_a_mixture_is_that_of_a_real_run(files: tuple[Path, dict[str, Path]], tmp_path: Path, name: str):
    make_family("Mixtral", tmp_path / "base")
    recipes = [build(RECIPES[name], tmp_path / "base", files[1], tmp_path / run) for run in ("a", "b")]
    planned = estimate(recipes[0], CPU)
    assert "experts: planned with the same number of tokens for each" in planned.notes
    assert planned.parts["base, quantised"] > 0
    assert planned.peak == pytest.approx(measured_peak(recipes[1]), rel=0.05)


def test_the_peak_with_one_layer_recomputed_in_tiles_is_that_of_a_real_run(
    case: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
):
    recipe, rows = case("lora, nf4, one layer recomputed"), []
    monkeypatch.setattr(tiles, "FROM", 256)
    monkeypatch.setattr(tiles, "ROWS", 128)
    original = Chain.pieces
    monkeypatch.setattr(Chain, "pieces", lambda *args: (rows.append(len(original(*args))), original(*args))[1])
    planned = estimate(recipe, CPU)
    assert max(rows) > 2
    assert planned.peak == pytest.approx(measured_peak(recipe), rel=0.05)


def test_as_few_layers_recompute_as_fit(case: Callable[..., Recipe]):
    one = estimate(case("lora", train={"gradient_checkpointing": 1, "micro_tokens": 2048}), CPU)
    device = Device("a CPU", "cpu", int(1.001 * one.needed / ROOM))
    found = estimate(case("lora", train={"gradient_checkpointing": "auto", "micro_tokens": 2048}), device)
    assert repr(found.gradient_checkpointing) == "1" and found.fits
    assert found.peak == pytest.approx(one.peak, rel=0.005)  # factors of adapters: at once from the second pass on
    assert (one.recomputed, one.layers) == (1, 2)


def test_inputs_of_layers_on_the_host(case: Callable[..., Recipe]):
    card = find_device("RTX 4090")
    train = {"gradient_checkpointing": True, "precision": "bf16", "micro_tokens": 2048}
    plain, moved = (
        estimate(case("lora", train={**train, "activation_offloading": offloads}), card) for offloads in (False, True)
    )
    each = moved.largest_micro * 64 * 2  # tokens, hidden size, bf16
    power = 1 << (each - 1).bit_length()
    assert (plain.offloaded, moved.offloaded) == (0, 2 * power) and moved.host - plain.host == 2 * power
    assert plain.peak - moved.peak <= -(-each // CUDA_BLOCK) * CUDA_BLOCK  # with two layers, one is always there
    with pytest.raises(InputError, match="on the CPU, activations are in the host's memory already"):
        estimate(case("lora", train={**train, "activation_offloading": True}), CPU)


def test_what_a_plan_says(case: Callable[..., Recipe], lora: Estimate):
    plain = lora
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
    values = json.loads(json.dumps(cuda.as_dict()))
    fields = {
        "memory": {"peak_bytes", "parts", "where"}, "step": {"flops", "bytes", "tokens"}, "time": {"seconds"},
        "disk": {"bytes", "download_bytes"}, "host": {"peak_bytes", "loading_bytes"},
    }  # fmt: skip
    assert all(fields[name] <= values[name].keys() for name in fields) and values["fits"] is True
    assert values["memory"]["peak_bytes"] == cuda.peak == sum(cuda.parts.values())
    assert type(cuda).from_dict(json.loads(json.dumps(cuda.as_dict())), card) == cuda


def test_evaluations_and_generation_are_part_of_the_time(case: Callable[..., Recipe], files: Any):
    card, recipe = find_device("RTX 4090"), case("lora", train={"steps": 11})
    short = files[1]["prompts"].with_name("short.jsonl")
    short.write_text(json.dumps({"prompt": "two and two", "completion": "four"}) + "\n")
    data = recipe.data.model_copy(update={"eval": short, "train": files[1]["answers"]})
    train = recipe.train.model_copy(update={"eval_every": 3})
    plain = estimate(recipe, card)
    evaluated = estimate(recipe.model_copy(update={"data": data, "train": train}), card)
    assert (plain.evaluations, evaluated.evaluations) == (0, 2 + 3)  # before step 1, at 3, 6 and 9, and at the end
    assert plain.evaluation == plain.generation == (0, 0) and plain.kv_cache == 0
    assert plain.seconds == plain.training == pytest.approx(evaluated.training)
    assert evaluated.seconds is not None and evaluated.generation is not None and evaluated.evaluation is not None
    assert 0 < evaluated.evaluation[0] < evaluated.generation[0] < evaluated.seconds[0]  # an answer takes many passes
    assert evaluated.kv_cache == 2 * 2 * 2 * 16 * 4 * (12 + 5 + 4)  # layers, keys and values, heads, fp32; tokens
    sampled = estimate(case("lora, grpo"), card)
    assert sampled.generation is not None and sampled.generation[0] > 0 and sampled.kv_cache > 0
    values = evaluated.as_dict()["time"]
    assert values["seconds"][0] == pytest.approx(
        values["training_seconds"][0] + values["evaluation_seconds"][0] + values["generation_seconds"][0]
    )
    assert evaluated.host >= evaluated.loading > 5e8


def test_the_download_is_that_of_missing_weights(
    case: Callable[..., Recipe], lora: Estimate, tmp_path: Path, monkeypatch: Any
):
    recipe = case("lora")
    folder = tmp_path / "models--some--base" / "snapshots" / ("0" * 40)
    shutil.copytree(recipe.base.model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "models--some--base" / "refs").mkdir()
    (tmp_path / "models--some--base" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub = recipe.model_copy(update={"base": recipe.base.model_copy(update={"model": "some/base"})})
    planned = estimate(hub, CPU)
    parameters = planned.parts["base, not quantised"] / 4
    assert lora.download == 0 and planned.download == pytest.approx(4 * parameters, rel=0.01)
    index = {"metadata": {"total_size": 12345}, "weight_map": {"lm_head.weight": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with rehearse(hub, torch.float32) as rehearsal:
        assert _download(rehearsal) == 12345
        shutil.copy(Path(recipe.base.model) / "model.safetensors", folder / "model-1.safetensors")
        assert _download(rehearsal) == 0


def test_without_data_the_tokens_decide(case: Callable[..., Recipe]):
    recipe = case("lora, dpo", train={"steps": None, "epochs": 1})
    given = estimate(recipe, CPU, tokens=512)
    assert given.largest_micro <= 512 and given.steps is None
    assert "without data" in given.notes[0]


def test_a_task_without_stand_in_rows_is_refused_by_name(case: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CausalLM, "planned_row", Task.planned_row)
    with pytest.raises(
        InputError, match=r"--tokens: task 'causal-lm' .*no rows that stand in for data.*plan with data"
    ):
        estimate(case("lora"), CPU, tokens=512)


def test_a_length_beyond_the_positions_is_refused_without_data(case: Callable[..., Recipe]):
    recipe = case("lora")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": 1 << 20})})
    with pytest.raises(InputError, match=r"data\.max_length: 1,048,576 tokens are more than .* its positions"):
        estimate(recipe, CPU, tokens=1 << 21)


def test_a_strategy_that_reads_values_is_named(
    case: Callable[..., Recipe], lora: Estimate, distribution: Callable[..., Path]
):
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

        class Planned(Strategy):
            '''Keeps the gradients of steps whose sum is positive: all of them in a plan.'''
            Options = Options
            api = 2

            @hookimpl
            def before_clip(self, run):
                if run.planning or float(run.trainable[0].grad.sum()) > 0:
                    self.kept = [parameter.grad.clone() for parameter in run.trainable]
        """,
        {"reader": "Reader", "reader-planned": "Planned"},
    )
    with pytest.raises(PluginError, match=r"strategy 'reader'.*reads the values of tensors.*run\.planning"):
        estimate(case("lora", strategies=[{"lora": {}}, {"reader": {}}]), CPU)
    kept = estimate(case("lora", strategies=[{"lora": {}}, {"reader-planned": {}}]), CPU)
    assert kept.peak == lora.peak + lora.parts["gradients"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dora": True}, "strategy 'lora' .* needs the base's weights whole: use train.parallel: replicate"),
        ({"modules_to_save": ["down_proj"]}, r"'model\.layers\.0\.mlp\.down_proj' of modules_to_save .* in a layer"),
    ],
)
def test_a_sharded_base_that_a_strategy_needs_whole_is_refused(
    case: Callable[..., Recipe], options: dict[str, Any], said: str
) -> None:
    """Before anything is rehearsed; without `train.parallel`, the plan replicates it."""
    recipe = case("lora", strategies=[{"lora": options}], train={"micro_tokens": 640})
    with pytest.raises(InputError, match=f"train.parallel: {said}"):
        estimate(recipe.with_train(recipe.train.model_copy(update={"parallel": "shard"})), CPU, processes=2)
    if "dora" in options:
        tight = Device("a card", "cuda", 1 << 20, link=1e9)
        assert estimate(recipe, tight, processes=2).exchange.parallel == "replicate"


def test_processes_shard_a_base_that_would_not_fit_else(case: Callable[..., Recipe]) -> None:
    """As `budwood plan --processes` says it, and `tune` does it."""
    recipe, said = case("lora", quantization="nf4", train={"micro_tokens": 640}), []
    roomy, tight = (Device("a card", "cuda", size, link=1e9) for size in (8 * GIB, 1 << 29))

    def planned(device: Device, parallel: str | None, processes: int = 4) -> Estimate:
        chosen = recipe.with_train(recipe.train.model_copy(update={"parallel": parallel}))
        return estimate(chosen, device, processes=processes)

    def decide(result: Estimate) -> Any:
        run = SimpleNamespace(
            recipe=recipe, processes=4, sharded=False, micro_tokens=64, say=said.append, device=torch.device("cpu")
        )
        admission._decide(run, result)
        return run.sharded

    whole, free, sharded, forced = (
        planned(roomy, "replicate"), planned(roomy, None), planned(roomy, "shard"), planned(tight, None),
    )  # fmt: skip
    assert [e.exchange.parallel for e in (whole, free, sharded, forced)] == ["replicate"] * 2 + ["shard"] * 2
    assert not decide(free) and decide(sharded)
    assert said[-1].startswith("plan: ") and "in each of 4 processes with a sharded base" in said[-1]
    with pytest.raises(ResourceError, match="memory: the run needs"):
        decide(forced)
    assert Estimate.from_dict(sharded.as_dict(), roomy) == sharded

    base, exchange, trained = skeleton(recipe.base.model), sharded.exchange, whole.parts["gradients"]
    layers = base.model.layers
    matrices = sum(p.numel() for p in layers.parameters() if p.ndim > 1)
    assert exchange.share == pytest.approx(matrices / 4 * (0.5 + 1 / 64), rel=0.01)  # packed, and a scale for each 64
    assert exchange.share + exchange.replicated == pytest.approx(sharded.parts[QUANTIZED] + sharded.parts[BASE])
    one = estimate(recipe, roomy)
    assert whole.parts[QUANTIZED] == one.parts[QUANTIZED] == sharded.parts[QUANTIZED] + 3 * exchange.share
    assert exchange.gathered == pytest.approx(2 * 4 * exchange.share / len(layers), rel=0.01)
    assert whole.exchange.received == 0 and exchange.gathers == 2 * len(layers) * sharded.micro_batches
    assert exchange.received == pytest.approx(2 * sharded.micro_batches * 3 * exchange.share, rel=0.01)
    assert exchange.reduced == 2 * 3 / 4 * trained
    moved = exchange.reduced + exchange.received
    assert exchange.seconds == pytest.approx((moved / 0.85e9, moved / 0.5e9))


def test_what_cannot_fit_is_refused_before_the_base_loads(case: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch):
    recipe = case("lora", train={"micro_tokens": 2048})
    tight = estimate(recipe, Device("a small CPU", "cpu", 1 << 20))
    text = refusal(tight, recipe)
    assert not tight.fits
    assert "a small CPU has 1.0 MiB" in text and "GiB are libraries" in text
    parts = {"activations": 3 * GIB, "base, quantised": GIB, "CUDA's context": GIB // 2}
    small = replace(tight, device=Device("a card", "cuda", 4 * GIB), parts=parts)
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

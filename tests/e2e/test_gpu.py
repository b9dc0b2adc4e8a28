"""The same runs on CUDA: quantised base, packed rows, adapters and their pool. Skipped where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import budwood
from budwood.errors import Interrupted
from budwood.training import loop
from budwood.training.recipe import Recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path) -> Callable[..., Recipe]:
    rows = [{"prompt": f"number {n}:", "completion": f" {n % 3}"} for n in range(24)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def make(output: str, *strategies: Any, base: dict[str, Any] | None = None, **train: Any) -> Recipe:
        section = {
            "steps": 4, "batch_examples": 8, "micro_tokens": 256, "learning_rate": 1e-2, "schedule": "constant",
            "warmup": 0, "precision": "fp32", "eval_generate": 0,
        }  # fmt: skip
        return Recipe.from_dict(
            {
                "base": {"model": str(tiny_base), "quantization": "none", "device": "cuda", **(base or {})},
                "data": {"train": str(data), "max_length": 64},
                "strategies": list(strategies) or [{"lora": {"rank": 4}}],
                "train": section | train,
                "output": str(tmp_path / output),
            }
        )

    return make


def adapter(run: Any) -> dict[str, torch.Tensor]:
    return load_file(run.directory / "adapter" / "adapter_model.safetensors")


def test_an_fp32_run_ends_where_it_ends_on_the_cpu(recipe: Callable[..., Recipe]) -> None:
    here = adapter(budwood.tune(recipe("cuda"), quiet=True))
    there = adapter(budwood.tune(recipe("cpu", base={"device": "cpu"}), quiet=True))
    for name, tensor in here.items():
        torch.testing.assert_close(tensor, there[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_run_that_stops_goes_on(
    recipe: Callable[..., Recipe], deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout: to the same bits under deterministic kernels, else within rounding."""
    strategies = [{"lora": {"rank": 4, "dropout": 0.2}}, {"adversarial": {"method": "pgd"}}]
    options = {"base": {"quantization": "nf4"}, "steps": 6, "save_every": 2, "deterministic": deterministic}
    sum_gradients = loop.sum_gradients

    def stop(run: Any) -> None:
        if run.step == 3:
            raise KeyboardInterrupt
        sum_gradients(run)

    try:
        whole = adapter(budwood.tune(recipe("whole", *strategies, **options), quiet=True))
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(loop, "sum_gradients", stop)
            budwood.tune(recipe("run", *strategies, **options), quiet=True)
        run = budwood.tune(recipe("run", *strategies, **options), quiet=True, resume=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert json.loads((run.directory / "manifest.json").read_text())["resumed_from_step"] == 2
    for name, tensor in adapter(run).items():
        if deterministic:
            assert torch.equal(tensor, whole[name])
        torch.testing.assert_close(tensor, whole[name], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp4"])
def test_a_quantised_base_trains(recipe: Callable[..., Recipe], quantization: str) -> None:
    run = budwood.tune(recipe("run", base={"quantization": quantization}, precision="bf16", steps=12), quiet=True)
    assert run.base.device.type == "cuda"
    losses = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    values = [row["loss"] for row in losses if "loss" in row]
    assert values[-1] < values[0]


def test_micro_batches_do_not_change_a_quantised_run(recipe: Callable[..., Recipe]) -> None:
    one, two = (
        adapter(budwood.tune(recipe(f"run{tokens}", base={"quantization": "nf4"}, micro_tokens=tokens), quiet=True))
        for tokens in (256, 64)
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "strategies",
    [
        ({"adalora": {"initial_rank": 4, "target_rank": 2, "interval": 2}},),
        ({"lora": {"rank": 4}}, {"adversarial": {"method": "freelb"}}),
        ({"lora": {"rank": 4}}, {"distillation": {"teacher": "base"}}),
    ],
    ids=["adalora", "freelb", "distillation"],
)
def test_strategies_run(recipe: Callable[..., Recipe], strategies: tuple[Any, ...]) -> None:
    run = budwood.tune(recipe("run", *strategies, base={"quantization": "nf4"}, steps=12, precision="bf16"), quiet=True)
    assert all(torch.isfinite(p).all() for p in run.trainable)


def test_off_is_the_bases_own_bits(recipe: Callable[..., Recipe], tiny_base: Path) -> None:
    run = budwood.tune(recipe("run"), quiet=True)
    pool = budwood.AdapterPool(str(tiny_base), quantization="nf4", device="cuda")
    ids = torch.arange(5, 25, device="cuda")[None]
    with torch.no_grad():
        before = pool.base.model(ids).logits
        pool.load("a", run.directory / "adapter")
        pool.use("a")
        used = pool.base.model(ids).logits
        pool.use(None)
        after = pool.base.model(ids).logits
    assert torch.equal(before, after)
    assert not torch.equal(before, used)

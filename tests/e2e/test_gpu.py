"""Runs on CUDA: quantised bases, packed rows, adapters and their pool."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.core.model.ops.test_expert_ops import EXPERTS, IN, OUT, TOKENS, chosen, factors, make, reference, weights
from tests.core.model.test_experts import make_family

import budwood
from budwood.errors import Interrupted
from budwood.model.ops.experts import Routing, combine, dispatch, expert_linear
from budwood.model.quantizers.experts import DenseExperts, FourBitExperts, Int8Experts
from budwood.recipe.schema import Recipe
from budwood.serving.verify import verify
from budwood.training import loop, packing_check

pytestmark = pytest.mark.gpu


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(
        output: str, *strategies: Any, base: dict[str, Any] | None = None, rows: int = 24, labels: bool = False,
        **train: Any,
    ) -> Recipe:  # fmt: skip
        data = tmp_path / "train.jsonl"
        if labels:
            lines = [{"text": f"number {n} of {rows}", "label": ("even", "odd")[n % 2]} for n in range(rows)]
        else:
            lines = [{"prompt": f"number {n}:", "completion": f" {n % 3}"} for n in range(rows)]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        section = {
            "steps": 4, "batch_examples": 8, "micro_tokens": 256, "learning_rate": 1e-2, "schedule": "constant",
            "warmup": 0, "precision": "fp32", "eval_generate": 0,
        }  # fmt: skip
        return Recipe.from_dict(
            {
                "base": {"model": str(tiny_base), "quantization": "none", "device": "cuda", **(base or {})},
                "data": {"train": str(data), "max_length": 64} | {"eval": str(data) if labels else "none"},
                "strategies": list(strategies) or [{"lora": {"rank": 4}}],
                "train": section | train,
                "output": str(tmp_path / output),
            }
        )

    return make


def adapter(run: Any) -> dict[str, torch.Tensor]:
    return load_file(run.directory / "adapter" / "adapter_model.safetensors")


def steps(run: Any) -> list[dict[str, Any]]:
    lines = map(json.loads, (run.directory / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "step"]


def test_an_fp32_run_matches_the_cpu(recipe: Callable[..., Recipe]) -> None:
    here = adapter(budwood.tune(recipe("cuda"), quiet=True))
    there = adapter(budwood.tune(recipe("cpu", base={"device": "cpu"}), quiet=True))
    for name, tensor in here.items():
        torch.testing.assert_close(tensor, there[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_an_interrupted_run_resumes(
    recipe: Callable[..., Recipe], deterministic: bool, precision: str, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:  # fmt: skip
    """With dropout: bitwise identical with deterministic kernels, otherwise up to rounding, which is reported."""
    strategies = [{"lora": {"rank": 4, "dropout": 0.2}}, {"adversarial": {"method": "pgd"}}]
    options = {"base": {"quantization": "nf4"}, "steps": 6, "save_every": 2}
    options |= {"deterministic": deterministic, "precision": precision}
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
        run = budwood.tune(recipe("run", *strategies, **options), resume=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert ("up to rounding" in capfd.readouterr().err) is not deterministic
    assert json.loads((run.directory / "manifest.json").read_text())["resumed_from_step"] == 2
    for name, tensor in adapter(run).items():
        if deterministic:
            assert torch.equal(tensor, whole[name])
        torch.testing.assert_close(tensor, whole[name], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp4"])
def test_a_quantised_base_trains(recipe: Callable[..., Recipe], quantization: str) -> None:
    run = budwood.tune(recipe("run", base={"quantization": quantization}, precision="bf16", steps=12), quiet=True)
    assert run.base.device.type == "cuda"
    assert steps(run)[-1]["loss"] < steps(run)[0]["loss"]


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"precision": "bf16", "gradient_checkpointing": True}])
def test_half_precision_and_recomputation_give_the_same_losses(
    recipe: Callable[..., Recipe], options: dict[str, Any]
) -> None:
    """Losses are compared, since Adam's first steps turn 16-bit rounding into the sign of an update."""
    plain, other = (
        [step["loss"] for step in steps(run)]
        for run in (
            budwood.tune(recipe("plain", precision="bf16", base={"quantization": "nf4"}), quiet=True),
            budwood.tune(recipe("other", **options, base={"quantization": "nf4"}), quiet=True),
        )
    )
    assert len(plain) == 4
    assert other == pytest.approx(plain, rel=0.02)


def test_memory_that_runs_out_splits_the_step(recipe: Callable[..., Recipe], capfd: pytest.CaptureFixture) -> None:
    """Not injected: the allocator has less memory than the step needs."""
    options = {"micro_tokens": 1 << 20, "batch_examples": 2048, "steps": 2}
    torch.cuda.reset_peak_memory_stats()
    whole = adapter(budwood.tune(recipe("whole", rows=2048, **options), quiet=True))
    needed = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.7 * needed / torch.cuda.get_device_properties(0).total_memory)
    try:
        run = budwood.tune(recipe("split", rows=2048, **options))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory: the step is repeated" in capfd.readouterr().err
    assert run.micro_tokens < 1 << 20
    for name, tensor in adapter(run).items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-5, rtol=1e-3)


def test_an_adapter_is_verified_here_and_elsewhere(recipe: Callable[..., Recipe]) -> None:
    run = budwood.tune(recipe("run", base={"quantization": "nf4"}, precision="bf16"), quiet=True)
    assert verify(run.directory / "adapter", device="cuda").exact
    there = verify(run.directory / "adapter", device="cpu")
    assert not there.exact and there.adapter.divergence < 0.05


def test_a_classifier_trains(recipe: Callable[..., Recipe]) -> None:
    base = {"quantization": "nf4", "task": "sequence-classification"}
    run = budwood.tune(recipe("run", base=base, precision="bf16", steps=40, labels=True), quiet=True)
    assert run.metrics["eval_accuracy"] > 0.9


def test_micro_batches_do_not_change_a_quantised_run(recipe: Callable[..., Recipe]) -> None:
    """One step to 1e-5; later ones amplify the rounding of cuBLAS, whose kernels depend on the shape."""

    def run(tokens: int, count: int) -> Any:
        options = {"base": {"quantization": "nf4"}, "micro_tokens": tokens, "steps": count}
        return budwood.tune(recipe(f"run{tokens}-{count}", **options), quiet=True)

    (first, second), (one, two) = (map(read, (run(256, n), run(64, n))) for read, n in ((steps, 4), (adapter, 1)))
    assert second[0]["gradient_norm"] == pytest.approx(first[0]["gradient_norm"], rel=1e-5)
    assert [step["loss"] for step in second] == pytest.approx([step["loss"] for step in first], rel=1e-4)
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


def test_tokens_of_other_examples_do_not_change_a_bit(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check that distinguishes the rounding of a deep model from mixed packed examples."""
    monkeypatch.setattr(packing_check, "ROUNDING", -1.0)
    assert budwood.tune(recipe("run", base={"quantization": "nf4"}, precision="bf16"), quiet=True).packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "rank"), [("dense", 8), ("nf4", 8), ("nf4", 3), ("int8", 8)])
def test_products_with_experts_are_those_of_float64(kind: str, rank: int, dtype: torch.dtype) -> None:
    """In bf16, and with a rank of 8, by the grouped kernel; the others expert by expert. One expert gets no token."""
    weight = weights().to("cuda")
    base = {
        "dense": lambda: DenseExperts(torch.nn.Parameter(weight.to(dtype), requires_grad=False), transposed=False),
        "nf4": lambda: FourBitExperts.pack(weight, "nf4", double=True),
        "int8": lambda: Int8Experts.pack(weight),
    }[kind]()
    wide = base.dequantize(0, EXPERTS, torch.float32).cpu()
    there = make(kind).dequantize(0, EXPERTS, torch.float32)
    assert float((wide - there).norm()) < 0.02 * float(there.norm())
    picks, generator = chosen(), torch.Generator().manual_seed(3)
    sizes = ((TOKENS, IN), (TOKENS, 2), (TOKENS, OUT))
    x, mixture, upstream = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    inputs = [tensor.detach().to(dtype) for tensor in (x, *factors(rank, dtype), mixture)]
    mine = [tensor.to("cuda").requires_grad_() for tensor in inputs]
    routing = Routing.of(picks.to("cuda"), EXPERTS)
    y = combine(expert_linear(dispatch(mine[0], routing), base, routing, *mine[1:3], 0.5), mine[3], routing)
    found = [y, *torch.autograd.grad(y, mine, upstream.to("cuda"))]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    expected = reference(exact[0], wide.double(), exact[1], exact[2], picks, exact[3])
    wanted = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
    for one, true in zip(found, wanted, strict=True):
        bound = 1e-5 if dtype is torch.float32 else 0.03
        assert float((one.cpu() - true).detach().abs().max()) <= bound * float(true.detach().abs().max())


def test_a_mixture_trains_as_on_the_cpu_and_in_4_bit(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    make_family("Olmoe", tmp_path / "base")
    base = {"model": str(tmp_path / "base")}
    here = steps(budwood.tune(recipe("cuda", base=base), quiet=True))
    there = steps(budwood.tune(recipe("cpu", base={**base, "device": "cpu"}), quiet=True))
    assert here[0]["gradient_norm"] == pytest.approx(there[0]["gradient_norm"], rel=1e-4)
    assert [step["loss"] for step in here] == pytest.approx([step["loss"] for step in there], rel=1e-3)
    nf4 = recipe("nf4", base={**base, "quantization": "nf4"}, precision="bf16", steps=12)
    run = budwood.tune(nf4, quiet=True)
    assert steps(run)[-1]["loss"] < steps(run)[0]["loss"]
    assert verify(run.directory / "adapter", device="cuda").exact


def test_without_an_adapter_in_use_logits_are_bitwise_identical_to_the_base(
    recipe: Callable[..., Recipe], tiny_base: Path
) -> None:
    run = budwood.tune(recipe("run"), quiet=True)
    pool = budwood.AdapterPool(str(tiny_base), quantization="nf4", device="cuda")
    ids = torch.arange(5, 25, device="cuda")[None]
    with torch.no_grad():
        before = pool.base.model(ids).logits
        pool.load("a", run.directory / "adapter")
        pool.use("a")
        active = pool.base.model(ids).logits
        pool.use(None)
        after = pool.base.model(ids).logits
    assert torch.equal(before, after)
    assert not torch.equal(before, active)

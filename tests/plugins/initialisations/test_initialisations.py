"""Initialisations against stock PEFT and float64: training, file, untouched base; their runs, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from budwood.adapters.store import read_adapter
from budwood.adapters.use import use_adapters
from budwood.contract.examples import Example
from budwood.contract.loading import build_strategy
from budwood.errors import InputError, Interrupted
from budwood.model.text_tasks import CausalLM
from budwood.parallel.processes import Processes
from budwood.planning.composition import plan
from budwood.recipe.schema import Recipe
from budwood.serving.exports.targets import export_for
from budwood.serving.exports.wanted import Wanted
from budwood.serving.merge import merge
from budwood.serving.pool import AdapterPool
from budwood.serving.verify import verify
from budwood.training.loop import tune
from budwood.training.reference import is_off
from budwood_initialisations import compute, statistics
from budwood_initialisations.compute import principal, share_ranks

IDS = torch.arange(5, 45)
TARGETS = ["q_proj", "v_proj", "down_proj"]
RANK, ALPHA = 6, 9.0


def load(folder: Path, quantization: str | None = None) -> Any:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quantization) if quantization else None
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False).eval()


class Examples(list[Any]):
    lengths = np.array([len(IDS)])
    groups = np.array([0])


def put_on(model: Any, folder: Path, name: str, lora: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """Set up LoRA and an initialisation as a run does, on one example; returns LoRA's strategy and the run."""
    task, said = CausalLM(), []
    ids = IDS.numpy().astype(np.int32)
    example = Example(
        {"input_ids": ids}, np.arange(len(ids) - 1), ids[1:].astype(np.int64), np.ones(len(ids) - 1, np.float32), None,
        0, 0, {},
    )  # fmt: skip
    train = SimpleNamespace(gradient_checkpointing=True, micro_tokens=512)
    recipe = SimpleNamespace(base=SimpleNamespace(task="causal-lm", model=str(folder)), train=train)
    run = SimpleNamespace(
        task=task, recipe=recipe, seed=0, model=model, base=SimpleNamespace(added=range(0), new=(), path=folder),
        start_adapter=None, planning=False, world=Processes(), device=torch.device("cpu"), dtype=torch.float32,
        examples=Examples([example]), micro_tokens=512, packed=False, tokenizer=SimpleNamespace(pad_token_id=0),
        say=said.append, said=said, starts_as_base=True,
    )  # fmt: skip
    owner = build_strategy("lora", {"rank": RANK, "alpha": ALPHA, "targets": TARGETS, **(lora or {})}, "test")
    owner.prepare_model(run=run, model=model)
    build_strategy(name, options, "test").prepare_model(run=run, model=model)
    run.groups = owner.trainable_parameters(run=run, model=model)
    return owner, run


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS[None], use_cache=False).logits


def loss_of(model: Any) -> torch.Tensor:
    return model(IDS[None], labels=IDS[None], use_cache=False).loss


def curve(model: Any, parameters: list[Any]) -> list[float]:
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01), []
    for _ in range(5):
        loss = loss_of(model)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def stock(model: Any, init: Any, rslora: bool = False, gradients: dict[str, torch.Tensor] | None = None) -> Any:
    """Put LoRA with an initialisation on a model with stock PEFT, which changes the model's weights.

    Args:
        gradients: for LoRA-GA, those that PEFT then uses: the signs of singular vectors, on which the start depends,
            are determined by the last bits.
    """
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=init, task_type="CAUSAL_LM",
        use_rslora=rslora, corda_config=CordaConfig(corda_method="ipm") if init == "corda" else None,
        lora_ga_config=LoraGAConfig() if init == "lora_ga" else None,
    )  # fmt: skip
    if init == "corda":
        peft.tuners.lora.corda.preprocess_corda(model, config, lambda: logits(model))
    if init == "lora_ga":
        peft.tuners.lora.loraga.preprocess_loraga(model, config, lambda: loss_of(model).backward())
        for path, gradient in (gradients or {}).items():
            module = model.get_submodule(path)
            torch.testing.assert_close(module._peft_loraga_grad, gradient, atol=1e-7, rtol=1e-4)
            module._peft_loraga_grad = gradient
    torch.manual_seed(0)
    return peft.get_peft_model(model, config)


CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("pissa", {}, "pissa"),
    ("pissa", {"iterations": 16}, "pissa_niter_16"),
    ("olora", {}, "olora"),
    ("corda", {}, "corda"),
    ("lora-ga", {}, "lora_ga"),
]


@pytest.mark.parametrize(("name", "options", "init"), CASES, ids=[case[2] for case in CASES])
def test_it_trains_as_in_stock_peft_and_is_saved_as_plain_lora(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], init: str
) -> None:
    """PEFT takes the start out of the base's weights; here they stay as they are, and the start is subtracted."""
    rslora, gradients = init == "pissa", {}

    def recorded(*given: Any) -> dict[str, torch.Tensor]:
        found = statistics.weight_gradients(*given)
        gradients.update({path: value.clone() for path, value in found.items()})
        return found

    monkeypatch.setattr(compute, "weight_gradients", recorded)
    model = load(tiny_base)
    before, weights = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    owner, run = put_on(model, tiny_base, name, {"rslora": rslora}, **options)
    assert torch.equal(logits(model), before), "it starts as the base, bitwise"
    peer = stock(load(tiny_base), init, rslora, gradients)
    expected = curve(peer, [p for p in peer.parameters() if p.requires_grad])
    assert curve(model, [p for g in run.groups for p in g.parameters.values()]) == pytest.approx(expected, abs=1e-5)
    trained = logits(model)
    torch.testing.assert_close(trained, logits(peer), atol=1e-4, rtol=1e-4)
    use_adapters(owner, model, [])
    assert torch.equal(logits(model), before)
    for key, value in model.state_dict().items():
        if "lora_" not in key:
            assert torch.equal(value, weights[key.replace(".base_layer", "")]), key

    owner.export(run=run, model=model, directory=tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"], config["rank_pattern"]) == (2 * RANK, True, {})
    opened = PeftModel.from_pretrained(load(tiny_base), tmp_path).eval()
    torch.testing.assert_close(logits(opened), trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "lora-ga"])
def test_on_a_quantised_base_it_starts_from_the_dequantised_weights(tiny_base: Path, name: str) -> None:
    """The base's bytes stay, and the first gradient is that of the same start on the dequantised weights."""
    import bitsandbytes

    quantised, dense = load(tiny_base, "nf4"), load(tiny_base)
    for path, module in quantised.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense.get_submodule(path).weight.data.copy_(weight)
    packed = {key: value.clone() for key, value in quantised.state_dict().items()}
    before = logits(quantised)
    runs = [put_on(model, tiny_base, name)[1] for model in (quantised, dense)]
    assert torch.equal(logits(quantised), before)
    assert all(torch.equal(packed[key], v) for key, v in quantised.state_dict().items() if key in packed)
    for model in (quantised, dense):
        loss_of(model).backward()
    ours, theirs = ([p for g in run.groups for p in g.parameters.values()] for run in runs)
    assert any(parameter.grad.abs().max() > 1e-4 for parameter in ours)
    for parameter, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=2e-5, rtol=1e-3)


def test_eva_starts_from_the_principal_components_and_shares_out_the_ranks(tiny_base: Path, tmp_path: Path) -> None:
    model = load(tiny_base)
    inputs: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in TARGETS:
            module.register_forward_pre_hook(lambda _, x, path=path: inputs.__setitem__(path, x[0][0, :-1].double()))
    before = logits(model)
    ratios, directions = {}, {}
    for path, x in inputs.items():
        _, s, directions[path] = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        ratios[path] = (s.square() / s.square().sum())[: 2 * RANK]
    best = sorted(((float(r), path) for path, ratio in ratios.items() for r in ratio), key=lambda pair: -pair[0])[
        : RANK * len(inputs)
    ]
    wanted = {path: sum(owner == path for _, owner in best) for path in inputs}
    assert len(set(wanted.values())) > 1, "the ranks differ"

    owner, run = put_on(model, tiny_base, "eva")
    assert torch.equal(logits(model), before)
    tensors = run.groups[0].parameters | run.groups[1].parameters
    for path, rank in wanted.items():
        a = tensors[f"{path}.lora_A"].detach().double()
        assert len(a) == rank
        cosines = (a @ directions[path][:rank].t()).abs().diagonal()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-3, rtol=0)
        assert not tensors[f"{path}.lora_B"].any()
    losses = curve(model, list(tensors.values()))
    assert losses[-1] < losses[0]
    owner.export(run=run, model=model, directory=tmp_path)
    opened = PeftModel.from_pretrained(load(tiny_base), tmp_path).eval()
    torch.testing.assert_close(logits(opened), logits(model), atol=1e-5, rtol=1e-5)


def test_components_and_ranks_in_corner_cases() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 3
    components, ratio = principal(x.t() @ x, x.sum(0), 50, 3, whiten=True)
    _, s, v = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)
    torch.testing.assert_close(components.double().norm(dim=1), s[:3] ** -0.5, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ratio.double(), (s**2 / (s**2).sum())[:3], atol=1e-5, rtol=1e-4)
    ratios = {"a": torch.tensor([0.9, 0.8]), "b": torch.tensor([0.1, 0.05])}
    assert share_ranks(ratios, 2) == {"a": 2, "b": 0}


def test_a_linear_without_a_rank_is_left_out_of_model_and_file(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_base)
    gone = "model.layers.1.mlp.down_proj"
    monkeypatch.setattr(
        "budwood_initialisations.compute.share_ranks",
        lambda ratios, budget: {path: 0 if path == gone else 7 for path in ratios},
    )
    owner, run = put_on(model, tiny_base, "eva")
    assert type(model.get_submodule(gone)) is torch.nn.Linear
    assert not any(gone in name for group in run.groups for name in group.parameters)
    curve(model, [p for g in run.groups for p in g.parameters.values()])
    owner.export(run=run, model=model, directory=tmp_path)
    assert gone not in json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    opened = PeftModel.from_pretrained(load(tiny_base), tmp_path).eval()
    torch.testing.assert_close(logits(opened), logits(model), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"section {i} of", "completion": f" the library {i * i} and its files"} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make(tiny_base: Path, data: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def recipe(*strategies: Any, quantization: str = "nf4", output: str = "run", **top: Any) -> Recipe:
        train = {"steps": 4, "batch_examples": 4, "learning_rate": 1e-2, "precision": "fp32", "save_every": 2}
        values = {
            "base": {"model": str(tiny_base), "quantization": quantization, "task": "causal-lm", "device": "cpu"},
            "data": {"train": str(data), "max_length": 64}, "train": train, "strategies": list(strategies),
            "output": str(tmp_path / output),
        }  # fmt: skip
        return Recipe.from_dict(values | top)

    return recipe


def test_loftq_starts_at_the_nearest_update_to_the_quantisation_error(
    tiny_base: Path, make: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tune(make({"lora": {"rank": 4, "targets": TARGETS}}, {"loftq": {}}))
    said = capsys.readouterr()
    text = next(line for line in (said.out + said.err).splitlines() if line.startswith("loftq:"))
    shares = [float(part.rstrip("%")) for part in text.replace(",", "").split() if part.endswith("%")]
    assert len(shares) == 4 and shares[1] < shares[0] and shares[3] < shares[2]
    original, numbers = load(tiny_base), {id(p): i for i, p in enumerate(run.trainable)}
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer = run.model.get_submodule(path)
        weight = layer.get_base_layer().weight
        from bitsandbytes.functional import dequantize_4bit

        residual = original.get_submodule(path).weight - dequantize_4bit(weight.data, weight.quant_state)
        u, s, vh = torch.linalg.svd(residual.double(), full_matrices=False)
        a, b = (run.start[numbers[id(part["default"].weight)]].double() for part in (layer.lora_A, layer.lora_B))
        torch.testing.assert_close(layer.scaling["default"] * b @ a, (u[:, :4] * s[:4]) @ vh[:4], atol=1e-5, rtol=1e-3)
    assert not is_off(run, "start") and is_off(run, "base")
    assert json.loads((run.directory / "adapter" / "adapter_config.json").read_text())["r"] == 4
    adapter = run.directory / "adapter"
    assert verify(adapter).exact
    for quantization, refused in (("none", True), ("nf4", False)):
        pool = AdapterPool(str(tiny_base), quantization=quantization, precision="fp32", device="cpu")
        with pytest.raises(InputError, match="open the base with quantization nf4") if refused else nullcontext():
            pool.load("a", adapter)
    with pytest.raises(InputError, match="load the adapter on its quantised base instead"):
        merge(adapter, tmp_path / "merged")
    with pytest.raises(InputError, match=r"in nf4, which llama\.cpp cannot load: serve it with `budwood serve`"):
        export_for(adapter, tmp_path / "gguf", Wanted("gguf"))
    for target in ("peft", "vllm"):
        notes = export_for(adapter, tmp_path / target, Wanted(target)).notes
        assert any("makes up for the error of its base in nf4: have" in note for note in notes)
    continued = make({"lora": {}}, quantization="none", output="on", adapter=str(adapter))
    with pytest.raises(InputError, match="set base.quantization to nf4"):
        tune(continued)
    again = tune(make({"lora": {}}, output="on", adapter=str(adapter)), quiet=True)
    assert read_adapter(again.directory / "adapter").manifest.needs_quantization


def test_an_interrupted_run_resumes_to_the_same_bytes(
    make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed run takes its start from the checkpoint, even if it computes another."""
    strategies = {"lora": {"rank": 4, "targets": TARGETS}}, {"pissa": {}}
    whole = tune(make(*strategies, output="whole"), quiet=True)
    from budwood.training import loop

    taken, step = [], loop.train_step

    def fails(*given: Any) -> Any:
        taken.append(1)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(loop, "train_step", fails)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        tune(make(*strategies), quiet=True)
    monkeypatch.setattr(loop, "train_step", step)
    exact = compute.peft_start
    monkeypatch.setattr(compute, "peft_start", lambda *given, **named: tuple(1.5 * x for x in exact(*given, **named)))
    resumed = tune(make(*strategies), resume=True, quiet=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (whole.directory / "adapter" / name).read_bytes() == (resumed.directory / "adapter" / name).read_bytes()
    pool = AdapterPool(str(whole.recipe.base.model), quantization="nf4", precision="fp32", device="cpu")
    pool.load("a", whole.directory / "adapter")
    assert verify(whole.directory / "adapter").exact
    tensors = load_file(whole.directory / "adapter" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {8}


REFUSED: list[tuple[list[Any], dict[str, Any], str]] = [
    (["adalora", "pissa"], {}, "conflicts with 'adalora'"),
    ([{"loha": {}}, "pissa"], {}, "requires 'lora'"),
    (["lora", "pissa", "olora"], {}, "both own the slot 'start'"),
    ([{"lora": {"dora": True}}, "pissa"], {}, "leave dora out, or use eva"),
    ([{"lora": {"init": "gaussian"}}, "eva"], {}, "lora.init: gaussian has no effect, since eva replaces it"),
    ([{"lora": {"rank": 65}}, "pissa"], {}, "allows ranks up to 64, and lora.rank is 65"),
    ([{"lora": {"rank": 33}}, "lora-ga"], {}, "allows ranks up to 32, and lora.rank is 33"),
    (["lora", "loftq"], {"quantization": "none"}, "base.quantization is none, so there is no error to start from"),
    (["lora", "lora-ga", "orpo"], {}, "conflicts with 'objective'"),
    (["lora", {"corda": {"mode": "ipn"}}], {}, "mode"),
    (["lora", {"eva": {"roh": 2}}], {}, "Did you mean 'rho'"),
    ([{"lora": {"init": "pissa_niter_4"}}], {}, "'pissa_niter_4' is a strategy: leave init out, and add pissa"),
]


@pytest.mark.parametrize(("strategies", "changes", "message"), REFUSED, ids=lambda value: None)
def test_what_cannot_be_is_refused_in_the_plan(
    make: Callable[..., Recipe], strategies: list[Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        problems = plan(make(*strategies, **changes)).problems
        if problems:
            raise InputError("; ".join(problems))
    assert message in str(caught.value)

"""Adapters on GPT-2, whose linears are Conv1D modules of transformers with transposed weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from tests.conftest import make_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from budwood import AdapterPool, Run
from budwood.adapters.export import export
from budwood.model.originals import OriginalWeights
from budwood.model.text_tasks import CausalLM
from budwood.recipe.schema import Recipe
from budwood.serving.merge import merge
from budwood.training.loop import tune
from budwood_adalora.options import AdaLoRAOptions
from budwood_adalora.strategy import AdaLoRA
from budwood_lora.options import LoRAOptions
from budwood_lora.strategy import LoRA

IDS = list(range(5, 25))
TARGETS = ["c_attn", "c_proj", "c_fc"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "gpt2"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 300}
        model = GPT2LMHeadModel(
            GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.1)
        )
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.tensor([IDS]), use_cache=False).logits


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


def put_on(kind: str, model: Any) -> tuple[Any, Run]:
    """Set up the strategy on `model` as a run does, with random weights."""
    options: Any = {"rank": 4, "dora": kind == "dora"} if kind != "adalora" else {"initial_rank": 4, "target_rank": 4}
    strategy: Any = AdaLoRA(AdaLoRAOptions(**options), "adalora") if kind == "adalora" else None
    strategy = strategy or LoRA(LoRAOptions(**options), "lora")
    section = SimpleNamespace(task="causal-lm", model="base")
    run = Run(
        SimpleNamespace(base=section), Path(), torch.device("cpu"), torch.float32, steps=40, say=lambda text: None
    )
    run.task = CausalLM()
    run.model = strategy.prepare_model(run=run, model=model)
    run.groups = strategy.trainable_parameters(run=run, model=model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in run.trainable:
            parameter.requires_grad_(True).add_(torch.randn_like(parameter) * 0.1)
    return strategy, run


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora"])
def test_logits_and_gradients_match_stock_peft_which_opens_the_file(gpt2: Path, tmp_path: Path, kind: str) -> None:
    model = load(gpt2)
    strategy, run = put_on(kind, model)
    strategy.export(run=run, model=model, directory=tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    assert len(config["target_modules"]) == 8

    peer = PeftModel.from_pretrained(load(gpt2), tmp_path, is_trainable=True)
    ids = torch.tensor([IDS])
    for each in (model, peer):
        output = each(ids, use_cache=False).logits[0]  # PEFT's loss would include AdaLoRA's penalty
        torch.nn.functional.cross_entropy(output[:-1], ids[0, 1:]).backward()
    close(logits(model), logits(peer))
    assert (logits(model) - logits(load(gpt2))).abs().max() > 0.1
    theirs = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None and "ranknum" not in name}
    checked = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            close(parameter.grad, theirs[f"base_model.model.{name}"])
            checked += 1
    assert checked == len(theirs) == 8 * (2 if kind == "lora" else 3)


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora"])
@pytest.mark.parametrize("written", [True, False])
def test_stock_pefts_adapter_opens_here_mixes_and_merges(gpt2: Path, tmp_path: Path, kind: str, written: bool) -> None:
    common: Any = {"lora_alpha": 8, "target_modules": TARGETS, "fan_in_fan_out": True}
    config: Any = AdaLoraConfig(init_r=4, target_r=4, total_step=9, tinit=1, tfinal=1, **common)
    if kind != "adalora":
        config = LoraConfig(r=4, use_dora=kind == "dora", task_type="CAUSAL_LM", **common)
    peer = get_peft_model(load(gpt2), config).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "lora_" in name and "ranknum" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    peer.save_pretrained(tmp_path / "peer")
    values = json.loads((tmp_path / "peer/adapter_config.json").read_text())
    assert values["fan_in_fan_out"] is True
    (tmp_path / "peer/adapter_config.json").write_text(json.dumps({**values, "fan_in_fan_out": written}))

    pool = AdapterPool(gpt2, precision="fp32")
    before = pool.logits([IDS])
    pool.load("peer", tmp_path / "peer")
    pool.use("peer")
    close(pool.logits([IDS])[0], logits(peer)[0, -1])
    mixed = [answer.tokens for answer in pool.generate([IDS, IDS], ["peer", None], max_new_tokens=3)]
    pool.use(None)
    assert torch.equal(pool.logits([IDS]), before)
    assert mixed[1] == pool.generate([IDS], max_new_tokens=3)[0].tokens
    pool.merge("peer")
    close(pool.logits([IDS])[0], logits(peer)[0, -1])


def test_adalora_becomes_lora(gpt2: Path, tmp_path: Path) -> None:
    model = load(gpt2)
    strategy, run = put_on("adalora", model)
    strategy.export(run=run, model=model, directory=tmp_path / "adalora")
    export(tmp_path / "adalora", tmp_path / "lora", "lora")
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["fan_in_fan_out"] is True
    close(logits(PeftModel.from_pretrained(load(gpt2), tmp_path / "lora").eval()), logits(model))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_run_trains_is_verified_and_merges(gpt2: Path, tmp_path: Path, quantization: str) -> None:
    rows = [{"prompt": f"{word}:", "completion": f" {word}"} for word in ("games", "libs", "data", "tokens") * 4]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"steps": 8, "batch_examples": 8, "micro_tokens": 512, "learning_rate": 1e-2, "precision": "fp32"}
    recipe = {
        "base": {"model": str(gpt2), "quantization": quantization},
        "data": {"train": str(tmp_path / "train.jsonl"), "max_length": 64},
        "strategies": [{"lora": {"rank": 4}}],
        "train": train,
        "output": str(tmp_path / "run"),
    }
    tune(Recipe.from_dict(recipe))
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses[7] < losses[0]
    pool = AdapterPool(gpt2, quantization, precision="fp32")
    pool.load("mine", tmp_path / "run/adapter")
    pool.use("mine")
    adapted = pool.logits([IDS])
    assert not torch.equal(adapted, AdapterPool(gpt2, quantization, precision="fp32").logits([IDS]))
    merged = merge(tmp_path / "run/adapter", tmp_path / "merged", dtype="fp32")
    assert merged.unquantized.largest < 1e-4
    if quantization == "none":
        close(logits(load(tmp_path / "merged"))[0, -1], adapted[0])


def test_initialisations_read_transposed_weights_of_a_quantised_base(gpt2: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"games section {i} library"}) + "\n" for i in range(8)))
    recipe = Recipe.from_dict({
        "base": {"model": str(gpt2), "quantization": "nf4"}, "data": {"train": str(data), "eval": "none"},
        "strategies": [{"lora": {"rank": 4}}, "loftq"], "train": {"steps": 1}, "output": str(tmp_path / "run"),
    })  # fmt: skip
    run = tune(recipe)
    original = load(gpt2).get_submodule("transformer.h.0.attn.c_attn").weight.detach()
    weights = OriginalWeights(run.base.model, gpt2).read("transformer.h.0.attn.c_attn")
    assert weights.shape == (192, 64) and weights.equal(original.t())

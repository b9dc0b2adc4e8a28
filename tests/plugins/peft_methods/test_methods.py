"""PEFT's methods against stock PEFT: forward, gradients, file, quantised bases, mixed batches, continuation."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.conftest import make_tokenizer
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from budwood.adapters.use import use_adapters
from budwood.cli import app
from budwood.contract.loading import build_strategy, load_strategy
from budwood.errors import CorruptError, InputError
from budwood.model.text_tasks import CausalLM
from budwood.recipe.schema import Recipe
from budwood.serving.pool import AdapterPool
from budwood.serving.verify import verify
from budwood.training import setup
from budwood.training.loop import tune
from budwood_peft_methods import layers

from .methods import EVERYTHING, METHODS, PAGE, VARIANTS, cells, config_of, load, page, put_stock

IDS = torch.arange(5, 25)[None]
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
"""Both compute in fp32, with a few sums in another order; logits are of the order of 1."""

TRAINED = list(METHODS)
if not os.environ.get(EVERYTHING):  # one of each kind of layer, start and file; `make combinations` trains all
    TRAINED = ["ia3", "vera", "boft", "shira", "hira", "ln_tuning", "trainable_tokens", "vblora", "tinylora", "glora"]
IN_OUT = [
    *("ia3", "vera", "fourierft", "randlora", "gralora", "ln_tuning", "trainable_tokens"),
    *("vblora", "waveft", "tinylora"),
]
"""Methods that PEFT has for linears that store [in, out]."""

RUN = {
    "recipe": SimpleNamespace(base=SimpleNamespace(task="causal-lm", model="tiny")),
    "task": SimpleNamespace(peft_task_type="CAUSAL_LM"),
    "seed": 0,
    "planning": False,
}
"""What the strategies read of a run."""


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "gpt2"
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 300}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.1)
        GPT2LMHeadModel(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def placed_on(model: Any, folder: Path, method: str) -> Any:
    """Attach an adapter as a run that continues it does, and return its strategy."""
    strategy = build_strategy(method, {}, "test")
    config, tensors = read(folder)
    start = SimpleNamespace(config=config, load_tensors=lambda: tensors)
    strategy.prepare_model(run=SimpleNamespace(**RUN, start_adapter=start), model=model)
    return strategy


def plain(name: str) -> str:
    """Return the name of a parameter in stock PEFT's model as the strategies call it."""
    return (
        name.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace(".ln_tuning_layers", "")
        .replace(".token_adapter", "")
    )


def loss_of(model: Any) -> torch.Tensor:
    logits = model(IDS, use_cache=False).logits
    return (logits * torch.linspace(-1, 1, logits.shape[-1])).mean()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def differentiated(model: Any, named: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    loss_of(model).backward()
    return {name: parameter.grad for name, parameter in named.items()}


@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "")
def test_forward_gradients_and_file_are_those_of_stock_peft(
    tiny_base: Path, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    stock = put_stock(load(tiny_base), method, options)
    stock.save_pretrained(tmp_path / "stock")
    trained = {plain(name): p for name, p in stock.named_parameters() if p.requires_grad}
    theirs, expected = logits(stock), differentiated(stock, trained)

    model = load(tiny_base)
    base = logits(model)
    strategy = placed_on(model, tmp_path / "stock", method)
    torch.testing.assert_close(logits(model), theirs, **CLOSE)
    assert not torch.allclose(theirs, base, atol=1e-3), "the adapter changes nothing"
    groups = strategy.trainable_parameters(run=None, model=model)
    named = {plain(name): p for group in groups for name, p in group.parameters.items()}
    assert named.keys() == expected.keys()
    for name, gradient in differentiated(model, named).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3, msg=name)

    use_adapters(strategy, model, [])
    assert torch.equal(logits(model), base)
    use_adapters(strategy, model, ["default"])
    (tmp_path / "ours").mkdir()
    strategy.export(run=SimpleNamespace(**RUN), model=model, directory=tmp_path / "ours")
    config, tensors = read(tmp_path / "ours")
    stock_config, stock_tensors = read(tmp_path / "stock")
    assert config.keys() == stock_config.keys()
    assert tensors.keys() == stock_tensors.keys()
    assert all(tensors[key].equal(value) for key, value in stock_tensors.items())
    again = PeftModel.from_pretrained(load(tiny_base), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), theirs, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_on_a_quantised_base_it_computes_with_the_dequantised_weights(
    tiny_base: Path, tmp_path: Path, method: str
) -> None:
    import bitsandbytes

    quantised, dense = load(tiny_base, "nf4"), load(tiny_base)
    for path, module in quantised.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dense.get_submodule(path).weight.data.copy_(weight)
    stock = put_stock(dense, method, METHODS[method])
    stock.save_pretrained(tmp_path)
    placed_on(quantised, tmp_path, method)
    torch.testing.assert_close(logits(quantised), logits(stock), **CLOSE)


def test_parameters_are_drawn_in_the_order_of_the_model(tiny_base: Path) -> None:
    """PEFT's targets are a set, whose order differs between processes: each would start with other values."""
    model = load(tiny_base)
    paths = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    config = config_of("loha", METHODS["loha"], target_modules=paths, task_type=None)
    assert list(layers.build(model, config, paths, needs_weight=False).layers) == paths


@pytest.mark.parametrize("topk", [2, 8])
def test_vb_loras_start_is_the_base_exactly_and_trains_both_bank_and_logits(tiny_base: Path, topk: int) -> None:
    """Pairs of opposite vectors cancel; PEFT starts with a random update."""
    model = load(tiny_base)
    base = logits(model)
    options = {"targets": ["q_proj", "down_proj"], "vectors": 20, "vector_length": 8, "topk": topk}
    strategy = build_strategy("vblora", options, "test")
    run = SimpleNamespace(**RUN, start_adapter=None, base=None)
    run.task = CausalLM()
    strategy.prepare_model(run=run, model=model)
    assert logits(model).equal(base)
    groups = strategy.trainable_parameters(run=None, model=model)
    assert {group.learning_rate_ratio for group in groups} == {1.0, 0.1}
    named = {name: p for group in groups for name, p in group.parameters.items()}
    for name, gradient in differentiated(model, named).items():
        assert bool(gradient.any()) != ("logits_A" in name), name  # as LoRA's A, since B is zero


def test_glora_trains_and_merges_the_biases_of_a_base_that_has_them(
    tiny_bases: Callable[..., Path], tmp_path: Path
) -> None:
    def biased() -> Any:
        model = load(tiny_bases("biased", attention_bias=True))
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter))
        return model

    with torch.no_grad():
        stock, model = biased(), biased()
    stock = put_stock(stock, "glora", {"rank": 2, "bias": "vector"})
    stock.save_pretrained(tmp_path)
    strategy = build_strategy("glora", {}, "test")
    config, tensors = read(tmp_path)
    assert any("glora_C.Xd" in key for key in tensors) and any("glora_E.X" in key for key in tensors)
    strategy.attach_adapter(model=model, config=config, tensors=tensors, name="own")
    use_adapters(strategy, model, ["own"])
    torch.testing.assert_close(logits(model), logits(stock), **CLOSE)
    strategy.merge_adapter(model=model, name="own")
    torch.testing.assert_close(logits(model), logits(stock), atol=1e-4, rtol=1e-4)


def test_positions_outside_of_a_weight_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    for method in ("shira", "supertuning"):
        put_stock(load(tiny_base), method, METHODS[method]).save_pretrained(tmp_path / method)
        config, tensors = read(tmp_path / method)
        key = next(key for key in tensors if key.endswith("indices"))
        tensors[key].view(-1)[-1] = 1 << 20
        for hook in ("live_adapter", "attach_adapter"):
            given = {"model": load(tiny_base), "config": config, "tensors": tensors}
            given |= {"name": "a"} if hook == "attach_adapter" else {}
            with pytest.raises(CorruptError, match="lie outside of its weight"):
                getattr(build_strategy(method, {}, "test"), hook)(**given)


@pytest.fixture(scope="module")
def lora(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    peft.get_peft_model(load(tiny_base), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pool(tiny_base: Path, lora: Path) -> AdapterPool:
    """A pool with "lora", which a test leaves as it was."""
    made = AdapterPool(str(tiny_base), precision="fp32", device="cpu")
    made.load("lora", lora)
    return made


@pytest.mark.parametrize("method", METHODS)
def test_it_shares_a_batch_with_lora_and_the_base(
    tiny_base: Path, tmp_path: Path, pool: AdapterPool, method: str
) -> None:
    stock = put_stock(load(tiny_base), method, METHODS[method])
    stock.save_pretrained(tmp_path)
    pool.use(None)
    untouched = pool.logits(PROMPTS)
    pool.load("own", tmp_path)
    names = ["own", None, "lora", "own"]
    prompts = [*PROMPTS, PROMPTS[0][::-1]]
    alone = []
    for prompt, name in zip(prompts, names, strict=True):
        pool.use(name)
        alone.append(pool.generate([prompt], max_new_tokens=6)[0].tokens)
    pool.use(None)
    assert [answer.tokens for answer in pool.generate(prompts, names, max_new_tokens=6)] == alone
    pool.use("own")
    with torch.no_grad():
        expected = torch.stack([stock(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
    torch.testing.assert_close(pool.logits(PROMPTS), expected, **CLOSE)
    pool.use(None)
    pool.unload("own")
    assert pool.logits(PROMPTS).equal(untouched)


@pytest.mark.parametrize("method", ["vera", "loha", "shira", "c3a", "road"])
def test_methods_that_add_to_the_bases_product_do_not_compute_it_again_in_a_mixed_batch(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    put_stock(load(tiny_base), method, METHODS[method]).save_pretrained(tmp_path)
    pool = AdapterPool(str(tiny_base), precision="fp32", device="cpu")
    pool.load("own", tmp_path)
    pool.use("own")
    alone = pool.generate([PROMPTS[0]], max_new_tokens=6)[0].tokens
    monkeypatch.setattr(layers, "frozen_linear", lambda *given: pytest.fail("the base's product is computed again"))
    assert pool.generate(PROMPTS[:2], ["own", None], max_new_tokens=6)[0].tokens == alone
    with pytest.raises(InputError, match=f"'own' of type '{method}' replaces modules by its own, so it cannot be bl"):
        pool.generate(PROMPTS[:1], [{"own": 1.0}])


@pytest.mark.parametrize("method", METHODS)
def test_merging_gives_the_logits_of_the_adapter(tiny_base: Path, tmp_path: Path, method: str) -> None:
    put_stock(load(tiny_base), method, METHODS[method]).save_pretrained(tmp_path)
    pool = AdapterPool(str(tiny_base), precision="fp32", device="cpu")
    modules = [type(module) for module in pool.model.modules()]
    pool.load("own", tmp_path)
    pool.use("own")
    attached = pool.logits(PROMPTS)
    pool.merge("own")
    # A merged weight is rounded once to fp32, 2**-24, in sums of up to 128 terms, through two layers.
    torch.testing.assert_close(pool.logits(PROMPTS), attached, atol=1e-4, rtol=1e-4)
    assert [type(module) for module in pool.model.modules()] == modules


def recipe_of(base: Path, folder: Path, strategy: Any, **sections: Any) -> dict[str, Any]:
    rows = [{"prompt": f"{word} {word[::-1]}:", "completion": word} for word in ("one", "two", "three", "four")]
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"steps": 2, "batch_examples": 4, "micro_tokens": 256, "learning_rate": 1e-2, "precision": "fp32"}
    recipe = {
        "base": {"model": str(base), "quantization": "none", "device": "cpu"},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 64},
        "strategies": [strategy],
        "train": {**train, "warmup": 0, "schedule": "constant", "eval_generate": 0},
        "output": str(folder / "run"),
    }
    return {**recipe, **sections}


@pytest.mark.parametrize("method", TRAINED)
def test_a_run_continues_an_adapter_of_stock_peft_on_packed_rows(tiny_base: Path, tmp_path: Path, method: str) -> None:
    put_stock(load(tiny_base), method, METHODS[method]).save_pretrained(tmp_path / "stock")
    run = tune(Recipe.from_dict(recipe_of(tiny_base, tmp_path, method, adapter=str(tmp_path / "stock"))), quiet=True)
    assert run.packed
    before, after = read(tmp_path / "stock"), read(run.directory / "adapter")
    assert before[1].keys() == after[1].keys()
    frozen = {key for key, value in before[1].items() if value.equal(after[1][key])}
    fixed = ("vera_A", "vera_B", "randlora_", "indices", "w_norm", "tinylora_A", "tinylora_B", "tinylora_P", "zeros")
    assert all(any(name in key for name in fixed) for key in frozen)
    ends = tuple(before[0].pop("target_modules"))
    assert all(name.endswith(ends) for name in after[0].pop("target_modules"))
    differing = {key for key, value in before[0].items() if value != after[0][key]}
    assert differing <= {"base_model_name_or_path", "feedforward_modules"}
    on = torch.tensor([[5, 6, 7]])
    again = PeftModel.from_pretrained(load(tiny_base), run.directory / "adapter").eval()
    pool = AdapterPool(str(tiny_base), precision="fp32", device="cpu")
    pool.load("own", run.directory / "adapter")
    pool.use("own")
    with torch.no_grad():
        torch.testing.assert_close(pool.logits(on.tolist()), again(on).logits[:, -1], **CLOSE)


@pytest.mark.parametrize("method", IN_OUT)
def test_on_linears_that_store_in_out_it_is_that_of_stock_peft(gpt2: Path, tmp_path: Path, method: str) -> None:
    options = {"feedforward": ["mlp.c_proj"]} if method == "ia3" else METHODS[method]
    names = {"ln_tuning": ["ln_1", "ln_f"], "trainable_tokens": ["wte"]}
    targets = names.get(method, ["c_attn", "mlp.c_proj"])
    stock = put_stock(load(gpt2), method, options, target_modules=targets)
    stock.save_pretrained(tmp_path)
    model = load(gpt2)
    placed_on(model, tmp_path, method)
    torch.testing.assert_close(logits(model), logits(stock), **CLOSE)
    pool = AdapterPool(str(gpt2), precision="fp32", device="cpu")
    pool.load("own", tmp_path)
    pool.use("own")
    attached = pool.logits(PROMPTS)
    pool.merge("own")
    torch.testing.assert_close(pool.logits(PROMPTS), attached, atol=1e-4, rtol=1e-4)


def test_methods_without_a_layer_for_such_linears_are_refused(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(recipe_of(gpt2, tmp_path, "loha")))
    assert app.run(["tune", str(tmp_path / "recipe.json")]) == 2
    assert "loha is not supported on linears that store [in, out]" in capsys.readouterr().err


def test_lora_beside_a_method_changes_neither(tiny_base: Path, tmp_path: Path, lora: Path) -> None:
    """As with a reward or a teacher that is an adapter on the run's own model."""
    put_stock(load(tiny_base), "loha", METHODS["loha"], target_modules="all-linear").save_pretrained(tmp_path)
    model = load(tiny_base)
    base = logits(model)
    strategy = placed_on(model, tmp_path, "loha")
    (group,) = strategy.trainable_parameters(run=None, model=model)
    own, before = logits(model), differentiated(model, group.parameters)
    other = build_strategy("lora", {}, "test")
    config, tensors = read(lora)
    other.attach_adapter(model=model, config=config, tensors=tensors, name="other")
    for parameter in group.parameters.values():
        parameter.grad = None
    assert logits(model).equal(own)
    after = differentiated(model, group.parameters)
    assert all(after[name].equal(gradient) for name, gradient in before.items())
    use_adapters(strategy, model, [])
    assert logits(model).equal(base)
    use_adapters(other, model, ["other"])
    alone = AdapterPool(str(tiny_base), precision="fp32", device="cpu")
    alone.load("lora", lora)
    alone.use("lora")
    torch.testing.assert_close(logits(model)[:, -1], alone.logits([IDS[0].tolist()]), **CLOSE)
    other.detach_adapter(model=model, name="other")
    use_adapters(strategy, model, ["default"])
    assert logits(model).equal(own)


@pytest.mark.parametrize("strategy", [{"loha": {"rank": 2, "rank_dropout": 0.3}}, {"oft": {"block_size": 8}}, "hra"])
def test_recomputed_activations_give_the_same_adapter(tiny_base: Path, tmp_path: Path, strategy: Any) -> None:
    trained = []
    for again in (False, True):
        recipe = recipe_of(tiny_base, tmp_path / str(again), strategy)
        recipe["train"]["gradient_checkpointing"] = again
        trained.append(tune(Recipe.from_dict(recipe), quiet=True).trainable)
    for first, second in zip(*trained, strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", TRAINED)
def test_in_bf16_master_weights_are_fp32_and_the_adapter_is_served_as_it_was_trained(
    tiny_base: Path, tmp_path: Path, method: str
) -> None:
    recipe = recipe_of(tiny_base, tmp_path, {method: METHODS[method]})
    recipe["train"]["precision"] = "bf16"
    run = tune(Recipe.from_dict(recipe), quiet=True)
    assert {parameter.dtype for parameter in run.trainable} == {torch.float32}
    assert all(bool(parameter.isfinite().all()) for parameter in run.trainable)
    assert verify(run.directory / "adapter", device="cpu").exact


@pytest.mark.parametrize("method", ["oft", "ln_tuning"])
def test_a_classifiers_head_trains_and_is_saved_beside_it(tiny_base: Path, tmp_path: Path, method: str) -> None:
    recipe = recipe_of(tiny_base, tmp_path, {method: METHODS[method]})
    rows = [{"text": word, "label": label} for word, label in (("one", "a"), ("two", "b"), ("six", "a"), ("ten", "b"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["base"]["task"] = "sequence-classification"
    run = tune(Recipe.from_dict(recipe), quiet=True)
    saved = run.directory / "adapter"
    assert "base_model.model.score.weight" in read(saved)[1]
    assert verify(saved, device="cpu").exact
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2, dtype=torch.float32)
    again = PeftModel.from_pretrained(model, saved).eval()
    pool = AdapterPool(
        str(tiny_base), task="sequence-classification", labels=["a", "b"], precision="fp32", device="cpu"
    )
    pool.load("own", saved)
    pool.use("own")
    with torch.no_grad():
        expected = torch.cat([again(torch.tensor([prompt])).logits for prompt in PROMPTS])
    torch.testing.assert_close(pool.logits(PROMPTS), expected, **CLOSE)


def test_trainable_tokens_without_a_place_for_a_head_are_refused(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tiny_base, tmp_path, {"trainable_tokens": {"tokens": [5]}})
    (tmp_path / "rows.jsonl").write_text('{"text": "one", "label": "a"}\n{"text": "two", "label": "b"}\n' * 2)
    recipe["base"]["task"] = "sequence-classification"
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert app.run(["tune", str(tmp_path / "recipe.json")]) == 2
    assert "PEFT's trainable tokens cannot hold 'score', which must train too: use lora" in capsys.readouterr().err


def test_trainable_tokens_that_no_example_has_are_refused_before_training(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], forked: None
) -> None:
    recipe = recipe_of(tiny_base, tmp_path, {"trainable_tokens": {"tokens": [3, 4]}})
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert app.run(["tune", str(tmp_path / "recipe.json")]) == 2
    said = capsys.readouterr().err
    assert "tokens: no training example has 3, 4, so nothing would train: name tokens of the data." in said
    assert "step 1/" not in said
    assert app.run(["plan", str(tmp_path / "recipe.json"), "--tokens", "64"]) == 0


REFUSALS: list[tuple[Any, dict[str, Any], str]] = [
    ({"loha": {"rnk": 4}}, {}, "rank"),
    ({"oft": {"dora": True}}, {}, "dora"),
    ({"hra": {"rank": 3}}, {}, "rank 3 is odd"),
    ({"oft": {"block_size": 7}}, {}, "block_size 7 does not divide its input size 64; 4 does"),
    ({"oft": {"blocks": 4}}, {}, "give block_size or blocks"),
    ({"boft": {"block_size": 0}}, {}, "are both 0"),
    ({"c3a": {"block_size": 48}}, {}, "block_size 48 does not divide its input size 64; 32 does"),
    ({"lokr": {"rank": 64}}, {}, "rank 64 is above the size of its factors"),
    ({"miss": {"rank": 65}}, {}, "rank 65 is above its 64 inputs"),
    ({"miss": {"rank": 8, "variant": "mini", "mini_rank": 5}}, {}, "multiple of mini_rank 5"),
    ({"road": {"group_size": 48}}, {}, "group_size 48 does not divide its output size 64; 32 does"),
    ({"gralora": {"rank": 5}}, {}, "rank 5 is no multiple of blocks 2"),
    ({"shira": {"rank": 60}}, {}, "rank 60 trains"),
    ({"vblora": {"vector_length": 24}}, {}, "vector_length 24 does not divide its input size 64; 16 does"),
    ({"vblora": {"vector_length": 8, "topk": 3}}, {}, "topk 3 is none of 2, 4, 8"),
    ({"waveft": {"wavelet": "db39"}}, {}, "wavelet 'db39': must be db1"),
    ({"waveft": {"frequencies": 6000, "proportional": True}}, {}, "frequencies 6000 is above the 5266 elements"),
    ({"supertuning": {"alpha": 4}}, {}, "alpha is that of a LoRA update: give rank too"),
    ({"supertuning": {"sparsity": 0.9999}}, {}, "sparsity 0.9999 leaves none of its 4096 weights to train"),
    ({"tinylora": {"rank": 65}}, {}, "rank 65 is above its 64 singular directions"),
    ({"peanut": {"activation": "prelu"}}, {}, "activation"),
    ({"fourierft": {"frequencies": 5000}}, {}, "frequencies 5000 is above its 4096 elements"),
    ({"ia3": {"feedforward": ["down_prj"]}}, {}, "feedforward: 'down_prj' is none of the targets. Did you mean"),
    ({"vera": {"targets": ["q_prj"]}}, {}, "no linear module is called 'q_prj'. Did you mean 'q_proj'?"),
    ({"miss": {"rank": 8, "variant": "bat"}}, {"quantization": "nf4"}, "computes with the base's weight"),
    ("trainable_tokens", {}, "tokens: name at least one token id"),
    ({"trainable_tokens": {"tokens": [300]}}, {}, "tokens: 300 is beyond the embeddings, which have 300 rows"),
    ({"ln_tuning": {"targets": ["q_proj"]}}, {}, "'model.layers.0.self_attn.q_proj' is no norm"),
    ("delora", {"precision": "fp16"}, "the quotient exceeds the largest number of fp16: use train.precision: bf16"),
]


@pytest.mark.parametrize(
    ("strategy", "base", "message"), REFUSALS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_options_are_refused_before_the_base_loads(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    strategy: Any,
    base: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(setup, "load_base", lambda *_: pytest.fail("the base loads"))
    recipe = recipe_of(tiny_base, tmp_path, strategy)
    for name, value in base.items():
        recipe["train" if name == "precision" else "base"][name] = value
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert app.run(["tune", str(tmp_path / "recipe.json")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "changes", "error", "message"),
    [
        ("oft", {"coft": True}, InputError, "'coft: true' is not supported"),
        ("boft", {"boft_n_butterfly_factor": 2}, InputError, "'boft_n_butterfly_factor: 2' is not supported"),
        ("vera", {"bias": "vera_only"}, InputError, "'bias: \"vera_only\"' is not supported by vera"),
        ("loha", {"r": 4}, CorruptError, "config and base require"),
        ("loha", {"r": "4"}, CorruptError, "adapter_config.json: r: "),
        ("lokr", {"new_field": 1}, InputError, "'new_field: 1' is not a field of PEFT"),
        ("ia3", {"target_modules": ["nowhere"]}, CorruptError, "the model has none of"),
        ("trainable_tokens", {"token_indices": [-1]}, CorruptError, "token_indices: must be a list of token ids"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_leave_the_model_unchanged(
    tiny_base: Path, tmp_path: Path, method: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    put_stock(load(tiny_base), method, METHODS[method]).save_pretrained(tmp_path)
    config, tensors = read(tmp_path)
    model = load(tiny_base)
    modules = [(path, id(module)) for path, module in model.named_modules()]
    strategy = build_strategy(method, {}, "test")
    for hook in (strategy.live_adapter, lambda **given: strategy.attach_adapter(**given, name="a")):
        with pytest.raises(error, match=re.escape(message)):
            hook(model=model, config={**config, **changes}, tensors=dict(tensors))
        assert [(path, id(module)) for path, module in model.named_modules()] == modules


def test_options_are_those_of_pefts_config_classes() -> None:
    """A field that a new PEFT adds, and a default that it changes, must be looked at here."""
    selection = {
        "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias",
        "fan_in_fan_out", *(field.name for field in dataclasses.fields(peft.PeftConfig)),
    }  # fmt: skip
    for method in METHODS:
        cls = load_strategy(method)[0]
        fields = {field.name: field for field in dataclasses.fields(getattr(peft, cls.peft_config))}
        if not hasattr(cls.Options, "FIELDS"):
            assert fields.keys() - selection <= {*cls.FIELDS, "modules_to_save"}, method
            continue
        known = {*cls.Options.FIELDS.values(), *cls.Options.INIT, *cls.Options.ONLY, *cls.Options.PATTERNS}
        assert fields.keys() - selection == known | {*cls.OTHER_FIELDS}, method
        for option, field in cls.Options.FIELDS.items():
            ours = cls.Options().fields()[field]
            assert ours == fields[field].default, f"{method}: {option}"


@pytest.mark.parametrize("method", METHODS)
def test_it_has_no_budget_of_ranks_that_training_divides(method: str) -> None:
    """PEFT's tuners with a budget have a method that divides it, which would have to be called here too."""
    tuners = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
    assert hasattr(tuners["ADALORA"], "update_and_allocate")
    assert not hasattr(tuners[load_strategy(method)[0].adapter_types[0]], "update_and_allocate")


def test_the_page_of_methods_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(dict.fromkeys(cells(), True)), "run `make combinations`"

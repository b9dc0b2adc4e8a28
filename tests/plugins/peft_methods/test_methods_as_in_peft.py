"""PEFT's methods against stock PEFT: forward, gradients, file, quantised bases, mixed batches, merges."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from tests.conftest import make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from budwood.adapters.use import use_adapters
from budwood.cli import app
from budwood.contract.loading import build_strategy
from budwood.errors import CorruptError, InputError
from budwood.model.text_tasks import CausalLM
from budwood.serving.pool import AdapterPool
from budwood_peft_methods import layers

from .methods import CLOSE, METHODS, PROMPTS, VARIANTS, config_of, load, put_stock, read, recipe_of

IDS = torch.arange(5, 25)[None]
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


@pytest.mark.parametrize(
    ("method", "changes", "error", "message"),
    [
        ("oft", {"coft": True}, InputError, "'coft: true' is not supported"),
        ("boft", {"boft_n_butterfly_factor": 2}, InputError, "'boft_n_butterfly_factor: 2' is not supported"),
        ("vera", {"bias": "vera_only"}, InputError, "'bias: \"vera_only\"' is not supported by vera"),
        ("loha", {"r": 4}, CorruptError, "config and base require"),
        ("loha", {"r": "4"}, CorruptError, "adapter_config.json: r: "),
        (
            "loha",
            {"target_modules": None},
            CorruptError,
            "adapter_config.json: target_modules: should be a valid string or a valid list, not null.",
        ),
        ("loha", {"target_modules": ["q_proj", 3]}, CorruptError, "target_modules: should be a valid string, not 3."),
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

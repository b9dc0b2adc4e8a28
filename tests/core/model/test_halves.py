"""Layers in halves: the numbers of the model's own forward, what is kept, and what takes the model's own forward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)  # fmt: skip
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from budwood.adapters.peft_layers import select_adapters
from budwood.model.halves import take_over
from budwood.model.halves.kept import Kept
from budwood.model.halves.layer import Halves
from budwood.model.halves.take_over import compute_in_halves, describe_others
from budwood.model.ops import tiles
from budwood.model.ops.attention import packed_mask, register
from budwood.model.ops.gated import fuse_mlps
from budwood.model.ops.group import Group, Part, pack
from budwood.model.ops.rms_norm import save_memory_in_norms
from budwood.model.recompute import recompute_layers

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
HEADS = (Gemma2Config, Gemma3TextConfig, Qwen3Config, Qwen3MoeConfig)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


register()


def build(cls: Any, dropout: float = 0.0, skip: tuple[str, ...] = (), **options: Any) -> Any:
    """Return a tiny model with adapters on its linears, in training, its layers in halves."""
    torch.manual_seed(0)
    config = cls(**SIZES, **({"head_dim": 8} if cls in HEADS else {}), **options)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="budwood").requires_grad_(False)
    save_memory_in_norms(model)
    fuse_mlps(model)
    assert compute_in_halves(model) == 2
    return adapt(model, dropout, skip)


def adapt(model: Any, dropout: float = 0.0, skip: tuple[str, ...] = ()) -> Any:
    from budwood_lora.layers import add_adapter

    names = [name for name, module in model.named_modules() if name.split(".")[-1] in LINEARS and module is not None]
    names = [name for name in names if "experts" not in name and not name.endswith(skip or "-")]
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=names, init_lora_weights=False)
    add_adapter(model, lora, "a")
    select_adapters(model, "lora", ["a"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    return model.train()


def step(model: Any, passes: int = 2) -> dict[str, Tensor]:
    """Return losses and gradients of a step of passes over packed rows, each with a graph of its own."""
    torch.manual_seed(1)
    tokens = torch.randint(3, 64, (1, 40))
    positions = torch.cat((torch.arange(15), torch.arange(25)))[None]
    rest = {"segments": (0, 15, 40), "attention_mask": packed_mask(), "use_cache": False}
    model.zero_grad()
    logits = [model(input_ids=tokens.roll(n), position_ids=positions, **rest).logits[0] for n in range(passes)]
    losses = [nn.functional.cross_entropy(each.float(), tokens[0], reduction="sum") for each in logits]
    for loss in losses:
        loss.backward()
    found = {f"loss {n}": loss.detach() for n, loss in enumerate(losses)}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def own_forward(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(Halves, "chain", lambda *_: None)
        yield


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 2e-5) -> None:
    assert set(found) == set(expected)
    for name, tensor in found.items():
        scale = max(expected[name].abs().max().item(), 1e-3)
        assert (tensor - expected[name]).abs().max().item() <= bound * scale, name


def test_small_updates_are_not_lost_beside_large_inputs_in_16_bit(taken: list[int]) -> None:
    """An update below half a unit in the last place of the layer's input must count on average, as it is in the sum."""
    model = build(LlamaConfig)
    model.config._attn_implementation = "eager"
    layer, draw = model.model.layers[0], torch.Generator().manual_seed(0)
    x = 8 * torch.randn(8, 128, 32, generator=draw)
    angles = torch.rand(1, 128, 4, generator=draw).repeat(1, 1, 2)
    matrices = [p for name, p in layer.named_parameters() if "lora_B" in name and ("o_proj" in name or "down" in name)]

    def output(dtype: torch.dtype, factor: float) -> Tensor:
        with torch.no_grad():
            for old, p in zip(starts, matrices, strict=True):
                p.copy_(factor * old)
        options = {"attention_mask": None, "position_embeddings": (angles.cos().to(dtype), angles.sin().to(dtype))}
        found: Tensor = layer.to(dtype)(x.to(torch.bfloat16).to(dtype).requires_grad_(), **options)
        return found.detach().double()

    starts = [0.02 * p.detach().clone() for p in matrices]
    exact = output(torch.float64, 1) - output(torch.float64, 0)
    halves = output(torch.bfloat16, 1) - output(torch.bfloat16, 0)
    assert taken and all(taken[-2:])
    assert exact.abs().mean() < 0.5 * 8 * 2**-9, "smaller than half a unit of most inputs"
    assert 0.8 < (halves * exact).sum() / exact.square().sum() < 1.2


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of halves of each pass through a layer; 0: its own forward."""
    counts: list[int] = []
    chain = Halves.chain

    def counted(self: Halves, *args: Any) -> Any:
        found = chain(self, *args)
        if any(
            "lora" in name for name, _ in self.layer.named_parameters()
        ):  # not the layer with which a class is tried
            counts.append(0 if found is None else len(found[0].halves))
        return found

    monkeypatch.setattr(Halves, "chain", counted)
    return counts


@pytest.mark.parametrize(
    ("cls", "halves", "dropout"),
    [
        (LlamaConfig, 2, 0.0), (LlamaConfig, 2, 0.3), (Qwen2Config, 2, 0.0), (Qwen3Config, 2, 0.0),
        (MistralConfig, 2, 0.3), (Gemma2Config, 2, 0.3), (Gemma3TextConfig, 2, 0.0), (Phi3Config, 2, 0.0),
        (MixtralConfig, 1, 0.3), (Qwen3MoeConfig, 1, 0.0),
    ],
)  # fmt: skip
def test_halves_give_the_numbers_of_the_models_own_forward(taken, monkeypatch, cls, halves, dropout):
    model = build(cls, dropout)
    with own_forward(monkeypatch):
        expected = step(model)
    results = []
    for setting, offloads in ((False, False), (True, False), (1, True)):
        recompute_layers(model, setting, offloads)
        results.append(step(model))
        agree(results[-1], expected)
    assert taken == [halves] * 12
    for other in results[1:]:  # a layer that recomputes has the same bits
        assert all(torch.equal(other[name], tensor) for name, tensor in results[0].items())


def test_long_rows_pass_the_mlp_in_tiles(taken, monkeypatch):
    model = build(LlamaConfig)
    recompute_layers(model, True)
    expected = step(model)
    monkeypatch.setattr(tiles, "FROM", 16)
    monkeypatch.setattr(tiles, "ROWS", 24)
    agree(step(model), expected)
    model = build(LlamaConfig, 0.3)  # the masks of each tile come back
    recompute_layers(model, True)
    one, other = step(model), step(model)
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


@pytest.mark.parametrize("skip", [("k_proj", "o_proj", "gate_proj"), ("q_proj", "k_proj", "v_proj"), ("down_proj",)])
def test_linears_without_adapters(taken, monkeypatch, skip):
    model = build(LlamaConfig, 0.1, skip)
    with own_forward(monkeypatch):
        expected = step(model)
    agree(step(model), expected)
    recompute_layers(model, True)
    agree(step(model), expected)
    assert taken == [2] * 8


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_quantised_bases(tiny_bases, taken, monkeypatch, quantization):
    from budwood.model.base import load_base

    base = load_base(tiny_bases("llama"), quantization, "AutoModelForCausalLM", torch.float32, needs_tokenizer=False)
    base.model.set_attn_implementation("budwood")
    model = adapt(base.model)
    with own_forward(monkeypatch):
        expected = step(model, 1)
    for setting in (False, True):
        recompute_layers(model, setting)
        agree(step(model, 1), expected)
    assert taken == [2] * 4


def test_a_group_computes_its_formula_in_float64():
    draw = torch.Generator().manual_seed(0)
    bases = [
        nn.Linear(6, outputs, bias=outputs > 4, dtype=torch.float64).requires_grad_(False) for outputs in (5, 4, 7)
    ]

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    parts = [Part(bases[0], leaf(2, 6), leaf(5, 2), 0.5), Part(bases[1]), Part(bases[2], leaf(3, 6), leaf(7, 3), 2.0)]
    x, above = leaf(9, 6), [torch.randn(9, n, generator=draw, dtype=torch.float64) for n in (5, 4, 7)]
    expected = [
        base(x) + (part.scaling * x @ part.a.t() @ part.b.t() if part.a is not None else 0)
        for base, part in zip(bases, parts, strict=True)
    ]
    leaves = [x, parts[0].a, parts[0].b, parts[2].a, parts[2].b]
    gradients = torch.autograd.grad(expected, leaves, above)
    with torch.no_grad():
        group, tensors = Group(parts, x, torch.float64), [t for part in parts for t in part.tensors]
        (factors,) = pack([(group.layout, tensors)])
        found, made = group.forward(x, tensors, factors)
        thin = group.thin_gradient(above, factors)
        grad_x = group.input_gradient(above, thin, factors, made.masks)
        wants = [t is not None and t.requires_grad for t in tensors]
        others = group.factor_gradients(above, thin, x, made, tensors, wants)
    torch.testing.assert_close(found, [each.detach() for each in expected], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_x, gradients[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        [each for each in others if each is not None], list(gradients[1:]), rtol=1e-12, atol=1e-12
    )


def test_a_second_backward_pass_and_one_of_gradients():
    model = build(LlamaConfig)
    tokens = torch.arange(3, 23)[None]
    parameters = [p for p in model.parameters() if p.requires_grad]
    for setting in (False, True):
        recompute_layers(model, setting)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        again = torch.autograd.grad(loss, parameters, create_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        with pytest.raises(RuntimeError, match="once_differentiable"):
            sum(each.sum() for each in again).backward()


def test_what_is_kept_is_freed_in_the_backward_pass(monkeypatch):
    kept: list[Any] = []
    put = Kept.put

    def recorded(self: Kept, name: str, tensor: Tensor | None) -> None:
        put(self, name, tensor)
        if tensor is not None and not isinstance(tensor, nn.Parameter):
            kept.append((name, weakref.ref(tensor)))

    monkeypatch.setattr(Kept, "put", recorded)
    model = build(LlamaConfig)
    tokens = torch.arange(3, 23)[None]
    for setting in (False, True):
        recompute_layers(model, setting)
        kept.clear()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        alive = {name for name, tensor in kept if tensor() is not None}
        assert ("between" in alive) == (not setting)
        loss.backward()
        assert len(kept) > 20 and {name for name, tensor in kept if tensor() is not None} == set()


def test_a_changed_weight_is_noticed():
    model = build(LlamaConfig)
    tokens = torch.arange(3, 23)[None]
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    model.model.layers[1].mlp.up_proj.get_base_layer().weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_saved_tensors_that_someone_else_keeps(taken, monkeypatch):
    """A pass inside of another recomputation, or with saved tensors moved, has the same gradients."""
    model = build(LlamaConfig)
    expected = step(model, 1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        agree(step(model, 1), expected)
    assert taken == [2] * 4


def hook(layer: Any) -> Callable[[], None]:
    handle = layer.mlp.act_fn.register_forward_hook(lambda module, args, output: output * 2)
    return handle.remove  # type: ignore[no-any-return]


def replaced(layer: Any) -> Callable[[], None]:
    layer.self_attn.forward = layer.self_attn.forward
    return lambda: layer.self_attn.__dict__.pop("forward")


def trained(layer: Any) -> Callable[[], None]:
    layer.input_layernorm.requires_grad_(True)
    return lambda: layer.input_layernorm.requires_grad_(False)


@pytest.mark.parametrize("change", [hook, replaced, trained])
def test_what_reaches_into_a_layer_gets_its_own_forward(taken, monkeypatch, change):
    model = build(LlamaConfig)
    plain = step(model, 1)
    undo = change(model.model.layers[1])
    taken.clear()
    with own_forward(monkeypatch):
        expected = step(model, 1)
    found = step(model, 1)
    agree(found, expected)
    assert taken == [2, 0]
    assert describe_others(model).startswith("1 of 2 layers take the model's own forward, which is slower: ")
    undo()
    assert describe_others(model) == ""
    agree(step(model, 1), plain)
    assert taken == [2, 0, 2, 2]


def test_reasons_are_counted_and_those_that_are_gone_after_a_pass_are_told_once() -> None:
    model = build(LlamaConfig)
    undo = hook(model.model.layers[0])
    trained(model.model.layers[1])
    step(model, 1)
    undo()
    line = "2 of 2 layers take the model's own forward, which is slower: "
    assert describe_others(model) == f"{line}a hook is on its SiLUActivation (1), a norm is trained (1)"
    assert describe_others(model) == line.replace("2 of 2", "1 of 2") + "a norm is trained"


def test_a_class_that_recomputes_around_its_forward_keeps_it(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As older versions of transformers do: halves inside would compute such a layer three times."""

    def around(self: Any, *args: Any, **options: Any) -> Any:
        own = partial(nn.Module.__call__, self, **options)
        recomputes = self.gradient_checkpointing and self.training
        return self._gradient_checkpointing_func(own, *args) if recomputes else own(*args)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", LlamaDecoderLayer.forward.__wrapped__)
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", around)
    model = build(LlamaConfig)
    expected = step(model, 1)
    assert taken == [2, 2] and describe_others(model) == ""
    recompute_layers(model, 1)
    agree(step(model, 1), expected)
    assert taken[2:] == [0, 2, 0]
    assert "1 of 2 layers take the model's own forward" in describe_others(model)


def test_passes_without_gradients_and_with_caches_take_the_own_forward(taken):
    model = build(LlamaConfig)
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        model(input_ids=tokens)
    model(input_ids=tokens, use_cache=True)
    select_adapters(model, "lora", ["a"], [0])
    model(input_ids=tokens, use_cache=False)
    assert taken == [0] * 6


def test_layers_with_another_formula_are_left_alone():
    model = AutoModelForCausalLM.from_config(GraniteConfig(**SIZES, residual_multiplier=0.5))
    save_memory_in_norms(model)
    fuse_mlps(model)
    assert compute_in_halves(model) == 0


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another device": lambda: torch.device("meta"),
    "another dtype": lambda: default_dtype(torch.bfloat16),
    "fake tensors": FakeTensorMode,
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", CONTEXTS)
def test_which_layers_compute_in_halves_does_not_depend_on_who_asks_first(name: str):
    """What is found is remembered, so one model opened for answers alone would slow the training of all later ones."""
    take_over._tried.cache_clear()
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    with CONTEXTS[name]():
        assert save_memory_in_norms(model) == 5
        assert fuse_mlps(model) == 2
        assert compute_in_halves(model) == 2


def test_layers_of_another_formula_are_named_where_that_is_slower(monkeypatch):
    model = AutoModelForCausalLM.from_config(GraniteConfig(**SIZES, residual_multiplier=0.5))
    assert describe_others(model) == ""
    monkeypatch.setattr(take_over, "device_type", lambda tensor: "cuda")
    line = "2 of 2 layers take the model's own forward, which is slower: GraniteDecoderLayer is not known to compute"
    assert describe_others(model) == f"{line} in halves"
    assert describe_others(build(LlamaConfig)) == ""

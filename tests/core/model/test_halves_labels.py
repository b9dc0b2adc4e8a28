"""The last layer at label positions alone: the numbers of the whole layer, and who gets the whole layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.model.test_halves import adapt, agree, build
from tests.core.training.test_step import ready
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig, MixtralConfig, Phi3Config, Qwen3Config

from budwood import LossTerm, Outputs, Step, Strategy, hookimpl
from budwood.model.halves.labels import hidden_states, labels_alone
from budwood.model.ops import tiles
from budwood.model.ops.attention import packed_mask
from budwood.model.recompute import recompute_layers

TOKENS = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(2))
PACKED = {
    "input_ids": TOKENS, "position_ids": torch.cat((torch.arange(15), torch.arange(25)))[None],
    "segments": (0, 15, 40), "attention_mask": packed_mask(), "use_cache": False,
}  # fmt: skip
PADDED = {
    "input_ids": TOKENS.view(2, 20),
    "attention_mask": torch.arange(20) < torch.tensor([[20], [13]]),
    "use_cache": False,
}
AT = torch.tensor([3, 4, 9, 10, 20, 21, 22, 38])


def read(model: Any, alone: bool, inputs: dict[str, Any] = PACKED, at: Tensor = AT) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output of the body, and what the head reads with the gradients of a loss on it."""
    model.zero_grad()
    torch.manual_seed(0)
    with labels_alone(alone):
        hidden = hidden_states(model.model, inputs, at, tuple(inputs["input_ids"].shape))
    logits = model.lm_head(hidden.flatten(0, 1)[at])
    loss = torch.nn.functional.cross_entropy(logits.float(), torch.arange(len(at)) % 64, reduction="sum")
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), {"logits": logits.detach(), "loss": loss.detach(), **found}


def unread(hidden: Tensor, at: Tensor = AT) -> Tensor:
    """Return the rows that the head does not read."""
    others = torch.ones(hidden[..., 0].numel(), dtype=torch.bool)
    others[at] = False
    return hidden.flatten(0, 1)[others]


@pytest.mark.parametrize("cls", [LlamaConfig, Qwen3Config, Gemma2Config, Phi3Config])
@pytest.mark.parametrize("inputs", [PACKED, PADDED], ids=["packed", "padded"])
def test_the_head_reads_the_same_numbers(cls: Any, inputs: dict[str, Any]) -> None:
    model = build(cls)
    expected = read(model, False, inputs)[1]
    results = []
    for setting, offloads in ((False, False), (True, False), (1, True)):
        recompute_layers(model, setting, offloads)
        hidden, found = read(model, True, inputs)
        assert hidden.shape == (*inputs["input_ids"].shape, 32) and unread(hidden).isnan().all()
        agree(found, expected)
        results.append(found)
    for other in results[1:]:  # a layer that recomputes has the same bits
        assert all(torch.equal(other[name], tensor) for name, tensor in results[0].items())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_bases(tiny_bases: Any, quantization: str) -> None:
    from budwood.model.base import load_base

    base = load_base(tiny_bases("llama"), quantization, "AutoModelForCausalLM", torch.float32, needs_tokenizer=False)
    base.model.set_attn_implementation("budwood")
    model = adapt(base.model)
    expected = read(model, False)[1]
    for setting in (False, True):
        recompute_layers(model, setting)
        hidden, found = read(model, True)
        assert unread(hidden).isnan().all()
        agree(found, expected)


def test_tiles_of_long_rows_and_positions_that_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    model, at = build(LlamaConfig), torch.cat((AT, AT[2:5], AT[4:5]))
    expected = read(model, False, at=at)[1]
    agree(read(model, True, at=at)[1], expected)
    monkeypatch.setattr(tiles, "FROM", 4)
    monkeypatch.setattr(tiles, "ROWS", 5)
    recompute_layers(model, True)
    agree(read(model, True, at=at)[1], expected)


def test_adapters_of_the_last_layer_alone() -> None:
    """Without a gradient below."""
    model = build(LlamaConfig)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name and "layers.1" in name)
    for setting in (False, True):
        recompute_layers(model, setting)
        hidden, found = read(model, True)
        assert unread(hidden).isnan().all()
        agree(found, read(model, False)[1])


def test_dropout_takes_the_whole_layer_whose_masks_would_be_others() -> None:
    model = build(LlamaConfig, 0.3)
    hidden, found = read(model, True)
    assert not hidden.isnan().any()
    expected = read(model, False)[1]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert unread(read(model.eval(), True)[0]).isnan().all()  # nothing is dropped


def hooked(module: Any) -> Callable[[Any], None]:
    return lambda model: module(model).register_forward_hook(lambda *_: None)


def replaced(model: Any) -> None:
    layer = model.model.layers[-1]
    layer.self_attn.forward = layer.self_attn.forward


@pytest.mark.parametrize(
    "change",
    [
        hooked(lambda model: model.model.norm), hooked(lambda model: model.model.layers[-1]), hooked(lambda m: m.model),
        hooked(lambda model: model.model.layers[-1].mlp), replaced,
        lambda model: model.model.add_module("more", torch.nn.Identity()),
    ],
    ids=["norm", "layer", "body", "mlp", "attention", "more"],
)  # fmt: skip
def test_other_readers_of_the_last_layer_get_every_row(change: Callable[[Any], Any]) -> None:
    model = build(LlamaConfig)
    expected = read(model, False)[1]
    change(model)
    hidden, found = read(model, True)
    assert not hidden.isnan().any()
    agree(found, expected)
    assert model.model.layers[-1].forward.rows is None


def test_mixtures_and_rows_full_of_labels_take_the_whole_layer() -> None:
    assert not read(build(MixtralConfig), True)[0].isnan().any()
    model = build(LlamaConfig)
    assert not read(model, True, at=torch.arange(36))[0].isnan().any()
    with torch.no_grad(), labels_alone():
        assert not hidden_states(model.model, PACKED, AT, (1, 40)).isnan().any()
        assert not hidden_states(model.model, PACKED, AT[:0], (1, 40)).isnan().any()


class Reader(Strategy):
    """Reads the complete hidden states."""

    finite = False

    @hookimpl
    def loss_terms(self, step: Step, outputs: Outputs) -> LossTerm:
        type(self).finite = bool(outputs.hidden.isfinite().all())
        return LossTerm("size", outputs.hidden.square().mean(), "step", 0.0)


class Wrapper(Strategy):
    """Sees the outputs on their way."""

    finite = False

    @hookimpl(wrapper=True)
    def forward(self, step: Step) -> Any:
        outputs = yield
        type(self).finite = bool(outputs.hidden.isfinite().all())
        return outputs


class Beside(Strategy):
    """Takes nothing of the outputs."""

    @hookimpl
    def loss_terms(self, step: Step) -> None:
        return None


def test_a_step_computes_the_last_layer_where_it_reads_it(make_recipe: Callable, monkeypatch: Any) -> None:
    from budwood.model.halves import layer

    def call(*args: Any) -> Any:
        seen.append(args[3])
        return own(*args)

    seen: list[Any] = []
    own = layer.Call
    monkeypatch.setattr(layer, "Call", call)
    results = []
    for others in ((), (Beside(name="beside"),), (Reader(name="reader"),), (Wrapper(name="wrapper"),)):
        run, _, step = ready(make_recipe("-".join(["a", *(o.name for o in others)])), *others)
        seen.clear()
        run.hooks.call("backward", step=step)
        results.append({str(i): p.grad.clone() for i, p in enumerate(run.trainable)})
        alone = others == () or isinstance(others[0], Beside)
        assert [rows is not None for rows in seen] == [False] * (len(seen) - 1) + [alone] and len(seen) > 1
    assert Reader.finite and Wrapper.finite
    for other in results[1:]:
        agree(other, results[0])

"""Layers that recompute their activations, inputs of layers in the host's memory, and MLPs in tiles."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from budwood.errors import InputError
from budwood.model import offload
from budwood.model.device import planned_host
from budwood.model.ops import tiles
from budwood.model.ops.gated import fuse_mlps
from budwood.model.recompute import find_problem, layers_of, recompute_layers

LAYERS = 4


def llama(dropout: float = 0.0) -> LlamaForCausalLM:
    """Return a Llama of four layers with random weights, in training."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, attention_dropout=dropout, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    fuse_mlps(model)
    return model.train()


def step(model: nn.Module, passes: int = 1) -> list[Tensor]:
    """Return loss and gradients of a step of so many passes, each with a graph of its own."""
    torch.manual_seed(1)
    tokens = torch.randint(1, 64, (2, 40))
    model.zero_grad()
    losses = [model(input_ids=tokens.roll(n, 1), labels=tokens).loss for n in range(passes)]
    for loss in losses:
        loss.backward()
    return [*(loss.detach() for loss in losses), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_number_of_layers_gives_the_same_bits(dropout: float) -> None:
    model = llama(dropout)
    expected = step(model, passes=2)
    saved = []
    for setting, offloads in [*((n, False) for n in range(1, LAYERS)), (True, False), (2, True), (True, True)]:
        recompute_layers(model, setting, offloads)
        flags = [layer.gradient_checkpointing for layer in layers_of(model)]
        assert flags == [index < (LAYERS if setting is True else setting) for index in range(LAYERS)]
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):  # noqa: B023
            model(input_ids=torch.ones(2, 40, dtype=torch.long))
        saved.append(sum(kept))
        assert same(step(model, passes=2), expected)
    assert saved[:4] == sorted(saved[:4], reverse=True) and saved[3] < saved[0] / 2
    recompute_layers(model, False)
    assert not any(layer.gradient_checkpointing for layer in layers_of(model)) and same(
        step(model), step(llama(dropout))
    )


def test_the_random_state_is_kept_only_where_a_layer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[Any] = []
    monkeypatch.setattr(torch, "set_rng_state", lambda state: restored.append(state))
    for dropout in (0.0, 0.3):
        model = llama(dropout)
        recompute_layers(model, True)
        restored.clear()
        model(input_ids=torch.ones(2, 40, dtype=torch.long), labels=torch.ones(2, 40, dtype=torch.long)).loss.backward()
        assert len(restored) == (2 * LAYERS if dropout else 0)  # the layer's, and afterwards the one before


def test_inputs_are_in_the_hosts_memory_between_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "PIECE", 1024)
    model, kept, on_device, hosted = llama(), [], [], []
    expected = step(model, passes=2)

    class Watched(offload._Kept):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            kept.append(weakref.ref(self))
            self.fetch()

        def fetch(self) -> None:
            super().fetch()
            on_device.append(sum(other.device is not None for one in kept if (other := one()) is not None))

    @contextmanager
    def counting() -> Iterator[None]:
        yield
        hosted.append(1)

    monkeypatch.setattr(offload, "_Kept", Watched)
    recompute_layers(model, 3, offloads=True)
    with planned_host(counting):
        assert same(step(model, passes=2), expected)
    assert len(kept) == len(hosted) == 2 * 3 and max(on_device) == 2
    assert all(one() is None for one in kept)  # with their graphs
    one = offload._Kept(torch.arange(2560.0), None, None)
    assert [len(piece) for piece in one.host] == [256] * 10
    assert [len(piece) for piece in offload._Kept(torch.arange(300.0), None, None).host] == [256, 64]
    one.release()
    assert torch.equal(one.take(), torch.arange(2560.0)) and torch.equal(one.take(), torch.arange(2560.0))


def test_an_input_that_changes_before_its_copy_is_refused() -> None:
    keeper = offload.Offload()
    x = torch.ones(4, requires_grad=True) * 1
    with keeper.keeping(x):
        y = x.sin()
    x.detach().add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_a_model_whose_layers_take_their_input_by_name_is_refused() -> None:
    with pytest.raises(InputError, match="do not take their input as the first argument"):
        offload.Offload().keeping(None)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_long_rows_pass_the_mlp_in_tiles(monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    """The same function up to the order of sums, and no temporary of the MLP is as long as the rows."""
    monkeypatch.setattr(tiles, "FROM", 1 << 60)

    def result() -> tuple[list[Tensor], list[int]]:
        model = llama().double()
        for layer in model.model.layers:  # where adapters have it
            layer.mlp.down_proj = nn.Sequential(nn.Dropout(dropout), layer.mlp.down_proj)
        fuse_mlps(model)
        recompute_layers(model, True)
        layer, lengths = model.model.layers[0].mlp, []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                lengths.extend(t.numel() for t in tree_iter(out) if isinstance(t, Tensor) and t.shape[-1:] == (48,))
                return out

        with Watch():
            found = step(model)
        assert layer.forward.in_tiles
        return found, lengths

    expected, whole = result()
    monkeypatch.setattr(tiles, "FROM", 16)
    monkeypatch.setattr(tiles, "ROWS", 24)  # 80 rows are three tiles and a part
    found, parts = result()
    assert max(whole) == 80 * 48 and max(parts) == 48 * 32  # the weights
    if not dropout:
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    again, _ = result()
    assert same(found, again)


def test_tiles_draw_the_same_numbers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of tiles with dropout is differentiated at the masks that it was computed with."""
    monkeypatch.setattr(tiles, "ROWS", 8)
    torch.manual_seed(0)
    linear, x = nn.Linear(4, 4, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64, requires_grad=True)

    def function(rows: Tensor) -> Tensor:
        return nn.functional.dropout(linear(rows), 0.5)

    y = tiles.in_tiles(function, linear, x)
    mask = (y != 0).double() * 2
    torch.testing.assert_close(y, linear(x) * mask)
    found = torch.autograd.grad(y.square().sum(), [x, linear.weight, linear.bias])
    expected = torch.autograd.grad((linear(x) * mask).square().sum(), [x, linear.weight, linear.bias])
    torch.testing.assert_close(found, expected)


def test_the_layers_recomputation_ends_before_the_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles compute the MLP twice, like recomputation without them."""
    calls: list[int] = []
    for rows in (1 << 60, 16):
        monkeypatch.setattr(tiles, "FROM", rows)
        model = llama()
        recompute_layers(model, True)
        gate = model.model.layers[1].mlp.gate_proj
        original = gate.forward
        gate.forward = lambda x, original=original: (calls.append(x.numel()), original(x))[1]
        step(model)
    assert calls == [80 * 32] * 4


def test_what_a_model_cannot_do_is_named() -> None:
    model = llama()
    assert all(find_problem(model, setting) is None for setting in (False, True, "auto", 1, 4))
    assert find_problem(model, 5) == ("5 layers cannot be recomputed: the base has 4; give at most 4, or true for all")
    bert = BertForMaskedLM(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
                                      intermediate_size=8))  # fmt: skip
    assert find_problem(bert, 3) is None and "has 3" in (find_problem(bert, 4) or "")
    mlp = nn.Linear(2, 2)
    assert "Linear cannot recompute its activations" in (find_problem(mlp, True) or "")
    mlp.supports_gradient_checkpointing = True  # type: ignore[assignment]
    assert "only recompute all of its layers or none" in (find_problem(mlp, 1) or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: copies beside the computation")
def test_offloading_on_cuda_gives_the_same_bits_and_frees_memory() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=8,
        num_key_value_heads=8, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).train()
    model.requires_grad_(False)
    model.model.layers[0].mlp.gate_proj.requires_grad_(True)
    tokens = torch.randint(1, 64, (8, 2048), device="cuda")

    def run(offloads: bool) -> tuple[Tensor, Tensor, int]:
        recompute_layers(model, True, offloads)
        for _ in range(3):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.cuda.synchronize()
        return (
            loss.detach(),
            model.model.layers[0].mlp.gate_proj.weight.grad,
            torch.cuda.max_memory_allocated() - before,
        )

    loss, gradient, peak = run(False)
    loss_again, gradient_again, less = run(True)
    assert torch.equal(loss, loss_again) and torch.equal(gradient, gradient_again)
    one = 8 * 2048 * 1024 * 2
    assert peak - less > 11 * one, f"{(peak - less) / one:.1f} of 16 inputs"

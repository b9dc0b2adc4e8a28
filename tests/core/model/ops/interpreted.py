"""Tests of the Triton kernels in Triton's interpreter; run by test_kernels.py, in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from budwood.model.halves import norms
from budwood.model.ops import kernels
from budwood.model.ops.attention import packed_mask
from budwood.model.ops.cross_entropy import cross_entropy
from budwood.model.ops.gated import activate, fuse_mlps, gated
from budwood.model.ops.group import Group, Part, pack
from budwood.model.ops.kernels import launch
from budwood.model.ops.kernels.checks import CHECKS
from budwood.model.ops.rms_norm import norm_backward, norm_forward, norm_of_sum, rms_norm, save_memory_in_norms
from budwood.model.ops.rotary import fuse_rotations, rotary, rotate
from budwood.model.quantizers import quantizer_of
from budwood.model.quantizers.cpu_kernel import install
from budwood.model.recompute import recompute_layers

DTYPES = [torch.float32, torch.float16]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that were launched."""
    names: list[str] = []
    for name, dtype in itertools.product(CHECKS, DTYPES):
        assert kernels._passes(name, torch.device("cpu"), dtype), kernels.problems

    def counted(name: str, function: Any) -> Any:
        return lambda *args, **kwargs: (names.append(name), function(*args, **kwargs))[1]

    for name in [
        name for name in vars(launch) if name.split("_")[0] in ("dequantize", "rms", "gated", "rotate", "cross")
    ]:
        monkeypatch.setattr(launch, name, counted(name, getattr(launch, name)))
    yield names


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def agree(function: Any, formula: Any, inputs: list[Tensor]) -> None:
    """Compare values and gradients with the formula in float64, up to roundings to the inputs' dtype."""
    dtype = inputs[0].dtype
    bound = 8 * torch.finfo(dtype).eps
    mine = [x.clone().requires_grad_() for x in inputs]
    wide = [x.double().requires_grad_() for x in inputs]
    result, expected = function(*mine), formula(*wide)
    (above,) = draw(tuple(expected.shape))
    gradients = torch.autograd.grad(result, mine, above.to(result.dtype))
    exact = torch.autograd.grad(expected, wide, above.to(result.dtype).double())
    for found, true in zip((result, *gradients), (expected, *exact), strict=True):
        scale = max(1.0, true.abs().max().item() if true.numel() else 0.0)
        torch.testing.assert_close(found.double(), true, rtol=0, atol=bound * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64), (0, 64), (2, 5, 77), (1, 1)])
def test_rms_norm(launched, shape, dtype):
    x, weight = draw(shape, shape[-1:], dtype=dtype)

    def formula(x: Tensor) -> Tensor:
        return weight.double() * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    agree(lambda x: rms_norm(x, weight, 1e-5), formula, [x])
    assert launched == ["rms_norm_forward", "rms_norm_backward"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64), (0, 64), (5, 77), (1, 1)])
def test_the_norm_of_a_sum_is_that_of_both_apart(launched, shape, dtype):
    """Bit for bit, since the sum is rounded before its norm; and near the formula in float64."""
    x, y, weight = draw(shape, shape, shape[-1:], dtype=dtype)
    total, normed, scales = norm_of_sum(x, y.clone(), weight, 1e-5)
    assert torch.equal(total, x + y)
    apart = norm_forward(x + y, weight, 1e-5)
    assert torch.equal(normed, apart[0]) and torch.equal(scales, apart[1])
    wide = total.double()
    exact = weight.double() * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(normed.double(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps)
    assert launched == ["rms_norm_of_sum", "rms_norm_forward"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_of_a_slice_of_rows_is_that_of_a_copy(launched, dtype):
    whole, weight, above = draw((5, 150), (77,), (5, 77), dtype=dtype)
    for rows in (whole[:, :77], whole[:, 3:80]):
        assert not rows.is_contiguous()
        alone, slices = ((norm_forward(x, weight, 1e-5), x) for x in (rows.clone(), rows))
        for found, expected in zip(slices[0], alone[0], strict=True):
            assert torch.equal(found, expected)
        gradients = [norm_backward(above, x, weight, scales, x) for (_, scales), x in (alone, slices)]
        assert torch.equal(*gradients)
    assert launched == ["rms_norm_forward", "rms_norm_forward", "rms_norm_backward", "rms_norm_backward"] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "shape"), [("silu", (7, 300)), ("gelu_tanh", (2, 3, 513)), ("silu", (0, 8))])
def test_gated_products(launched, kind, shape, dtype):
    agree(lambda g, u: gated(g, u, kind), lambda g, u: activate(g, kind) * u, draw(shape, shape, dtype=dtype))
    assert launched == ["gated_forward", "gated_backward"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "batches"), [(16, 1), (16, 2), (12, 2)])
def test_rotations(launched, size, batches, dtype):
    query, key, cosine, sine = draw((2, 3, 4, 16), (2, 3, 2, 16), (batches, 3, size), (batches, 3, size), dtype=dtype)
    wide = cosine.double(), sine.double()
    inputs = [x.transpose(1, 2) for x in (query, key)]  # as attention has them
    agree(
        lambda *both: torch.cat(rotary(*both, cosine, sine), 1),
        lambda *both: torch.cat([rotate(x, *wide) for x in both], 1),
        inputs,
    )
    assert launched == ["rotate", "rotate"]  # forward and backward, each for both


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens_to_rotate(launched, dtype):
    query, cosine, sine = draw((2, 4, 0, 16), (1, 0, 16), (1, 0, 16), dtype=dtype)
    wide = cosine.double(), sine.double()
    agree(lambda x: rotary(x, x[:, :2], cosine, sine)[0], lambda x: rotate(x, *wide), [query])


def test_heads_that_are_far_apart_in_memory_are_rotated(launched, tmp_path):
    """Further than 32 bits can say. The file has holes, so neither disk nor memory holds what is not written."""
    apart, dtype = 2**30, torch.float16
    memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=2 * apart + 16, dtype=dtype)
    (near, cosine, sine) = draw((1, 3, 1, 16), (1, 1, 16), (1, 1, 16), dtype=dtype)
    far = memory.as_strided((1, 3, 1, 16), (3 * apart, apart, 16, 1)).copy_(near)
    for found, expected in zip(
        launch.rotate(far, far, cosine, sine), launch.rotate(near, near, cosine, sine), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes"), [(3, 300), (2, 2 * launch.CLASSES + 5), (0, 7), (4, 1)])
def test_cross_entropy(launched, rows, classes, dtype):
    (logits,) = draw((rows, classes), dtype=dtype)
    labels = torch.arange(rows) * 31 % classes
    agree(
        lambda x: cross_entropy(x, labels), lambda x: F.cross_entropy(x, labels, reduction="none"), [logits]
    )  # fmt: skip
    assert launched == ["cross_entropy_forward", "cross_entropy_backward"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cross_entropy_of_rows_that_begin_with_classes_ruled_out(launched, dtype):
    (logits,) = draw((3, 2 * launch.CLASSES + 5), dtype=dtype)
    logits[0, : launch.CLASSES + 9] = logits[1, : 2 * launch.CLASSES] = -torch.inf
    labels = torch.tensor([launch.CLASSES + 20, 2 * launch.CLASSES + 3, 7])
    agree(lambda x: cross_entropy(x, labels), lambda x: F.cross_entropy(x, labels, reduction="none"), [logits])
    assert cross_entropy(logits, torch.tensor([0, 0, 0]))[:2].tolist() == [torch.inf, torch.inf]


@pytest.mark.parametrize(("kind", "nested", "dtype"), list(itertools.product(("nf4", "fp4"), (False, True), DTYPES)))
def test_weights_in_4_bit_are_those_of_bitsandbytes(launched, kind, nested, dtype):
    install()
    for shape in ((64, 96), (33, 130), (300, 256)):
        (weight,) = draw(shape)
        packed, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=64)
        nests = (state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize) if nested else None
        found = launch.dequantize_4bit(packed, state.absmax, state.code, state.blocksize, nests, state.shape, dtype)
        state.dtype = dtype
        assert torch.equal(found, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shapes", [[(3, 5), (7, 5), (1, 5)], [(33, 65), (1, 65), (70, 65)], [(33, 65), (71, 65)]])
def test_weights_of_a_group_lie_below_each_other_whatever_their_sizes(launched, shapes, nested):
    """Odd ones too, of which the last byte has one weight."""
    install()
    stored, expected = [], []
    for weight in draw(*shapes):
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested, blocksize=64)
        nests = (state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize) if nested else None
        stored.append((packed, state.absmax, state.code, state.blocksize, nests, state.shape))
        expected.append(bnb.dequantize_4bit(packed, state))
    assert torch.equal(launch.dequantize_4bit_group(stored, torch.float32), torch.cat(expected))


def test_no_weights_in_4_bit(launched):
    nothing, code = torch.empty(0, dtype=torch.uint8), torch.rand(16)
    stored = (nothing, torch.empty(0), code, 64, None, (0, 8))
    assert launch.dequantize_4bit(*stored, torch.float32).shape == (0, 8)
    assert launch.dequantize_4bit_group([stored, stored], torch.float32).shape == (0, 8)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("sizes", "ranks", "runs"),
    [((32, 16, 16), (4, 4, 4), [1, 2]), ((32, 16, 16), (4, 0, 4), [1, 1, 1]), ((48, 48), (3, 3), [2]),
     ((16, 16, 16), (0, 0, 5), [2, 1]), ((24,), (4,), [1])],
)  # fmt: skip
def test_a_group_whose_weights_are_one_matrix_computes_its_formula(launched, sizes, ranks, runs, biased):
    from benchmarks.gpu_record import Bench, four_bit

    bench = Bench(True, Path(), 60)
    bases = [four_bit(bench, 64, size) for size in sizes]
    generator = torch.Generator().manual_seed(5)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    for base in bases[:1] * biased:
        base.bias = nn.Parameter(leaf(base.out_features).detach(), requires_grad=False)
    parts = [
        Part(base, leaf(rank, 64), leaf(base.out_features, rank), 0.5) if rank else Part(base)
        for base, rank in zip(bases, ranks, strict=True)
    ]
    x, above = leaf(9, 64), leaf(9, sum(sizes)).detach()
    wide = [quantizer_of(base).dequantize(base, torch.float32).double() for base in bases]
    expected = torch.cat(
        [
            x.double() @ weight.t()
            + (0 if part.base.bias is None else part.base.bias.double())
            + (0 if part.a is None else 0.5 * x.double() @ part.a.double().t() @ part.b.double().t())
            for part, weight in zip(parts, wide, strict=True)
        ],
        1,
    )
    leaves = [t for part in parts for t in part.tensors[:2] if t is not None]
    exact = [each.double() for each in torch.autograd.grad(expected, [x, *leaves], above.double())]
    with torch.no_grad():
        group, tensors = Group(parts, x, torch.float32), [t for part in parts for t in part.tensors]
        assert group.stacked and group.runs == runs
        (factors,) = pack([(group.layout, tensors)])
        (found,), made = group.forward(x, tensors, factors)
        thin = group.thin_gradient([above], factors)
        grad_x = group.input_gradient([above], thin, factors, made.masks)
        wants = [t is not None and t.requires_grad for t in tensors]
        others = group.factor_gradients([above], thin, x, made, tensors, wants)
    mine = [found, grad_x, *(each for each in others if each is not None)]
    for one, true in zip(mine, [expected, *exact], strict=True):
        torch.testing.assert_close(one.double(), true, rtol=0, atol=1e-5 * max(1.0, true.abs().max().item()))


def test_a_model_computes_with_the_kernels_what_it_computes_without(launched, monkeypatch):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    model = modeling_llama.LlamaForCausalLM(config).requires_grad_(False)

    tokens = torch.arange(12)[None] % 50

    def gradients() -> list[Tensor]:
        embedded = model.model.embed_tokens(tokens).requires_grad_()
        logits = model(inputs_embeds=embedded).logits
        return [logits, *torch.autograd.grad(cross_entropy(logits[0], tokens[0]).sum(), [embedded])]

    with monkeypatch.context() as off:
        off.setattr(kernels, "INTERPRETED", False)
        expected = gradients()
        assert not launched
    assert save_memory_in_norms(model) == 5 and fuse_mlps(model) == 2 and fuse_rotations(model) == 1
    found = gradients()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    counts = {name: launched.count(name) for name in sorted(set(launched))}
    assert counts == {
        "cross_entropy_backward": 1, "cross_entropy_forward": 1, "gated_backward": 2, "gated_forward": 2,
        "rms_norm_backward": 5, "rms_norm_forward": 5, "rotate": 4,
    }  # fmt: skip

    launched.clear()  # a hook inside an MLP sees the activation
    seen: list[Tensor] = []
    handle = model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, out: seen.append(out))
    gradients()
    handle.remove()
    assert len(seen) == 1 and launched.count("gated_forward") == 1


@pytest.mark.parametrize("recomputes", [False, True])
def test_layers_in_halves_compute_with_the_kernels_what_they_compute_without(launched, monkeypatch, recomputes):
    """Weights of a group are dequantised as one, and each is dequantised twice."""
    from benchmarks.gpu_record import Bench, stack

    bench = Bench(True, Path(), 60)
    bench.shapes = {"hidden": 64, "keys": 32, "inner": 96, "head": 32}  # each program takes the interpreter 10 ms
    model = stack(bench)
    recompute_layers(model, recomputes)
    x, above = draw((1, 5, 64), (1, 5, 64))
    launched.clear()  # the layer with which the class was tried

    def gradients() -> list[Tensor]:
        y = model(inputs_embeds=x, segments=(0, 2, 5), attention_mask=packed_mask()).last_hidden_state
        return [y, *torch.autograd.grad(y, [p for p in model.parameters() if p.requires_grad], above)]

    with monkeypatch.context() as off:
        off.setattr(kernels, "INTERPRETED", False)
        expected = gradients()
        assert not launched
    found = gradients()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * max(1.0, theirs.abs().max().item()))
    counts = {name: launched.count(name) for name in set(launched)}
    again = 2 * recomputes
    assert counts == {
        "dequantize_4bit_group": 2 * 2 * 4 - (not recomputes),  # the first layer's input has no gradient
        "gated_forward": 2, "gated_backward": 2, "rotate": 4 + again,
        "rms_norm_forward": 2 + again, "rms_norm_of_sum": 3 + again, "rms_norm_backward": 5 - 1,
    }  # fmt: skip

    handle = model.layers[0].register_forward_hook(lambda module, args, out: 2 * out)
    with monkeypatch.context() as off:
        off.setattr(kernels, "INTERPRETED", False)
        expected = gradients()
    launched.clear()
    found = gradients()
    handle.remove()
    assert launched.count("rms_norm_forward") == 3 + again  # the next layer's input is another
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def test_a_norm_computed_ahead_is_freed_if_the_next_layer_has_no_use_for_it(launched, monkeypatch):
    from benchmarks.gpu_record import Bench, stack

    bench = Bench(True, Path(), 60)
    bench.shapes = {"hidden": 64, "keys": 32, "inner": 96, "head": 32}
    model = stack(bench)
    (x,) = draw((1, 5, 64))
    made: list[weakref.ref[Tensor]] = []

    def recorded(*args: Any) -> Any:
        found = norm_of_sum(*args)
        made.append(weakref.ref(found[2]))
        return found

    monkeypatch.setattr(norms, "norm_of_sum", recorded)
    options = {"segments": (0, 2, 5), "attention_mask": packed_mask()}
    layers: Any = model.layers
    for hooked, hook in (
        (None, None),
        (layers[1].mlp.act_fn, lambda module, args, out: None),  # the next layer takes its own forward
        (layers[0], lambda module, args, out: 2 * out),  # or has another input
    ):
        made.clear()
        handle = hooked.register_forward_hook(hook) if hooked is not None else None
        y = model(inputs_embeds=x, **options).last_hidden_state
        inside, ahead, *_ = (scales() is not None for scales in made)
        assert inside and ahead == (hooked is None)
        if handle is not None:
            handle.remove()
        del y


def test_other_mlps_keep_their_forward():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
            self.act_fn = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    assert fuse_mlps(Other()) == 0


def test_a_kernel_that_is_wrong_is_not_used_and_named(launched, monkeypatch):
    kernels._checked.cache_clear()
    monkeypatch.setattr(kernels, "problems", [])
    monkeypatch.setattr(launch, "gated_forward", lambda gate, up, kind: gate)
    gate, up = draw((3, 8), (3, 8))
    assert torch.equal(gated(gate, up, "silu"), F.silu(gate) * up)
    gated(gate, up, "silu")
    (line,) = kernels.problems
    assert line.startswith(
        "note: the Triton kernel gated is not used on cpu in torch.float32: silu: product differs by "
    )
    kernels._checked.cache_clear()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_whether_a_kernel_passes_does_not_depend_on_who_asks_first(context):
    kernels._checked.cache_clear()
    with context():
        for name in CHECKS:
            assert kernels._passes(name, torch.device("cpu"), torch.float32), kernels.problems


def test_memory_that_runs_out_in_a_check_is_not_remembered(monkeypatch):
    kernels._checked.cache_clear()
    monkeypatch.setattr(kernels, "problems", [])

    def runs_out(*_: Any) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    (gate,) = draw((3, 8))
    with monkeypatch.context() as patch:
        patch.setitem(CHECKS, "gated", runs_out)
        assert kernels.implementation("gated", gate) is None
    assert kernels.implementation("gated", gate) is launch and kernels.problems == []

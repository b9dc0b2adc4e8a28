"""The "budwood" attention: packed rows equal their examples run alone; without segments it equals "sdpa"."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from budwood.model.device import planned_device
from budwood.model.ops.attention import IMPLEMENTATION, attention, packed_mask, register, take_reasons

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 5}
MODELS = {
    "Llama": {},
    "Qwen2": {"use_sliding_window": True, "max_window_layers": 1, **WINDOW},
    "Qwen3": {},
    "Mistral": WINDOW,
    "Gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0, **WINDOW},
    "Gemma3": {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"], **WINDOW},
    "Phi3": {},
    "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 1, **WINDOW},
}
LENGTHS = (3, 12, 1, 9)


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def model_of(name: str, implementation: str, **changes: Any) -> Any:
    prefix = {"Gemma3": "Gemma3Text"}.get(name, name)
    config = getattr(transformers, f"{prefix}Config")(**SIZES | MODELS[name] | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation=implementation)
    if name == "GptOss":
        torch.nn.init.normal_(model.model.layers[0].self_attn.sinks, std=2.0)
    return model.eval()


def row(lengths: tuple[int, ...] = LENGTHS) -> tuple[list[torch.Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    examples = [torch.randint(1, 64, (n,), generator=generator) for n in lengths]
    segments = tuple(torch.tensor((0, *lengths)).cumsum(0).tolist())
    return examples, {
        "input_ids": torch.cat(examples)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "attention_mask": packed_mask(),
        "segments": segments,
        "use_cache": False,
    }


def outputs_and_gradient(model: Any, calls: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    weight = model.model.embed_tokens.weight
    weight.grad = None
    actual = torch.cat([model.model(**call).last_hidden_state[0] for call in calls])
    direction = torch.randn(actual.shape, generator=torch.Generator().manual_seed(2))
    (actual * direction).sum().backward()
    return actual.detach(), weight.grad.clone()


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_alone(name: str) -> None:
    examples, packed = row()
    alone = [{"input_ids": example[None], "use_cache": False} for example in examples]
    expected, expected_gradient = outputs_and_gradient(model_of(name, "eager"), alone)
    actual, gradient = outputs_and_gradient(model_of(name, IMPLEMENTATION), [packed])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    # The gradient's longest sums, over all tokens and over a layer's width, run in another order: n · eps.
    summands = sum(LENGTHS) + SIZES["intermediate_size"]
    bound = summands * torch.finfo(torch.float32).eps * float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient, atol=bound, rtol=0)


def test_packed_rows_with_a_full_mask_are_the_same() -> None:
    _, packed = row()
    model = model_of("Mistral", IMPLEMENTATION)
    lazy = model.model(**packed).last_hidden_state
    full = model.model(**packed | {"attention_mask": None}).last_hidden_state
    assert torch.equal(lazy, full)


def test_gradient_checkpointing_keeps_the_segments() -> None:
    _, packed = row()
    model = model_of("Llama", IMPLEMENTATION)
    expected = outputs_and_gradient(model, [packed])
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    actual = outputs_and_gradient(model, [packed])
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GptOss"])
def test_padded_generation_equals_the_stock_model(name: str) -> None:
    ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :4], ids[0, :4] = 0, 0
    settings = {"max_new_tokens": 15, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    stock, ours = (
        model_of(name, implementation).generate(input_ids=ids, attention_mask=mask, **settings)
        for implementation in ("eager", IMPLEMENTATION)
    )
    assert torch.equal(stock.sequences, ours.sequences)
    torch.testing.assert_close(torch.stack(ours.scores), torch.stack(stock.scores), atol=1e-5, rtol=1e-5)


def test_without_segments_it_is_bitwise_identical_to_sdpa() -> None:
    ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    stock, ours = (
        model_of("Mistral", name)(input_ids=ids, attention_mask=mask).logits for name in ("sdpa", IMPLEMENTATION)
    )
    assert torch.equal(stock, ours)


def test_an_encoder_attends_to_both_sides_within_its_segment() -> None:
    config = transformers.ModernBertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        local_attention=6, layer_types=["full_attention", "sliding_attention"], pad_token_id=0,
    )  # fmt: skip
    models = []
    for implementation in ("eager", IMPLEMENTATION):
        torch.manual_seed(0)
        models.append(transformers.ModernBertModel._from_config(config, attn_implementation=implementation).eval())
    examples, packed = row()
    del packed["use_cache"]
    actual = models[1](**packed).last_hidden_state[0]
    expected = torch.cat([models[0](input_ids=example[None]).last_hidden_state[0] for example in examples])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


class _Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2"])
def test_no_tensor_has_the_size_of_the_row_squared(name: str) -> None:
    _, packed = row((20,) * 40)
    model = model_of(name, IMPLEMENTATION)
    with _Largest() as largest:
        model.model(**packed).last_hidden_state.sum().backward()
    tokens = packed["input_ids"].numel()
    assert largest.elements <= tokens * SIZES["intermediate_size"] * 2 < tokens * tokens


def test_a_model_that_ignores_segments_is_an_error() -> None:
    _, packed = row()
    del packed["segments"]
    with pytest.raises(RuntimeError):
        model_of("Llama", IMPLEMENTATION).model(**packed)


def test_attention_defined_only_by_its_mask_is_refused() -> None:
    query = torch.randn(1, 2, 4, 8)
    layer = torch.nn.Module()
    for name in ("sliding_window", "attention_chunk_size"):
        layer.config = SimpleNamespace(**{name: 3})
        with pytest.raises(NotImplementedError, match=name):
            attention(layer, query, query, query, None, segments=(0, 4))
    layer.config = SimpleNamespace()
    with pytest.raises(NotImplementedError, match="bias"):
        attention(layer, query, query, query, None, segments=(0, 4), position_bias=torch.zeros(1, 2, 4, 4))


def test_dropout_applies_in_every_segment() -> None:
    torch.manual_seed(0)
    query, value = torch.zeros(1, 2, 40, 8), torch.ones(1, 2, 40, 8)
    layer = torch.nn.Module()
    for softcap in (None, 50.0):
        kept, _ = attention(layer, query, query, value, None, dropout=0.5, segments=(0, 20, 40), softcap=softcap)
        assert kept.shape == (1, 40, 2, 8)
        assert kept[0, :20].std() > 0.1
        assert kept[0, 20:].std() > 0.1
        assert kept.mean() == pytest.approx(1.0, abs=0.2)


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    _, packed = row()
    for name in ("Llama", "Gemma2"):
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = model_of(name, IMPLEMENTATION)
            inputs = {k: torch.empty_like(v) if isinstance(v, torch.Tensor) else v for k, v in packed.items()}
            hidden = model.model(**inputs).last_hidden_state
            hidden.sum().backward()
        assert hidden.shape == (1, sum(LENGTHS), SIZES["hidden_size"])


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
def test_variable_length_kernel_equals_segments(window: int | None) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Module()
    tensors = [torch.randn(1, heads, 25, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2)]
    direction = torch.randn(1, 25, 4, 64, dtype=torch.bfloat16, device="cuda")
    results = []
    for dtype in (torch.bfloat16, torch.float32):  # the kernel only supports 16 bit
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
        out, _ = attention(layer, *inputs, None, segments=(0, 3, 15, 16, 25), sliding_window=window)
        results.append([out, *torch.autograd.grad(out, inputs, direction.to(dtype))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.float(), expected, atol=0.06, rtol=0.02)


@pytest.mark.parametrize(
    ("options", "dtype", "reason"),
    [
        ({"softcap": 2.0}, torch.bfloat16, "its scores are soft-capped"),
        ({"s_aux": torch.zeros(2)}, torch.bfloat16, "it has sinks"),
        ({"dropout": 0.5}, torch.bfloat16, "it drops weights by chance"),
        ({}, torch.float32, "it is in float32"),
        ({"size": 264}, torch.bfloat16, "its heads are 264 and 264 wide"),
        ({"capability": (7, 5)}, torch.float16, "the GPU is older than compute capability 8.0"),
    ],
)
def test_what_no_kernel_takes_on_a_gpu_is_told_once(options: dict[str, Any], dtype: torch.dtype, reason: str) -> None:
    size, least = options.pop("size", 8), options.pop("capability", (8, 0))
    q, k, v = (torch.randn(1, 2, 12, size, dtype=dtype) for _ in range(3))
    for _ in range(2):
        attention(SimpleNamespace(is_causal=True), q, k, v, None, segments=(0, 5, 12), **options)  # type: ignore[arg-type]
    assert take_reasons() == []
    with planned_device("cuda", least):
        for _ in range(2):
            attention(SimpleNamespace(is_causal=True), q, k, v, None, segments=(0, 5, 12), **options)  # type: ignore[arg-type]
    assert (take_reasons(), take_reasons()) == ([reason], [])

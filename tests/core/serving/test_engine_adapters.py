"""Adapters in the live engine: of any methods in one batch, blended, on bases of several kinds, loaded and unloaded."""

from __future__ import annotations

import gc
import importlib
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import make_tokenizer
from tests.core.serving.conftest import make_adapter
from tests.core.serving.engines import LONG, SHORT, alone, load_all, open_engine

from budwood import InputError
from budwood.errors import BudwoodError
from budwood.model.base import load_base
from budwood.serving import scheduler
from budwood.serving.engine import Engine
from budwood.serving.requests import Sampling


def logits_of(engine: Engine, names: list[str | None], tokens: list[list[int]]) -> torch.Tensor:
    """Return the logits after rows that are computed in one batch: first all but the last token, then that one."""

    def compute() -> torch.Tensor:
        forward, loaded = engine.scheduler.forward, [None if n is None else engine.names[n].live for n in names]
        slots = list(range(len(tokens)))
        with torch.no_grad():
            forward.logits([row[:-1] for row in tokens], slots, [0] * len(tokens), forward.plan(loaded, False))
            starts = [len(row) - 1 for row in tokens]
            found = forward.logits([row[-1:] for row in tokens], slots, starts, forward.plan(loaded, True))
        forward.cache.free()
        return found

    return engine.call(compute)


def test_adapters_of_every_method_share_a_batch_and_each_row_is_its_own(tiny_base, folders, scale):
    """LoRA of several ranks, rsLoRA, DoRA, AdaLoRA, a whole head, rows of embeddings, a third party's method."""
    engine = open_engine(tiny_base)
    names = load_all(engine, {**folders, "scale": scale, "lora-again": folders["lora"]})
    tokens = [LONG[0][:9], LONG[1][:9], LONG[2][:6], [1, 40, 99, 5, 7, 8], *[LONG[3][:7]] * 6]
    untouched = open_engine(tiny_base)
    mixed = logits_of(engine, [*names], tokens)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], alone(engine, name, tokens[i]), atol=2e-5, rtol=0)
    others = [alone(engine, name, tokens[4]) for name in names]
    assert all(not torch.allclose(others[0], other, atol=1e-2) for other in others[1:])
    assert others[1].equal(others[-1]) and names[1] == "lora"
    # The base's rows are bitwise those of a base that never had an adapter, in the same batch.
    alike = [None, "lora", "dora", None]
    part = logits_of(engine, alike, tokens[5:9])
    assert part[[0, 3]].equal(logits_of(untouched, [None] * 4, tokens[5:9])[[0, 3]])


def test_a_blend_is_the_weighted_sum_of_the_updates(tiny_base, folders, scale):
    """LoRA, AdaLoRA, DoRA (against its definition in float64) and a third party's method, also beside other rows."""
    engine = open_engine(tiny_base)
    load_all(engine, {**folders, "scale": scale})
    weights = {"lora": 0.7, "twin": -0.3, "adalora": 0.5, "dora": 0.6, "scale": 0.4}
    model = load_base(tiny_base, "none", "AutoModelForCausalLM", torch.float32).model.double()
    vectors, dora = (
        load_file(scale / "adapter_model.safetensors"),
        load_file(folders["dora"] / "adapter_model.safetensors"),
    )
    with torch.no_grad():
        base = {path: model.get_submodule(path).weight.clone() for path in engine.names["lora"].live.updates}
        for name, weight in weights.items():
            for path, update in engine.names[name].live.updates.items():
                own = base[path]
                if name == "scale":
                    changed = vectors[path].double()[:, None] * own
                else:
                    changed = own + update.scaling * (update.b.double() @ update.a.double())
                if name == "dora":
                    magnitude = dora[f"base_model.model.{path}.lora_magnitude_vector"].double()
                    changed = (magnitude / changed.norm(dim=1))[:, None] * changed
                model.get_submodule(path).weight += weight * (changed - own)
        scores = model(torch.tensor([SHORT[0]])).logits[0, -1].log_softmax(-1)
    asked = [engine.submit(SHORT[0], a, Sampling(8, log_probs=True)) for a in (weights, "lora", None, "dora", weights)]
    together = [answer.result() for answer in asked]
    for answer in (together[0], together[4], engine.submit(SHORT[0], weights, Sampling(8, log_probs=True)).result()):
        assert answer.tokens == together[0].tokens and answer.tokens[0] == int(scores.argmax())
        assert abs(answer.log_probs[0] - float(scores.max())) < 1e-4
    assert together[0].tokens != together[1].tokens
    for name in ("dora", "scale"):  # with weight 1, one adapter is itself
        own = engine.submit(SHORT[0], name, Sampling(8, log_probs=True)).result()
        answer = engine.submit(SHORT[0], {name: 1}, Sampling(8, log_probs=True)).result()
        assert answer.tokens == own.tokens and answer.log_probs == pytest.approx(own.log_probs, abs=1e-4)
    for bad, message in (
        (
            {"lora": 1.0, "head": 1.0},
            "'head' of type 'lora' replaces whole modules or rows of embeddings, so it cannot be blended",
        ),
        ({"rows": 1.0}, "'rows' of type 'lora' replaces whole modules"),
        ({"lroa": 1.0}, "Did you mean 'lora'"),
        ({}, "names no adapter"),
        ({"lora": float("nan")}, "not a finite weight"),
    ):
        with pytest.raises(InputError, match=message):
            engine.submit(SHORT[0], bad)


def test_loading_and_unloading_leaves_nothing(tiny_base, folders):
    """The modules, their attributes and the tensors in memory are the base's own again."""
    engine = open_engine(tiny_base)
    state = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    attributes = [(path, id(m), sorted(vars(m))) for path, m in engine.model.named_modules()]

    def cycle() -> None:
        names = load_all(engine, folders)
        answers = [engine.submit(SHORT[1], name, Sampling(2), stream=False) for name in names]
        assert all(answer.result().tokens for answer in answers)
        engine.submit(SHORT[1], {"lora": 0.5, "twin": 0.5}, Sampling(1)).result()
        for name in folders:
            engine.unload(name)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(item, torch.Tensor) for item in gc.get_objects())

    cycle()
    before = tensors()
    for _ in range(3):
        cycle()
    assert tensors() <= before
    assert engine.call(lambda: (engine.residents.uses, engine.residents.blends, engine.table.stacks.bytes)) == (
        {},
        {},
        0,
    )
    assert [(path, id(m), sorted(vars(m))) for path, m in engine.model.named_modules()] == attributes
    assert all(tensor.equal(state[name]) for name, tensor in engine.model.state_dict().items())


def test_stacks_stay_under_their_budget(tiny_base, folders):
    """Adapters that do not fit are computed from their own tensors."""
    names = ["lora", "twin", "head", "rows"]
    large, small = open_engine(tiny_base), open_engine(tiny_base, stack_bytes=200_000)
    for engine in (large, small):
        load_all(engine, {name: folders[name] for name in names})
    tokens = [[1, 8, 9, 10]] * 4
    torch.testing.assert_close(logits_of(large, names, tokens), logits_of(small, names, tokens), atol=1e-5, rtol=0)
    assert 0 < small.table.stacks.bytes <= 200_000 < large.table.stacks.bytes


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "head", "rows"])
def test_the_gradient_by_the_input_is_that_of_the_attached_adapter(tiny_base, folders, name):
    """An attack in an evaluation differentiates through the adapter in use."""
    gradients = []
    for table in (True, False):
        engine = open_engine(tiny_base)
        engine.loader.table_first = table
        engine.load("a", folders[name])
        engine.use("a")
        embeddings = engine.model.get_input_embeddings()(torch.tensor([SHORT[3], SHORT[3]])).detach().requires_grad_()
        logits = engine.model(inputs_embeds=embeddings).logits
        logits.float().log_softmax(-1)[..., 7].sum().backward()
        gradients.append(embeddings.grad)
    assert float(gradients[0].abs().max()) > 1e-3
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def save_model(folder: Path, model) -> Path:
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", ["Mistral", "Gemma2", "Gemma3"])
def test_rows_of_a_base_with_sliding_windows_share_batches(tmp_path, kind):
    """In all layers, or in some, beyond the window: the tokens of transformers' generate, and those of a row alone."""
    text = "Text" if kind == "Gemma3" else ""
    module = importlib.import_module(f"transformers.models.{kind.lower()}")
    torch.manual_seed(0)
    options = {} if kind == "Mistral" else {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
    config = getattr(module, f"{kind}{text}Config")(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, sliding_window=6, initializer_range=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    engine = open_engine(save_model(tmp_path / "base", getattr(module, f"{kind}ForCausalLM")(config)), step_tokens=40)
    engine.load("a", make_adapter(tmp_path / "a", 1))
    names, prompts = ["a", None, "a", None, "a"], [LONG[0], LONG[1][:20], SHORT[0], SHORT[3], LONG[2][:33]]
    asked = [(p, name, Sampling(6 + 3 * i)) for i, (p, name) in enumerate(zip(prompts, names, strict=True))]
    together = [answer.result() for answer in [engine.submit(*request) for request in asked]]
    assert engine.scheduler.unsupported is None and engine.model.config.sliding_window == 6
    for (prompt, name, sampling), answer in zip(asked, together, strict=True):
        assert engine.submit(prompt, name, sampling).result() == answer
        ids, most = torch.tensor([prompt]), sampling.max_new_tokens
        run = partial(engine.model.generate, ids, max_new_tokens=most, do_sample=False)
        assert answer.tokens == [t for t in engine.with_adapter(name, run)[0, len(prompt) :].tolist() if t != 2]
    mixed = logits_of(engine, names, [prompt[:30] for prompt in prompts])
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], alone(engine, name, prompts[i][:30]), atol=2e-5, rtol=0)


def test_a_base_whose_rows_cannot_join_is_answered_in_fixed_batches(tiny_base, folders, monkeypatch):
    """With the same answers, pieces, log-probabilities and seeds; cancelled, and failing, by row."""
    asked = [
        (prompt, name, Sampling(9 + i, temperature=i % 2, seed=i, log_probs=i > 1, top_log_probs=i // 3, stop=stop))
        for i, (prompt, name, stop) in enumerate(
            zip(SHORT, ["lora", None, "lora", "dora", None, None], [()] * 5 + [("e",)], strict=True)
        )
    ]
    free = open_engine(tiny_base)
    load_all(free, {n: folders[n] for n in ("lora", "dora")})
    expected = [free.submit(*request).result() for request in asked]
    monkeypatch.setattr(scheduler.Forward, "unsupported", lambda self: "as told")
    engine = open_engine(tiny_base)
    load_all(engine, {n: folders[n] for n in ("lora", "dora")})
    answers = [engine.submit(*request) for request in asked]
    texts = ["".join(answer) for answer in answers]
    for text, answer, own in zip(texts, answers, expected, strict=True):
        found = answer.result()
        assert (found.tokens, found.text, found.finish_reason) == (own.tokens, own.text, own.finish_reason)
        assert text == own.text and found.log_probs == pytest.approx(own.log_probs, abs=1e-5)
        assert [list(top) for top in found.top_log_probs] == [list(top) for top in own.top_log_probs]
    heard: list[str | None] = []

    def listen(piece: str | None) -> None:
        heard.append(piece)
        if len(heard) == 2:
            long.cancel()
            raise OSError("nobody there")

    engine.submit(SHORT[2], None, Sampling(1)).result()
    fine, long = (engine.submit(SHORT[0], "lora", Sampling(count)) for count in (9, 400))
    unheard = engine.submit(SHORT[1], "lora", Sampling(30), listener=listen)
    with pytest.raises(BudwoodError, match="the request failed: OSError: nobody there"):
        unheard.result()
    assert fine.result().tokens == free.submit(SHORT[0], "lora", Sampling(9)).result().tokens
    assert long.result().finish_reason == "cancelled" and len(long.result().tokens) < 300
    stats = engine.stats()
    assert stats.rows == stats.waiting == 0 and stats.tokens["", ""][0] == sum(len(SHORT[i]) for i in (1, 4, 5, 2))
    assert engine.call(lambda: sum(engine.residents.requests.values())) == 0


def test_biases_and_transposed_linears_by_row(tmp_path):
    """GPT-2: LayerNorms, biases that train, DoRA on transposed weights, learned positions."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    base = save_model(tmp_path / "base", GPT2LMHeadModel(config))
    engine = open_engine(base)
    for name, fields in (("all", {"bias": "all"}), ("own", {"bias": "lora_only", "use_dora": True}), ("plain", {})):
        options = {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, **fields}
        model = get_peft_model(GPT2LMHeadModel.from_pretrained(base), LoraConfig(**options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(tmp_path / name)
        engine.load(name, tmp_path / name)
    names = [None, "all", "own", "plain", None]
    tokens = [LONG[i % 4][: 5 + i] for i in range(5)]
    mixed = logits_of(engine, names, tokens)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], alone(engine, name, tokens[i]), atol=5e-5, rtol=1e-5)
        assert name is None or not torch.allclose(mixed[i], alone(engine, None, tokens[i]), atol=1e-2)
    engine.submit(tokens[0], "all", Sampling(3)).result()
    assert engine.scheduler.unsupported is None
    # Of blends, biases count by their differences from the base's; with weight 1, an adapter is itself.
    for name in ("all", "own"):
        whole, half = (
            engine.submit(tokens[0], {name: weight}, Sampling(4, log_probs=True)).result() for weight in (1, 0.5)
        )
        own = engine.submit(tokens[0], name, Sampling(4, log_probs=True)).result()
        assert whole.tokens == own.tokens and whole.log_probs == pytest.approx(own.log_probs, abs=1e-4)
        assert half.log_probs != pytest.approx(own.log_probs, abs=1e-2)
    parts = [(engine.names[name], 0.5) for name in ("all", "own")]
    live, bias = engine.call(lambda: engine.loader.blend(parts).live), engine.model.transformer.h[0].attn.c_attn.bias
    shifts = [0.5 * (loaded.live.biases["transformer.h.0.attn.c_attn"] - bias) for loaded, _ in parts]
    torch.testing.assert_close(live.biases["transformer.h.0.attn.c_attn"], bias + sum(shifts))


@pytest.mark.parametrize(
    ("quantization", "dtype", "bound"), [("nf4", torch.float32, 2e-5), ("none", torch.bfloat16, 0.2)]
)
def test_quantised_and_16_bit_bases_mix_too(tiny_base, folders, quantization, dtype, bound):
    engine = Engine(load_base(tiny_base, quantization, "AutoModelForCausalLM", dtype))
    names = load_all(engine, {n: folders[n] for n in ("lora", "wide", "dora", "adalora", "twin")})
    tokens = [LONG[i % 4][:7] for i in range(len(names))]

    def narrow(function):
        with torch.autocast("cpu", dtype if dtype is torch.bfloat16 else None, dtype is torch.bfloat16):
            return function()

    mixed = engine.call(lambda: narrow(lambda: logits_of(engine, names, tokens)))
    for i, name in enumerate(names):
        own = engine.call(lambda i=i, name=name: narrow(lambda: alone(engine, name, tokens[i]))).float()
        assert float((mixed[i] - own).abs().max()) < bound
    base = engine.call(lambda: narrow(lambda: logits_of(engine, [None] * len(names), tokens)))
    assert mixed[0].equal(base[0]), "the base's row is bitwise the base's in the same batch"

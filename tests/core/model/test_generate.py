"""Generation: independence of batches, greedy decoding, sampling, streaming and stop strings."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from budwood.errors import InputError
from budwood.model.base import load_base
from budwood.model.decoding import Generated, TextWriter
from budwood.model.generate import generate

LM = "AutoModelForCausalLM"


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(tiny_base, "none", LM, torch.float32)


@pytest.fixture(scope="module")
def prompts():
    pick = random.Random(0)
    return [[1, *(pick.randrange(5, 300) for _ in range(length))] for length in (3, 40, 1, 17, 17, 80, 9)]


def greedy_reference(model, prompt: list[int], count: int, ends=(2,)) -> list[int]:
    """Append the most likely token `count` times, without a cache."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            if token in ends:
                break
            tokens.append(token)
    return tokens[len(prompt) :]


# --- batches


def test_greedy_batches_equal_single_prompts_and_a_reference_loop(base, prompts):
    together = generate(base.model, base.tokenizer, prompts, max_new_tokens=12)
    for prompt, result in zip(prompts, together, strict=True):
        assert result.tokens == greedy_reference(base.model, prompt, 12)
        assert generate(base.model, base.tokenizer, [prompt], max_new_tokens=12) == [result]


@pytest.mark.parametrize("batch_tokens", [1, 60, 200, 10_000])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_results_do_not_depend_on_batches(base, prompts, batch_tokens, temperature):
    def run(**options):
        return generate(
            base.model, base.tokenizer, prompts, 8, temperature=temperature, top_p=0.9, top_k=40, seed=7, **options
        )

    assert run(batch_tokens=batch_tokens) == run()


def test_batches_have_rows_of_similar_length_within_the_limit(base, prompts, monkeypatch):
    seen: list[list[int]] = []
    run = base.model.generate

    def watched(input_ids, attention_mask, **options):
        seen.append(attention_mask.sum(1).tolist())
        return run(input_ids=input_ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(base.model, "generate", watched)
    generate(base.model, base.tokenizer, prompts, 8, batch_tokens=100)
    assert len(seen) > 2
    assert all(len(lengths) * (max(lengths) + 8) <= 100 for lengths in seen)
    assert [length for lengths in seen for length in lengths] == sorted(map(len, prompts), reverse=True)


def test_the_head_receives_contiguous_rows(base, prompts):
    seen = []
    handle = base.model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    try:
        generate(base.model, base.tokenizer, prompts, 2)
    finally:
        handle.remove()
    assert max(len(rows) for rows in seen) > 1
    assert all(rows.shape[1] == 1 and rows.is_contiguous() for rows in seen)
    assert not base.model.lm_head._forward_pre_hooks


@pytest.mark.parametrize(("scored", "temperature"), [(False, 0.0), (True, 0.0), (False, 1.0)])
def test_a_token_is_read_from_the_device_once_and_the_head_computes_the_last_position(
    base, prompts, monkeypatch, scored, temperature
):
    """The first read waits for a GPU; transformers' two, whether rows are padded and all have ended, follow at once."""
    reads, head = [], []
    for name in ("tolist", "item", "__int__", "__float__", "cpu", "__bool__"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, own=own, name=name: (reads.append(name), own(self, *args))[1]
        )
    handle = base.model.lm_head.register_forward_hook(lambda module, args, output: head.append(args[0].shape))
    counts = []
    for tokens in (3, 11):
        reads.clear()
        head.clear()
        log_probs = (lambda logits, tokens, _: logits.log_softmax(-1)[range(len(tokens)), tokens]) if scored else None
        found = generate(base.model, base.tokenizer, prompts, tokens, temperature, seed=0, log_probs=log_probs)
        assert max(len(each.tokens) for each in found) == tokens
        assert head == [(len(prompts), 1, 64)] * tokens
        counts.append({name: reads.count(name) for name in set(reads)})
    handle.remove()
    more = {name: counts[1].get(name, 0) - counts[0].get(name, 0) for name in {*counts[0], *counts[1]}}
    assert {name: count for name, count in more.items() if count} == {"tolist": 8, "__bool__": 16}


def test_generation_from_a_4bit_base_in_bf16_is_reproducible(tiny_base, prompts):
    base = load_base(tiny_base, "nf4", LM, torch.bfloat16)
    first = generate(base.model, base.tokenizer, prompts, 8)
    assert generate(base.model, base.tokenizer, prompts, 8) == first
    assert any(result.tokens for result in first)


def test_peft_layers_are_used(tiny_base, prompts):
    from peft import LoraConfig, inject_adapter_in_model

    base = load_base(tiny_base, "none", LM, torch.float32)
    plain = generate(base.model, base.tokenizer, prompts, 8)
    inject_adapter_in_model(
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False), base.model
    )
    adapted = generate(base.model, base.tokenizer, prompts, 8)
    assert adapted != plain
    assert adapted[0].tokens == greedy_reference(base.model.eval(), prompts[0], 8)


def test_attention_by_segments_generates_the_same(tiny_base, prompts):
    from budwood.model.ops import attention

    base = load_base(tiny_base, "none", LM, torch.float32)
    plain = generate(base.model, base.tokenizer, prompts, 8)
    attention.register()
    base.model.set_attn_implementation(attention.IMPLEMENTATION)
    assert generate(base.model, base.tokenizer, prompts, 8) == plain


def test_no_prompts(base):
    assert generate(base.model, base.tokenizer, []) == []


# --- settings


def test_of_the_models_generation_settings_only_end_tokens_apply(base, prompts):
    from transformers import GenerationConfig

    plain = generate(base.model, base.tokenizer, prompts, 12)
    before = base.model.generation_config
    settings = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, temperature=9.0, num_beams=3, min_new_tokens=11,
        forced_eos_token_id=7, suppress_tokens=[plain[0].tokens[0]], eos_token_id=2,
    )  # fmt: skip
    base.model.generation_config = settings
    try:
        assert generate(base.model, base.tokenizer, prompts, 12) == plain
        assert base.model.generation_config is settings
        settings.eos_token_id = [2, plain[0].tokens[3]]
        ended = generate(base.model, base.tokenizer, prompts[:1], 12)[0]
    finally:
        base.model.generation_config = before
    first = plain[0].tokens.index(plain[0].tokens[3])
    assert (ended.tokens, ended.finish_reason) == (plain[0].tokens[:first], "eos")


def test_modes_of_modules_are_restored(base, prompts):
    model = base.model.train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    try:
        generate(model, base.tokenizer, prompts[:1], 2)
        with pytest.raises(ZeroDivisionError):
            generate(model, base.tokenizer, prompts[:1], 2, on_token=lambda index, piece: 1 / 0, seed=1, temperature=1)
        assert before == {name: module.training for name, module in model.named_modules()}
        assert torch.is_grad_enabled()
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt 2 is empty"),
        ([5] * 512, {}, "prompt 2 has 512 tokens; the base's context holds 512"),
        ([5], {"temperature": -1.0}, "temperature"),
        ([5], {"temperature": float("nan")}, "temperature"),
        ([5], {"top_p": 0.0}, "top_p"),
        ([5], {"top_k": -1}, "top_k"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_refused(base, prompt, options, message):
    with pytest.raises(InputError, match=message):
        generate(base.model, base.tokenizer, [[1, 5], prompt], **options)


def test_text_ends_at_the_end_of_the_context(base, prompts):
    long = [1, *([9, 30, 200] * 200)][:506]
    short, cut = generate(base.model, base.tokenizer, [prompts[0], long], 20)
    assert len(cut.tokens) <= 512 - len(long)
    assert cut == generate(base.model, base.tokenizer, [long], 20)[0]
    assert short == generate(base.model, base.tokenizer, [prompts[0]], 20)[0]


# --- sampling


def test_samples_follow_the_distribution(base):
    prompt = [1, 50, 60]
    with torch.no_grad():
        logits = base.model(torch.tensor([prompt])).logits[0, -1]
    drawn = generate(base.model, base.tokenizer, [prompt] * 4000, 1, temperature=0.7, top_k=5, seed=3)
    counts = torch.zeros(300)
    for result in drawn:
        for token in result.tokens or [2]:
            counts[token] += 1
    best = logits.topk(5)
    assert counts.nonzero().flatten().tolist() == sorted(best.indices.tolist())
    expected = (best.values / 0.7).softmax(0)
    assert (counts[best.indices] / 4000 - expected).abs().max() < 0.03


def test_top_p_keeps_the_most_likely(base, prompts):
    sampled = generate(base.model, base.tokenizer, prompts, 6, temperature=1.0, top_p=1e-6, seed=1)
    assert sampled == generate(base.model, base.tokenizer, prompts, 6)


def test_samples_depend_on_the_seed_and_not_on_torchs_generator(base, prompts):
    def run(seed):
        return generate(base.model, base.tokenizer, prompts, 8, temperature=1.0, seed=seed)

    before = torch.get_rng_state()
    assert run(1) == run(1)
    assert torch.equal(before, torch.get_rng_state())
    assert run(1) != run(2)
    assert run(None) != run(None)


# --- text


class Scripted(nn.Module):
    """Replaces a model's head to generate a fixed answer to any prompt."""

    def __init__(self, model, answer: list[int]) -> None:
        super().__init__()
        self.head, self.answer, self.calls = model.lm_head, answer, 0

    def forward(self, hidden):
        logits = self.head(hidden) * 0
        logits[..., self.answer[min(self.calls, len(self.answer) - 1)]] = 1
        self.calls += 1
        return logits


def answer(base, tokens: list[int], **options) -> tuple[Generated, list[str]]:
    """Make the model generate `tokens`, and return the result with the streamed pieces."""
    head = base.model.lm_head
    base.model.lm_head = Scripted(base.model, [*tokens, 2])
    pieces: list[str] = []
    try:
        options.setdefault("on_token", lambda index, piece: pieces.append(piece))
        result = generate(base.model, base.tokenizer, [[1, 5]], **options)[0]
    finally:
        base.model.lm_head = head
    return result, pieces


def tokens_of(base, text: str) -> list[int]:
    return base.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_complete_characters_and_the_complete_text_are_streamed(base):
    text = "héllo — 木 🌳 end"
    result, pieces = answer(base, tokens_of(base, text))
    assert "".join(pieces) == result.text == text
    assert len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces)
    assert result.finish_reason == "eos"
    assert result.tokens == tokens_of(base, text)


def test_an_incomplete_character_at_the_end_is_removed(base):
    tokens = tokens_of(base, "ab木")
    for options in ({}, {"on_token": None}):
        result, pieces = answer(base, tokens[:-1], **options)
        assert result.text == "ab"
        assert "".join(pieces) == ("" if options else "ab")


def test_special_tokens_are_not_in_the_text(base):
    tokens = [*tokens_of(base, "ab"), base.tokenizer.convert_tokens_to_ids("<|im_start|>"), *tokens_of(base, "cd")]
    assert answer(base, tokens)[0].text == "abcd"


@pytest.mark.parametrize("listens", [True, False])
@pytest.mark.parametrize(
    ("text", "stop", "expected", "reason"),
    [
        ("one\n\ntwo", ["\n\n"], "one", "stop"),
        ("one\ntwo", ["\n\n"], "one\ntwo", "eos"),
        ("say STOP now", ["STOP"], "say ", "stop"),
        ("say STO", ["STOP"], "say STO", "eos"),
        ("aab aaab", ["aaab"], "aab ", "stop"),
        ("x木y", ["木"], "x", "stop"),
        ("abcd", ["cd", "bc"], "a", "stop"),
        ("abcd", ["", "a"], "", "stop"),
    ],
)
def test_stop_strings_are_removed_and_never_streamed(base, text, stop, expected, reason, listens):
    result, pieces = answer(base, tokens_of(base, text), stop=stop, **({} if listens else {"on_token": None}))
    assert (result.text, result.finish_reason) == (expected, reason)
    assert not listens or "".join(pieces) == expected


def test_stop_string_that_is_a_special_token(base):
    end = base.tokenizer.convert_tokens_to_ids("<|im_end|>")
    result, _ = answer(base, [*tokens_of(base, "ab"), end, *tokens_of(base, "cd")], stop=["<|im_end|>"])
    assert (result.text, result.finish_reason, result.tokens) == ("ab", "stop", tokens_of(base, "ab"))


def test_the_limit_flushes_text_that_was_held_back(base):
    tokens = tokens_of(base, "say STO")
    result, pieces = answer(base, tokens, stop=["STOP"], max_new_tokens=len(tokens))
    assert ("".join(pieces), result.text, result.finish_reason) == ("say STO", "say STO", "length")


def test_stop_strings_at_random(base):
    """For random tokens and stop strings, the text ends before the first stop string."""
    pick = random.Random(1)
    for _ in range(300):
        text = "".join(pick.choice("abc\né木") for _ in range(pick.randrange(1, 25)))
        stop = ["".join(pick.choice("abc\né木") for _ in range(pick.randrange(1, 4))) for _ in range(2)]
        if stop[0] in stop[1] or stop[1] in stop[0]:
            continue  # the shorter string matches first
        pieces: list[str] = []
        writer = TextWriter(
            base.tokenizer, 10**6, {2: "eos"}, stop, 0, lambda index, piece, to=pieces: to.append(piece)
        )
        for token in [*tokens_of(base, text), 2]:
            writer.add(token)
        ends = [text.find(string) for string in stop if string in text]
        assert writer.result().text == "".join(pieces) == text[: min(ends, default=len(text))]

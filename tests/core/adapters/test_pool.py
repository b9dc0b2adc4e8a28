"""Adapters on a live model: the same logits as stock PEFT; swapped, mixed, and removed without a trace."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from budwood import AdapterPool, CorruptError, InputError, ResourceError
from budwood.adapters.manifest import ChatRecord
from budwood.adapters.store import write_adapter
from budwood.model.base import load_base

PROMPTS = [[1, 40, 50, 60, 70], [1, 99, 7], [1, 200, 201, 202, 203, 204, 205]]


def open_pool(base: Path, quantization: str = "none", precision: str = "fp32") -> AdapterPool:
    return AdapterPool(base, quantization, precision=precision, device="cpu")


def stock_logits(base: Path, adapter: Path) -> torch.Tensor:
    """Return logits from stock transformers and PEFT, without Budwood."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])


def base_logits(base: Path, quantization: str, precision: torch.dtype = torch.float32) -> torch.Tensor:
    """Return logits of a base that never had an adapter."""
    model = load_base(base, quantization, "AutoModelForCausalLM", precision).model
    with torch.no_grad():
        return torch.stack([model(torch.tensor([prompt]), use_cache=False).logits[0, -1].float() for prompt in PROMPTS])


def test_stock_adapters_give_the_logits_of_stock_peft(tiny_base, stock, other):
    pool = open_pool(tiny_base)
    pool.load("a", stock)
    pool.load("b", other)
    for name, folder in (("a", stock), ("b", other), ("a", stock)):
        pool.use(name)
        torch.testing.assert_close(pool.logits(PROMPTS), stock_logits(tiny_base, folder), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 1}},
        {"layers_to_transform": [1]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_variants_of_stock_peft_load_too(tiny_base, tmp_path, make_stock, changes):
    folder = make_stock(tiny_base, tmp_path / "stock", target_modules=["q_proj", "v_proj"], **changes)
    pool = open_pool(tiny_base)
    pool.load("a", folder)
    pool.use("a")
    torch.testing.assert_close(pool.logits(PROMPTS), stock_logits(tiny_base, folder), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("quantization", "precision"), [("none", "fp32"), ("nf4", "fp32"), ("none", "bf16"), ("nf4", "bf16")]
)
def test_without_an_adapter_in_use_logits_are_bitwise_identical_to_the_base(
    tiny_base, stock, other, quantization, precision
):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    untouched = base_logits(tiny_base, quantization, dtype)
    pool = open_pool(tiny_base, quantization, precision)
    pool.load("a", stock)
    assert pool.logits(PROMPTS).equal(untouched)  # loaded, not in use
    pool.load("b", other)
    pool.use("a")
    assert not pool.logits(PROMPTS).equal(untouched)
    pool.generate([PROMPTS[0]] * 2, ["a", "b"], max_new_tokens=4)
    pool.use(None)
    assert pool.logits(PROMPTS).equal(untouched)
    pool.unload("a")
    pool.unload("b")
    assert pool.logits(PROMPTS).equal(untouched)


def test_without_adapters_the_modules_are_the_bases_own(tiny_base, stock, other):
    pool = open_pool(tiny_base)
    before = [(path, id(module), sorted(vars(module))) for path, module in pool.model.named_modules()]
    state = {name: tensor.clone() for name, tensor in pool.model.state_dict().items()}
    pool.load("a", stock)
    pool.load("b", other)
    pool.use("b")
    pool.unload("a")
    assert (pool.names, pool.current) == (["b"], "b")
    pool.unload("b")
    assert (pool.names, pool.current) == ([], None)
    assert [(path, id(module), sorted(vars(module))) for path, module in pool.model.named_modules()] == before
    assert all(tensor.equal(state[name]) for name, tensor in pool.model.state_dict().items())


def test_one_batch_of_different_adapters_equals_each_alone(tiny_base, stock, other):
    pool = open_pool(tiny_base)
    pool.load("a", stock)
    pool.load("b", other)
    pool.use("b")
    adapters = ["a", None, "b", "a"]
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[1]]
    mixed = pool.generate(prompts, adapters, max_new_tokens=8)
    assert pool.current == "b"
    for prompt, name, answer in zip(prompts, adapters, mixed, strict=True):
        pool.use(name)
        assert pool.generate([prompt], max_new_tokens=8)[0].tokens == answer.tokens
    alone = {tuple(pool.generate([PROMPTS[1]], [name], max_new_tokens=8)[0].tokens) for name in ("a", "b", None)}
    assert len(alone) == 3


def test_threads_that_share_a_pool_get_their_own_adapters_answers(tiny_base, stock, other):
    """Calls are serialised, and the adapter that a thread selects is its own, while another thread loads more."""
    pool = AdapterPool(tiny_base, precision="fp32")
    folders = {"a": stock, "b": other}
    for name, folder in folders.items():
        pool.load(name, folder)
    expected = {}
    for name in (None, *folders):
        pool.use(name)
        expected[name] = pool.logits(["games and files"]), pool.generate(["games"], max_new_tokens=4)[0].tokens
    wrong, errors = [], []

    def ask(name):
        try:
            pool.use(name)
            for _ in range(6):
                logits, tokens = expected[name]
                wrong.append((pool.logits(["games and files"]) - logits).abs().max().item())
                wrong.append(pool.generate(["games"], max_new_tokens=4)[0].tokens != tokens)
                wrong.append(pool.generate(["games"], ["a"], max_new_tokens=4)[0].tokens != expected["a"][1])
                assert pool.current == name
        except Exception as error:
            errors.append(error)

    def load():
        for number in range(6):
            pool.load(f"more{number}", stock)
            pool.unload(f"more{number}")

    jobs = [(ask, (name,)) for name in (None, "a", "b", "a")] + [(load, ())]
    threads = [threading.Thread(target=job, args=arguments) for job, arguments in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(wrong) == 72 and max(wrong) < 1e-5
    assert pool.current == "b", "this thread selected it last"


def test_adapters_that_cannot_share_a_batch_run_in_separate_batches(tiny_base, stock, tmp_path, make_stock):
    adapter = make_stock(tiny_base, tmp_path / "whole", seed=5, modules_to_save=["lm_head"])
    pool = open_pool(tiny_base)
    pool.load("a", stock)
    pool.load("w", adapter)
    streamed: dict[int, str] = {}
    mixed = pool.generate(
        PROMPTS,
        ["w", "a", None],
        max_new_tokens=6,
        stream=lambda i, piece: streamed.update({i: streamed.get(i, "") + piece}),
    )
    for prompt, name, answer in zip(PROMPTS, ["w", "a", None], mixed, strict=True):
        assert pool.generate([prompt], [name], max_new_tokens=6)[0].tokens == answer.tokens
    assert streamed == {i: answer.text for i, answer in enumerate(mixed) if answer.text}


def test_prompts_are_texts_messages_or_tokens(tiny_base):
    pool = open_pool(tiny_base)
    ids = pool.tokenizer("The quick")["input_ids"]
    by_text, by_ids = pool.generate(["The quick", ids], max_new_tokens=5)
    assert by_text.tokens == by_ids.tokens
    messages = [{"role": "user", "content": "The quick"}]
    rendered = pool.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    by_chat, by_ids = pool.generate([messages, rendered], max_new_tokens=5)
    assert by_chat.tokens == by_ids.tokens
    assert pool.generate([]) == []


def test_messages_are_rendered_as_in_the_adapters_run(tiny_base, tmp_path, make_saved):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tail }}"
    saved = make_saved(tiny_base, tmp_path / "own", chat=ChatRecord(template=template, options={"tail": "!"}))
    pool = open_pool(tiny_base)
    notes = pool.load("own", saved).notes
    assert not any("chat template" in note for note in notes)
    messages = [{"role": "user", "content": "The quick"}]
    as_trained = pool.tokenizer("The quick!", add_special_tokens=False)["input_ids"]
    answers = pool.generate([messages, as_trained], ["own", "own"], max_new_tokens=5)
    assert answers[0].tokens == answers[1].tokens
    assert pool.logits([messages]).equal(pool.logits([pool.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True)["input_ids"]]))  # fmt: skip
    pool.use("own")
    assert pool.logits([messages]).equal(pool.logits([as_trained]))


def test_sampling_repeats_with_its_seed(tiny_base, stock):
    pool = open_pool(tiny_base)
    pool.load("a", stock)
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9}
    first = pool.generate(["The"], ["a"], seed=3, **options)
    assert first == pool.generate(["The"], ["a"], seed=3, **options)
    assert first != pool.generate(["The"], ["a"], seed=4, **options)


def test_invalid_names_and_uses_are_rejected(tiny_base, stock):
    pool = open_pool(tiny_base)
    pool.load("first", stock)
    with pytest.raises(InputError, match="already loaded"):
        pool.load("first", stock)
    for name in ("../x", "/abs", "x" * 300):
        with pytest.raises(InputError):
            pool.load(name, stock)
    with pytest.raises(InputError, match="Did you mean 'first'"):
        pool.use("frist")
    with pytest.raises(InputError, match="no adapter 'x'"):
        pool.unload("x")
    with pytest.raises(InputError, match="no adapter 'x'"):
        pool.generate(["The"], ["x"])
    with pytest.raises(InputError, match="1 prompts but 2 adapters"):
        pool.generate(["The"], [None, "first"])
    assert pool.names == ["first"]


def altered(folder: Path, to: Path, change) -> Path:
    """Copy a stock adapter and change its tensors in place."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "adapter_model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, to / "adapter_model.safetensors")
    return to


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({KEY.replace("q_proj", "q_porj"): t.pop(KEY)}), "q_porj.*nearest.*q_proj"),
        (lambda t: t.pop(KEY), "missing"),
        (lambda t: t.update({"base_model.model.extra": torch.zeros(1)}), "extra' not expected"),
        (lambda t: t.update({KEY: t[KEY][:2]}), r"\[2, 64\].*\[4, 64\]"),
        (lambda t: t.update({KEY: t[KEY].T}), r"\[64, 4\]"),
        (lambda t: t[KEY].fill_(float("nan")), "NaN"),
    ],
    ids=["renamed", "missing", "extra", "rank", "transposed", "nan"],
)
@pytest.mark.parametrize("loaded_before", [False, True])
def test_a_corrupt_adapter_leaves_the_model_unchanged(
    tiny_base, stock, other, tmp_path, change, message, loaded_before
):
    pool = open_pool(tiny_base)
    if loaded_before:
        pool.load("good", other)
        pool.use("good")
    before = [(path, id(module)) for path, module in pool.model.named_modules()]
    logits = pool.logits(PROMPTS)
    bad = altered(stock, tmp_path / "bad", change)
    kind = CorruptError if message == "NaN" else InputError  # it records no base, so it may belong to another one
    with pytest.raises(kind, match=message) as error:
        pool.load("bad", bad)
    assert str(bad) in str(error.value)
    assert [(path, id(module)) for path, module in pool.model.named_modules()] == before
    assert pool.logits(PROMPTS).equal(logits)
    pool.load("bad", stock)  # the name is free, and a valid adapter still loads
    pool.use("bad")
    torch.testing.assert_close(pool.logits(PROMPTS), stock_logits(tiny_base, stock), atol=1e-5, rtol=0)


def test_a_target_that_the_base_does_not_have_is_rejected(tiny_base, stock, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(stock, bad)
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["query_key_value"]}))
    pool = open_pool(tiny_base)
    with pytest.raises((CorruptError, InputError), match="query_key_value"):
        pool.load("bad", bad)


def test_another_base_is_rejected_before_anything_is_attached(tiny_bases, saved):
    pool = open_pool(tiny_bases("stranger", seed=7))
    with pytest.raises(InputError, match="was trained on the base"):
        pool.load("a", saved)
    assert pool.load("a", saved, allow_other_base=True).notes[0].endswith("allowed by --allow-other-base.")


def test_differences_from_training_are_noted(tiny_base, saved):
    pool = open_pool(tiny_base, "nf4")
    assert "trained with base quantization none and is used with nf4" in pool.load("a", saved).notes[0]


SHIFT = """
    import torch

    class Shift(Strategy):
        'A third-party method: adds a vector to the logits with a hook.'

        @hookimpl
        def attach_adapter(self, model, config, tensors, name):
            vars(model).setdefault("_shift", {})[name] = tensors["shift"]

        @hookimpl
        def use_adapters(self, model, names):
            if handle := vars(model).pop("_shift_handle", None):
                handle.remove()
            if names:
                shifts = vars(model)["_shift"]
                rows = torch.stack([shifts[name] if name else torch.zeros(300) for name in names])

                def add(module, args, output):
                    output.logits = output.logits + rows[:, None]

                vars(model)["_shift_handle"] = model.register_forward_hook(add)

        @hookimpl
        def detach_adapter(self, model, name):
            del vars(model)["_shift"][name]

    class Broken(Strategy):
        'Fails halfway.'

        @hookimpl
        def attach_adapter(self, model, config, tensors, name):
            model.model.norm = torch.nn.Identity()
            model.lm_head.register_forward_hook(lambda *args: None)
            model.lm_head.forward = None
            raise KeyError("half way")

    class Nothing(Strategy):
        'Owns no adapters.'
"""


@pytest.fixture
def shift(tmp_path, distribution) -> Path:
    """An adapter of a third-party type, whose strategy is installed for the test."""
    distribution("budwood-shift", SHIFT, {"shift": "Shift", "broken": "Broken", "nothing": "Nothing"})
    folder = tmp_path / "shift"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "SHIFT"}))
    save_file({"shift": torch.linspace(0, 50, 300)}, folder / "adapter_model.safetensors")
    return folder


def test_the_pool_holds_adapters_of_several_types_and_third_parties(tiny_base, stock, shift):
    pool = open_pool(tiny_base)
    pool.load("lora", stock)
    pool.load("shift", shift)
    without = pool.logits(PROMPTS)
    pool.use("shift")
    assert pool.logits(PROMPTS).equal(without + torch.linspace(0, 50, 300))
    pool.use("lora")
    torch.testing.assert_close(pool.logits(PROMPTS), stock_logits(tiny_base, stock), atol=1e-5, rtol=0)
    mixed = pool.generate([PROMPTS[0]] * 3, ["shift", None, "lora"], max_new_tokens=4)
    for name, answer in zip(["shift", None, "lora"], mixed, strict=True):
        assert pool.generate([PROMPTS[0]], [name], max_new_tokens=4)[0].tokens == answer.tokens
    pool.unload("lora")
    pool.unload("shift")
    assert pool.logits(PROMPTS).equal(without)


def test_an_owner_that_fails_halfway_is_named_and_leaves_the_model_unchanged(tiny_base, shift):
    pool = open_pool(tiny_base)
    before = pool.logits(PROMPTS)
    (shift / "adapter_config.json").write_text(json.dumps({"peft_type": "BROKEN"}))
    with pytest.raises(ResourceError, match=r"strategy 'broken' .budwood-shift 1.0., hook attach_adapter: KeyError"):
        pool.load("a", shift)
    assert pool.logits(PROMPTS).equal(before)
    assert pool.names == []


def test_a_type_whose_strategy_owns_no_adapters_is_rejected(tiny_base, shift):
    (shift / "adapter_config.json").write_text(json.dumps({"peft_type": "NOTHING"}))
    with pytest.raises(InputError, match="'nothing' of budwood-shift 1.0 attaches no adapters"):
        open_pool(tiny_base).load("a", shift)


def test_a_type_that_cannot_be_merged_is_rejected(tiny_base, shift):
    pool = open_pool(tiny_base)
    pool.load("a", shift)
    with pytest.raises(InputError, match="cannot merge"):
        pool.merge("a")


def test_only_a_single_adapter_on_an_unquantised_base_can_be_merged(tiny_base, stock, other):
    pool = open_pool(tiny_base)
    pool.load("a", stock)
    pool.load("b", other)
    with pytest.raises(InputError, match="other adapters are loaded: unload them"):
        pool.merge("a")
    quantised = open_pool(tiny_base, "nf4")
    quantised.load("a", stock)
    with pytest.raises(InputError, match="unquantised"):
        quantised.merge("a")


LABELS = ["games", "libs", "net"]


@pytest.fixture
def classifier(tiny_base, tmp_path) -> Path:
    """A classification adapter from stock PEFT, with labels."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=3)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "stock")

    def write(folder: Path) -> None:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(tmp_path / "stock" / name, folder / name)

    base = load_base(tiny_base, "none", "AutoModelForCausalLM", torch.float32)
    arguments = {
        "adapter_type": "lora",
        "distribution": "budwood 0.1.0",
        "base": base,
        "task": "sequence-classification",
    }
    write_adapter(tmp_path / "classifier", write, **arguments, labels=LABELS, tokenizer=base.tokenizer)
    return tmp_path / "classifier"


def test_a_classifier_gives_its_labels(tiny_base, classifier):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    pool = AdapterPool(tiny_base, task="sequence-classification", labels=LABELS, precision="fp32", device="cpu")
    assert pool.load("a", classifier).notes == []
    pool.use("a")
    texts = ["a small library", "x" * 2000]
    result = pool.classify(texts)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=3)
    model = PeftModel.from_pretrained(model, classifier).eval()
    for text, one in zip(texts, result, strict=True):
        with torch.no_grad():
            ids = pool.tokenizer(text, return_tensors="pt", truncation=True)["input_ids"]
            expected = model(ids).logits.softmax(-1)[0]
        assert list(one.probabilities) == LABELS
        torch.testing.assert_close(torch.tensor(list(one.probabilities.values())), expected, atol=1e-5, rtol=0)
        assert one.label == LABELS[int(expected.argmax())]


def test_task_and_labels_must_match_the_pool(tiny_base, classifier, stock):
    with pytest.raises(InputError, match="task sequence-classification, but the pool's task is causal-lm"):
        open_pool(tiny_base).load("a", classifier)
    pool = AdapterPool(tiny_base, task="sequence-classification", labels=["a", "b"], precision="fp32", device="cpu")
    with pytest.raises(InputError, match="has 3 labels, but the pool was opened with 2"):
        pool.load("a", classifier)
    with pytest.raises(InputError, match="generates no text"):
        pool.generate(["The"])
    with pytest.raises(InputError, match="open it with task="):
        open_pool(tiny_base).classify(["The"])


def test_plain_text_to_an_adapter_that_was_trained_on_messages_is_warned_of_once(
    tiny_base, tmp_path, make_saved, caplog
):
    pool = open_pool(tiny_base)
    for name, on_messages in (("chat", True), ("plain", False), ("unknown", None)):
        pool.load(name, make_saved(tiny_base, tmp_path / name, on_messages=on_messages))
    pool.generate(["hello"] * 4, [None, "plain", "unknown", "chat"], max_new_tokens=1)
    pool.generate(["hello", [{"role": "user", "content": "hello"}]], ["chat", "chat"], max_new_tokens=1)
    assert [record.getMessage() for record in caplog.records if record.name == "budwood.pool"] == [
        "adapter 'chat' was trained on messages, but prompt 4 is plain text: pass [{'role': 'user', 'content': …}]"
    ]

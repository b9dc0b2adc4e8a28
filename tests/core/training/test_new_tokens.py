"""`base.resize_embeddings`: tokens that only the tokenizer has get embeddings, trained and saved as in PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, GPT2Config, PhiConfig

from budwood import AdapterPool, InputError
from budwood.adapters.export import export
from budwood.contract.strategy import RUN_ADAPTER
from budwood.contract.types import Run
from budwood.planning.composition import plan
from budwood.recipe.schema import Recipe
from budwood.serving.merge import merge
from budwood.serving.verify import verify
from budwood.training import loop
from budwood.training.evaluate import evaluate_adapter
from budwood.training.loop import tune

Make = Callable[..., Recipe]
NEW = ["<|call|>", "<|result|>"]
ROWS = [{"prompt": f"{NEW[i % 2]} model {i}:", "completion": f" data {NEW[(i // 2) % 2]}"} for i in range(12)]
ADALORA = {"adalora": {"initial_rank": 4, "target_rank": 2, "interval": 1}}


@pytest.fixture
def grown(tiny_bases: Any, tmp_path: Path) -> Callable[..., Path]:
    """Function -> a tiny base whose tokenizer has two more tokens than the base has embeddings."""

    def make(**changes: Any) -> Path:
        path = tmp_path / "grown"
        if not path.exists():
            shutil.copytree(tiny_bases("grown", **changes), path)
            tokenizer = AutoTokenizer.from_pretrained(path)
            count = json.loads((path / "config.json").read_text())["vocab_size"]
            tokenizer.add_tokens([f"<|filler{i}|>" for i in range(count - len(tokenizer))])
            tokenizer.add_tokens(NEW)
            assert len(tokenizer) == count + 2
            tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture
def recipe_of(make_recipe: Make, write: Any) -> Callable[..., Recipe]:
    """Function (base, output, …) -> a recipe whose rows use the new tokens."""

    def make(path: Path, output: str = "run", **changes: Any) -> Recipe:
        data = {name: str(write(ROWS, f"tokens-{name}.jsonl")) for name in ("train", "eval")}
        own = {"model": str(path), "resize_embeddings": True, **changes.pop("base", {})}
        return make_recipe(output, base=own, data={**data, **changes.pop("data", {})}, **changes)

    return make


def resized(base: Path, rows: int = 302) -> Any:
    """Return the base resized by transformers; the values of the new rows must not matter."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    torch.manual_seed(9)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@torch.no_grad()
def stock(base: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    return PeftModel.from_pretrained(resized(base), adapter).eval()(ids).logits


@torch.no_grad()
def ours(base: Path, adapter: Path, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    pool = AdapterPool(base, precision="fp32", device="cpu", **options)
    pool.load("a", adapter, allow_other_base=True)
    pool.use("a")
    return pool.model(ids).logits


IDS = torch.tensor([[1, 300, 40, 301, 50, 300]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("strategy", [{"lora": {"rank": 4}}, ADALORA], ids=["lora", "adalora"])
def test_new_rows_train_alone_and_stock_peft_opens_them(grown, recipe_of, tmp_path, strategy, tied, said):
    base = grown(tie_word_embeddings=tied)
    run = tune(recipe_of(base, strategies=[strategy]))
    assert "embeddings resized from 300 to 302; each new row starts as the mean of the old rows" in " ".join(said)
    assert any("2 rows of model.embed_tokens" in line for line in said)
    adapter, old = run.directory / "adapter", load_file(base / "model.safetensors")
    embedding, head = run.model.get_input_embeddings(), run.model.get_output_embeddings()
    for module, key in ((embedding, "model.embed_tokens.weight"), (head, "lm_head.weight")):
        first = old.get(key, old["model.embed_tokens.weight"])
        assert torch.equal(module.base_layer.weight[:300], first)
        mean = first.double().mean(0).float()
        assert torch.equal(module.base_layer.weight[300:], mean.expand(2, -1))
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.{}.token_adapter.trainable_tokens_delta"
    assert (name.format("lm_head") in tensors) is not tied
    rows = tensors[name.format("model.embed_tokens")]
    assert rows.shape == (2, 64)
    assert ((rows - embedding.base_layer.weight[300:]).abs().max(1).values > 1e-3).all()

    expected = stock(base, adapter, IDS)
    assert expected.shape[-1] == 302
    torch.testing.assert_close(ours(base, adapter, IDS), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours(base, adapter, IDS, embeddings=302), expected, atol=1e-4, rtol=1e-4)
    assert verify(adapter).exact
    merge(adapter, tmp_path / "merged", dtype="fp32")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (302, tied)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    if tied:
        assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    evaluation = evaluate_adapter(adapter, tmp_path / "tokens-eval.jsonl", quiet=True)
    assert evaluation.adapter["eval_loss"] == run.metrics["eval_loss"] < run.before["eval_loss"]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_bases(grown, recipe_of, quantization):
    run = tune(recipe_of(grown(), base={"quantization": quantization}), quiet=True)
    assert verify(run.directory / "adapter").exact
    assert run.metrics["eval_loss"] < run.before["eval_loss"]


@pytest.mark.parametrize(
    "others",
    [
        [{"adversarial": {"method": "fgm", "epsilon": 0.1}}],
        [{"distillation": {"teacher": "base"}}],
    ],
    ids=["adversarial", "distillation"],
)
def test_with_other_strategies(grown, recipe_of, others):
    run = tune(recipe_of(grown(), strategies=[{"lora": {"rank": 4}}, *others]), quiet=True)
    assert verify(run.directory / "adapter").exact


def test_the_gradient_of_the_rows_is_that_of_the_whole_tables(grown, recipe_of):
    """The reference trains the whole tables with transformers' loss."""
    run = tune(recipe_of(grown(), train={"steps": 1}), quiet=True)
    ids = torch.tensor([[1, 300, 40, 301, 50, 300]])
    rows = {k: p for g in run.groups if g.name == "tokens" for k, p in g.parameters.items()}
    assert len(rows) == 2
    for p in rows.values():
        p.grad = None
    run.model(input_ids=ids, labels=ids).loss.backward()
    model = run.model
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    found = [end.rows[RUN_ADAPTER].grad for end in ends]
    wholes = []
    for end in ends:
        own = end.rows[RUN_ADAPTER].detach()
        end.active = None
        weight = torch.nn.Parameter(torch.cat([end.base_layer.weight[:300], own]).detach())
        end.base_layer.weight = weight
        wholes.append(weight)
    model(input_ids=ids, labels=ids).loss.backward()
    for gradient, whole in zip(found, wholes, strict=True):
        torch.testing.assert_close(gradient, whole.grad[300:], atol=1e-6, rtol=1e-4)


def test_a_resumed_run_gives_the_same_bytes(grown, recipe_of, monkeypatch):
    base = grown()
    whole = tune(recipe_of(base, "whole", train={"save_every": 1}), quiet=True)
    original = loop.sum_gradients

    def interrupted(run: Run) -> None:
        if run.step == 2:
            raise KeyError  # simulates a killed process
        original(run)

    half = recipe_of(base, "half", train={"save_every": 1})
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(loop, "sum_gradients", interrupted)
        tune(half, quiet=True)
    parts = tune(half, quiet=True, resume=True)
    files = [run.directory / "adapter" / "adapter_model.safetensors" for run in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_nothing_to_resize_is_reported(make_recipe, said):
    run = tune(make_recipe(base={"resize_embeddings": True}))
    assert "resize_embeddings: nothing to do: the 300 embeddings cover every token of the tokenizer" in " ".join(said)
    assert not run.base.added
    config = json.loads((run.directory / "adapter" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] is None


def test_rows_that_exist_are_not_new(grown, recipe_of):
    """The embedding table is padded beyond the vocabulary."""
    base = grown(vocab_size=320)
    tokenizer = AutoTokenizer.from_pretrained(base)
    run = tune(recipe_of(base), quiet=True)
    assert list(run.base.added) == [320, 321] and len(tokenizer) == 322


def test_adapters_with_and_without_new_rows_share_a_base(grown, recipe_of):
    base = grown()
    own = tune(recipe_of(base), quiet=True).directory / "adapter"
    plain = recipe_of(base, "plain", base={"resize_embeddings": False}, data={"eval": None})
    plain = plain.model_copy(update={"data": plain.data.model_copy(update={"train": plain_rows(own)})})
    other = tune(plain, quiet=True).directory / "adapter"
    alone = AdapterPool(base, precision="fp32", device="cpu")
    text = "model data:"
    expected = alone.logits([text])
    pool = AdapterPool(base, precision="fp32", device="cpu")
    pool.load("new", own)
    pool.load("plain", other)
    assert torch.equal(pool.logits([text]), expected)
    prompts, names = [text, f"{NEW[0]} model", text], ["plain", "new", None]
    mixed = pool.generate(prompts, names, max_new_tokens=5)
    for prompt, name, answer in zip(prompts, names, mixed, strict=True):
        (single,) = pool.generate([prompt], [name], max_new_tokens=5)
        assert single.tokens == answer.tokens
    pool.use("new")
    assert pool.logits([prompts[1]]).shape == (1, 302)
    pool.use("plain")
    assert pool.logits([text]).shape == (1, 300)
    with pytest.raises(InputError, match=r"prompt 1 uses token 300 '<\|call\|>', but base"):
        pool.generate([prompts[1]], ["plain"])
    pool.unload("plain")
    pool.unload("new")
    assert torch.equal(pool.logits([text]), expected)


def plain_rows(adapter: Path) -> Path:
    path = adapter.parent.parent / "plain.jsonl"
    path.write_text('{"prompt": "model data:", "completion": " tokens"}\n' * 8)
    return path


def small(path: Path, config: Any, auto: Any = AutoModelForCausalLM) -> Path:
    """Replace the base's model with a random one of this configuration, with 300 embeddings."""
    torch.manual_seed(0)
    for file in path.glob("*.safetensors"):
        file.unlink()
    auto.from_config(config).save_pretrained(path)
    return path


SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OTHER = [
    Gemma3TextConfig(  # scales its embeddings, which are tied
        vocab_size=300, hidden_size=32, intermediate_size=32, num_key_value_heads=1, head_dim=16, **SMALL
    ),
    GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=128, pad_token_id=0),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", OTHER, ids=lambda config: config.model_type)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_architectures(grown, recipe_of, config, precision):
    base = small(grown(), config)
    run = tune(recipe_of(base, train={"precision": precision, "gradient_checkpointing": True}), quiet=True)
    adapter = run.directory / "adapter"
    assert verify(adapter).exact
    torch.testing.assert_close(ours(base, adapter, IDS), stock(base, adapter, IDS), atol=1e-4, rtol=1e-4)


def test_classification_has_no_rows_of_a_head(grown, recipe_of, write):
    rows = [{"text": f"{NEW[i % 2]} model {i}", "label": "ab"[i % 2]} for i in range(12)]
    data = str(write(rows, "classes.jsonl"))
    recipe = recipe_of(grown(), base={"task": "sequence-classification"}, data={"train": data, "eval": data})
    run = tune(recipe, quiet=True)
    assert verify(run.directory / "adapter").exact
    tensors = load_file(run.directory / "adapter" / "adapter_model.safetensors")
    assert [key for key in tensors if "token_adapter" in key] == [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]


def test_adalora_with_new_rows_is_exported_as_lora(grown, recipe_of, tmp_path):
    base = grown()
    adapter = tune(recipe_of(base, strategies=[ADALORA]), quiet=True).directory / "adapter"
    exported = export(adapter, tmp_path / "exported", "lora")
    torch.testing.assert_close(ours(base, exported, IDS), ours(base, adapter, IDS), atol=1e-5, rtol=1e-5)


def test_modules_that_train_whole_take_the_new_rows_along(grown, recipe_of):
    base = grown()
    whole = [{"lora": {"rank": 4, "modules_to_save": ["embed_tokens"]}}]
    run = tune(recipe_of(base, strategies=whole), quiet=True)
    adapter = run.directory / "adapter"
    assert verify(adapter).exact
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert tensors["base_model.model.model.embed_tokens.weight"].shape == (302, 64)
    assert "base_model.model.lm_head.token_adapter.trainable_tokens_delta" in tensors
    torch.testing.assert_close(ours(base, adapter, IDS), stock(base, adapter, IDS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "strategies", "message"),
    [
        ({"tie_word_embeddings": True}, [{"lora": {"modules_to_save": ["embed_tokens"]}}], "is tied to 'lm_head'"),
        ({}, [{"lora": {"targets": ["q_proj", "lm_head"]}}], "'lm_head' is adapted or replaced while some of its rows"),
    ],
)
def test_what_cannot_be_trained_is_refused(grown, recipe_of, changes, strategies, message):
    with pytest.raises(InputError, match=message):
        tune(recipe_of(grown(**changes), strategies=strategies), quiet=True)


def test_a_head_with_a_bias_is_refused_before_the_run(grown, recipe_of, monkeypatch):
    base = small(grown(), PhiConfig(vocab_size=300, hidden_size=32, intermediate_size=32, **SMALL))
    monkeypatch.setattr("budwood.training.setup.load_base", None)
    with pytest.raises(InputError, match=r"resize_embeddings: base '.*grown': its head has a bias, which PEFT leaves"):
        tune(recipe_of(base), quiet=True)
    assert "its head has a bias" in plan(recipe_of(base)).problems[0]


def test_a_strategy_that_does_not_train_the_new_rows_is_refused(grown, recipe_of, monkeypatch):
    monkeypatch.setattr("budwood_lora.adapter.new_tokens", lambda *_: {})
    with pytest.raises(InputError, match="no strategy trains the 2 new embeddings: add an adapter that does"):
        tune(recipe_of(grown()), quiet=True)


def test_the_plan_says_what_is_resized(grown, recipe_of):
    assert (
        "embeddings resized from 300 to 302; each new row starts as the mean of the old rows"
        in plan(recipe_of(grown())).notes
    )


def test_a_teacher_with_fewer_embeddings_is_refused(grown, recipe_of, tiny_bases, tmp_path):
    base = grown()
    teacher = tmp_path / "teacher"
    shutil.copytree(base, teacher)
    for file in tiny_bases("other", seed=5).glob("*.safetensors"):
        shutil.copy(file, teacher)
    recipe = recipe_of(base, strategies=[{"lora": {}}, {"distillation": {"teacher": str(teacher)}}])
    with pytest.raises(
        InputError, match=r"teacher' has 300 embeddings, but the base has 302 tokens: resize the teacher"
    ):
        tune(recipe, quiet=True)


def test_an_average_holds_the_new_rows(grown, recipe_of):
    run = tune(recipe_of(grown(), strategies=[{"lora": {"rank": 4}}, {"ema": {}}]), quiet=True)
    assert verify(run.directory / "adapter").exact


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_steps_gradient_is_that_of_the_whole_loss(grown, recipe_of, monkeypatch, tied):
    """The step runs the head in chunks of rows; the reference is one plain forward per example."""
    compared = []
    original = loop.sum_gradients

    def compare(run: Run) -> None:
        original(run)
        rows = [p for group in run.groups if group.name == "tokens" for p in group.parameters.values()]
        total, losses = 0, []
        for example in run.examples:
            ids = torch.from_numpy(example.inputs["input_ids"].astype("int64"))
            logits = run.model(input_ids=ids[None]).logits[0][torch.from_numpy(example.label_positions)]
            labels = torch.from_numpy(example.labels).long()
            losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            total += len(labels)
        expected = torch.autograd.grad(sum(losses) / total, rows)
        for p, gradient in zip(rows, expected, strict=True):
            assert gradient.abs().max() > 1e-4
            torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-3)
            compared.append(p)

    monkeypatch.setattr(loop, "sum_gradients", compare)
    tune(recipe_of(grown(tie_word_embeddings=tied), train={"steps": 1, "batch_examples": len(ROWS)}), quiet=True)
    assert len(compared) == (1 if tied else 2)

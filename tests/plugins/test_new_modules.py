"""Classifiers on checkpoints without a classification head or a pooler: new modules are trained and saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.conftest import make_tokenizer

from budwood import AdapterPool, CorruptError, InputError, SequenceClassification, load_base
from budwood.recipe.schema import Recipe
from budwood.serving.merge import merge
from budwood.training.loop import tune

LABELS = ["a", "b", "c"]
IDS = torch.tensor([[1, 40, 50, 60, 70, 99, 7]])
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "bert": ("BertForMaskedLM", SIZES, {"bert.pooler.dense", "classifier"}),
    "albert": ("AlbertForMaskedLM", SIZES | {"embedding_size": 16}, {"albert.pooler", "classifier"}),
    "roberta": ("RobertaForMaskedLM", SIZES, {"classifier"}),
    "deberta": ("DebertaV2ForMaskedLM", SIZES | {"relative_attention": True}, {"pooler.dense", "classifier"}),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
        {"pre_classifier", "classifier"},
    ),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 2}, {"score"}),
}
"""Class and config of a checkpoint, and the modules of a classifier that it lacks."""


def make(folder: Path, name: str, sizes: dict[str, Any], **changes: Any) -> Path:
    cls = getattr(transformers, name)
    tokens = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cls(cls.config_class(**tokens, **sizes, **changes)).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def train(base: Path, folder: Path, strategy: dict[str, Any] | None = None, quantization: str = "none") -> Any:
    rows = [json.dumps({"text": f"files {i % 7}", "label": LABELS[i % 3]}) for i in range(24)]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    recipe = {
        "base": {"model": str(base), "quantization": quantization, "task": "sequence-classification"},
        "data": {"train": str(folder / "train.jsonl")},
        "strategies": [strategy or {"lora": {"rank": 2}}],
        "train": {"steps": 3, "batch_examples": 8, "learning_rate": 1e-2, "precision": "fp32", "warmup": 0},
        "output": str(folder / "run"),
    }
    return tune(Recipe.from_dict(recipe), quiet=True)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def open_pool(base: Path, quantization: str = "none") -> AdapterPool:
    return AdapterPool(
        base, quantization, precision="fp32", device="cpu", task="sequence-classification", labels=LABELS
    )


def saved_whole(adapter: Path) -> set[str]:
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    whole = {key.removeprefix("base_model.model.") for key in tensors if ".lora_" not in key}
    assert {name for name in config["modules_to_save"] if any(k.startswith(f"{name}.") for k in whole)} == {
        *config["modules_to_save"]
    }
    return set(config["modules_to_save"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BASES)
def test_what_is_new_trains_and_is_saved_here_and_in_stock_peft(tmp_path: Path, name: str) -> None:
    cls, sizes, new = BASES[name]
    base = make(tmp_path / "base", cls, sizes)
    run = train(base, tmp_path)
    adapter = tmp_path / "run" / "adapter"
    assert saved_whole(adapter) == new
    expected = logits(run.model)
    pool = open_pool(base)
    pool.load("a", adapter)
    pool.use("a")
    torch.testing.assert_close(logits(pool.model), expected, atol=1e-5, rtol=1e-5)
    torch.manual_seed(99)  # stock transformers initialises the head differently than the run did
    auto = transformers.AutoModelForSequenceClassification
    peer = PeftModel.from_pretrained(auto.from_pretrained(base, num_labels=3, dtype=torch.float32), adapter)
    torch.testing.assert_close(logits(peer), expected, atol=1e-5, rtol=1e-5)
    merge(adapter, tmp_path / "merged", dtype="fp32")
    torch.testing.assert_close(logits(auto.from_pretrained(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_pooler_of_a_quantised_base_and_another_adapter_type(tmp_path: Path) -> None:
    cls, sizes, new = BASES["bert"]
    base = make(tmp_path / "base", cls, sizes)
    run = train(base, tmp_path, {"adalora": {"initial_rank": 2, "target_rank": 1, "interval": 1}}, "nf4")
    assert type(run.model.get_submodule("bert.pooler.dense").original_module) is torch.nn.Linear
    assert saved_whole(tmp_path / "run" / "adapter") == new
    pool = open_pool(base, "nf4")
    pool.load("a", tmp_path / "run" / "adapter")
    pool.use("a")
    torch.testing.assert_close(logits(pool.model), logits(run.model), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_a_classifier_of_stock_peft_is_merged_as_one(tmp_path: Path, name: str) -> None:
    cls, sizes, new = BASES[name]
    base = make(tmp_path / "base", cls, sizes)
    auto = transformers.AutoModelForSequenceClassification
    whole = [*(new - {"classifier", "score"})] or None
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=whole)
    peer = get_peft_model(auto.from_pretrained(base, num_labels=4, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    peer.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", base=str(base), dtype="fp32")
    merged = auto.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 4
    torch.testing.assert_close(logits(merged), logits(peer), atol=1e-4, rtol=1e-4)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) | {"task_type": "QUESTION_ANS"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(written))
    with pytest.raises(InputError, match="task_type QUESTION_ANS is not supported"):
        merge(tmp_path / "adapter", tmp_path / "other", base=str(base))


def test_a_head_for_other_classes_is_new_and_one_that_is_there_trains_on(tmp_path: Path) -> None:
    for count, new in ((5, {"classifier.weight", "classifier.bias"}), (3, set())):
        folder = tmp_path / str(count)
        base = make(folder, "BertForSequenceClassification", SIZES, num_labels=count)
        run = train(base, folder)
        assert set(run.base.new) == new
        assert saved_whole(folder / "run" / "adapter") == {"classifier"}


@pytest.mark.parametrize(
    ("name", "sizes", "heads"),
    [
        (
            "T5ForConditionalGeneration",
            {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
            ["classification_head"],
        ),
        (
            "XLNetLMHeadModel",
            {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
            ["sequence_summary", "logits_proj"],
        ),
    ],
)
def test_heads_of_other_names_are_found(tmp_path: Path, name: str, sizes: dict[str, Any], heads: list[str]) -> None:
    base = load_base(
        make(tmp_path, name, sizes), "none", "AutoModelForSequenceClassification", torch.float32,
        model_kwargs={"num_labels": 3},
    )  # fmt: skip
    assert SequenceClassification().head_modules(base.model) == heads
    assert {key.split(".")[0] for key in base.new} == set(heads)


def test_an_adapter_that_lacks_what_the_base_lacks_is_refused(tmp_path: Path) -> None:
    cls, sizes, _ = BASES["deberta"]
    base = make(tmp_path / "base", cls, sizes)
    train(base, tmp_path)
    adapter = tmp_path / "run" / "adapter"
    for file in ("budwood.json", "golden.safetensors"):
        (adapter / file).unlink()  # as an adapter of stock PEFT
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"modules_to_save": ["classifier"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "pooler" not in k}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"holds no 'pooler.dense.bias', nor does the base's checkpoint"):
        open_pool(base).load("a", adapter)


def test_a_strategy_that_leaves_a_new_module_random_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, sizes, _ = BASES["deberta"]
    base = make(tmp_path / "base", cls, sizes)
    monkeypatch.setattr("budwood_lora.adapter.whole_modules", lambda model, names, task, base: ["classifier"])
    with pytest.raises(InputError, match=r"'pooler.dense' is not in the checkpoint, and no strategy trains it"):
        train(base, tmp_path)


def test_a_body_with_a_weight_missing_stays_corrupt(tmp_path: Path) -> None:
    cls, sizes, _ = BASES["bert"]
    base = make(tmp_path / "base", cls, sizes)
    tensors = load_file(base / "model.safetensors")
    del tensors["bert.encoder.layer.0.output.dense.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptError, match="it lacks 1 weight"):
        train(base, tmp_path)

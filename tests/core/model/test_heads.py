"""The head is the model's own forward, and the body includes towers of other modalities."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import make_tokenizer
from torch import nn

from budwood.model.heads import body_of, own_head
from budwood.training.loop import tune

TEXT = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IMAGE = 299
"""The token that stands for one patch of an image."""
PLUGIN = '''
import numpy as np
import torch
from budwood import DataFormat, Encoded, Example
from budwood.model.text_tasks import CausalLM


class Pictures(DataFormat):
    """A grey level, and the word for it."""

    api = 2
    name = "pictures"
    columns = ("grey", "word")
    tasks = ("captions",)

    def item(self, row, where):
        return row


class Captions(CausalLM):
    """A caption of an image of 4 patches."""

    api = 2
    name = "captions"
    auto_class = "AutoModelForImageTextToText"

    def encode(self, items, where, encoder):
        encoded = []
        for item in items:
            words = encoder.tokenizer(item["word"], add_special_tokens=False)["input_ids"] + [2]
            ids = np.array([299] * 4 + words, dtype=np.int32)
            pixels = np.full((1, 3, 8, 8), item["grey"], dtype=np.float32)
            at = np.arange(3, len(ids) - 1)
            example = Example({"input_ids": ids, "pixel_values": pixels}, at, ids[at + 1], np.ones(len(at), np.float32))
            encoded.append(Encoded([example]))
        return encoded
'''


def llava() -> nn.Module:
    """A random Llava of two text layers and one vision layer; an image of 8 × 8 has four patches."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE,
        vision_feature_layer=-1, image_seq_length=4, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
        model.lm_head.weight.data.mul_(5)  # the head is frozen: with small rows it could not be confident
        return model


def test_the_body_of_a_decoder_with_a_vision_tower_includes_the_tower() -> None:
    model = llava()
    ids, pixels = torch.tensor([[IMAGE] * 4 + [5, 6, 7]]), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        hidden = body_of(model)(input_ids=ids, pixel_values=pixels).last_hidden_state[0]
        other = body_of(model)(input_ids=ids, pixel_values=-pixels).last_hidden_state[0]
        torch.testing.assert_close(own_head(model, hidden), model(input_ids=ids, pixel_values=pixels).logits[0])
    assert (hidden - other).abs().max() > 1e-3, "the image reaches the head"


@pytest.fixture
def captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe for a third-party task on images, whose package is on the path."""
    info = tmp_path / "site" / "captions_plugin-0.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site" / "captions_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: captions_plugin\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[budwood.formats]\npictures = captions_plugin:Pictures\n[budwood.tasks]\ncaptions = captions_plugin:Captions\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    base = tmp_path / "base"
    llava().save_pretrained(base)
    make_tokenizer(base)
    rows = [json.dumps({"grey": 1.0 if i % 2 else -1.0, "word": "files" if i % 2 else "games"}) for i in range(32)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows) + "\n")
    return {
        "base": {"model": str(base), "quantization": "none", "task": "captions"},
        "data": {"train": str(tmp_path / "data.jsonl"), "eval": str(tmp_path / "data.jsonl")},
        "strategies": [{"lora": {"rank": 16}}],
        "train": {"epochs": 10, "batch_examples": 8, "learning_rate": 2e-2, "precision": "fp32"},
        "output": str(tmp_path / "run"),
    }


def test_a_task_on_images_trains_through_the_vision_tower(captions: dict[str, Any]) -> None:
    """Only the image tells the two captions apart, so a loss below ln 2 on the word needs the tower."""
    from budwood.recipe.schema import Recipe

    run = tune(Recipe.from_dict(captions), quiet=True)
    assert run.metrics["eval_loss"] < 0.1
    assert run.metrics["eval_token_accuracy"] == 1.0


def test_the_head_leaves_a_patched_forward_alone() -> None:
    """Libraries patch the forward of an instance; running the head must leave the patch in place."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model, rows = LlamaForCausalLM(LlamaConfig(**TEXT)).eval(), torch.randn(3, 32)
    body = model.model
    patched = body.forward = lambda *args, original=body.forward, **kwargs: original(*args, **kwargs)
    with torch.no_grad():
        torch.testing.assert_close(own_head(model, rows), model.lm_head(rows))
    assert vars(body)["forward"] is patched and model.model is body


def test_threads_share_a_model_and_each_gets_the_head_of_its_own_rows() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    wrong: list[float] = []

    def ask(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(50):
                rows = torch.randn(3, 32, generator=generator)
                ids = torch.randint(3, 299, (1, 5), generator=generator)
                hidden = body_of(model)(input_ids=ids).last_hidden_state[0]
                wrong.append(float((own_head(model, rows) - model.lm_head(rows)).abs().max()))
                wrong.append(float((own_head(model, hidden) - model(input_ids=ids).logits[0]).abs().max()))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 400 and max(wrong) < 1e-5

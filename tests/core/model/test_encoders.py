"""Encoders on packed rows: logits and gradients of each example are those of the model's own forward on it alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from budwood.contract.examples import Example
from budwood.model import text_tasks
from budwood.model.encoders import WIDTHS, width_multiple
from budwood.model.ops import attention
from budwood.model.text_tasks import SequenceClassification

attention.register()
SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", SMALL | {"max_position_embeddings": 16}),
    "roberta": ("Roberta", SMALL | {"max_position_embeddings": 20, "pad_token_id": 1}),
    "xlm-roberta": ("XLMRoberta", SMALL | {"max_position_embeddings": 20, "pad_token_id": 1}),
    "electra": ("Electra", SMALL | {"embedding_size": 8}),
    "albert": ("Albert", SMALL | {"embedding_size": 8}),
    "distilbert": ("DistilBert", {"vocab_size": 60, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}),
    "modernbert, first token": ("ModernBert", SMALL | {"classifier_pooling": "cls", "local_attention": 4}),
    "modernbert, mean": ("ModernBert", SMALL | {"classifier_pooling": "mean", "local_attention": 4}),
}
TOKENS = [[7, 8, 9, 10, 11, 12, 13], [20, 1, 21], [30], [31, 32, 33, 34, 35]]  # 1 is RoBERTa's padding


def build(family: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    known = getattr(transformers, f"{family}Config")
    config = known(**special | options, num_labels=3)
    model = getattr(transformers, f"{family}ForSequenceClassification")._from_config(config, attn_implementation="sdpa")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("width", [0, 32])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_examples_are_as_alone(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    task, model = SequenceClassification(), build(*FAMILIES[name])
    assert task.packs_rows(model)
    examples = [
        Example({"input_ids": np.array(ids)}, np.array([len(ids) - 1]), np.array([0]), np.ones(1, np.float32))
        for ids in TOKENS
    ]
    alone = [model(input_ids=torch.tensor([ids])).logits[0] for ids in TOKENS]
    torch.stack(alone).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    model.set_attn_implementation(attention.IMPLEMENTATION)
    if width:
        monkeypatch.setattr(text_tasks, "width_multiple", lambda model: width)
    batch = task.collate(examples, model, SimpleNamespace(pad_token_id=0), True)
    assert batch.width == (width or batch.segments[-1]) >= batch.segments[-1] == sum(map(len, TOKENS))
    assert batch.rows == 1 and batch.label_positions.tolist() == [0, 1, 2, 3]
    logits = task.logits(task.outputs(model, batch), batch)
    torch.testing.assert_close(logits, torch.stack(alone), rtol=1e-5, atol=1e-5)
    logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        if expected[key] is not None:
            torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=1e-4, msg=key)


def test_rows_of_an_encoder_in_16_bit_have_few_widths() -> None:
    model = build(*FAMILIES["bert"])
    assert [width_multiple(model), width_multiple(model.bfloat16()), width_multiple(model.half())] == [
        1,
        WIDTHS,
        WIDTHS,
    ]
    decoder = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL)).bfloat16()
    assert width_multiple(decoder) == 1

"""Models that change a linear's output in place, as Falcon's parallel attention does, train as in stock PEFT."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import FalconConfig, FalconForCausalLM

from budwood import Run
from budwood.model.text_tasks import CausalLM
from budwood_lora.options import LoRAOptions
from budwood_lora.strategy import LoRA

IDS = torch.tensor([list(range(5, 25))])


def falcon(new: bool) -> Any:
    sizes = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = FalconConfig(
        **sizes, multi_query=not new, new_decoder_architecture=new, num_kv_heads=2, parallel_attn=True, alibi=False,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return FalconForCausalLM(config).requires_grad_(False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("new", [False, True], ids=["7B", "40B"])
def test_falcon_has_the_gradients_of_stock_peft(tmp_path: Path, new: bool) -> None:
    model, strategy = falcon(new), LoRA(LoRAOptions(rank=4), "lora")
    section = SimpleNamespace(task="causal-lm", model="base")
    recipe: Any = SimpleNamespace(base=section)
    run = Run(recipe, tmp_path, torch.device("cpu"), torch.float32, say=lambda text: None)
    run.task = CausalLM()
    run.model = strategy.prepare_model(run=run, model=model)
    run.groups = strategy.trainable_parameters(run=run, model=model)
    with torch.no_grad():
        for parameter in run.trainable:
            parameter.requires_grad_(True).add_(torch.randn_like(parameter) * 0.1)
    strategy.export(run=run, model=model, directory=tmp_path)
    peer = PeftModel.from_pretrained(falcon(new), tmp_path, is_trainable=True)
    for each in (model.train(), peer.train()):
        each(IDS, labels=IDS, use_cache=False).loss.backward()
    theirs = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    ours = {f"base_model.model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-6, rtol=1e-4)

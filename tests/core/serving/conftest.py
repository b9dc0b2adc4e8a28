"""Adapters for the engine's tests: random ones of the tiny base, written without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture(autouse=True)
def _forked_templates(forked_templates: None) -> None:
    """Fork the processes of chat templates."""


LINEARS = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128),
}  # fmt: skip
"""Outputs and inputs of the tiny base's linears."""
PREFIX = "base_model.model."


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """Write an adapter in PEFT's layout."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def make_adapter(
    folder: Path, seed: int, rank: int = 4, names: tuple[str, ...] = tuple(LINEARS), **config: Any
) -> Path:
    """Write a random LoRA adapter; `config` adds fields, of which use_dora and modules_to_save add tensors."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(2):
        for name in names:
            outputs, inputs = LINEARS[name]
            key = f"{PREFIX}model.layers.{layer}.{name}.lora_"
            tensors[f"{key}A.weight"] = torch.randn(rank, inputs, generator=draw) / inputs**0.5
            tensors[f"{key}B.weight"] = torch.randn(outputs, rank, generator=draw) * 0.3
            if config.get("use_dora"):
                tensors[f"{key}magnitude_vector"] = 0.5 + torch.rand(outputs, generator=draw)
    if "lm_head" in config.get("modules_to_save", ()):
        tensors[f"{PREFIX}lm_head.weight"] = torch.randn(300, 64, generator=draw) * 0.2
    if ids := config.get("trainable_token_indices"):
        tensors[f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"] = torch.randn(
            len(ids), 64, generator=draw
        )
    targets = sorted({name.rpartition(".")[2] for name in names})
    known = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": targets,
    }
    return write(folder, known | config, tensors)


def make_adalora(folder: Path, seed: int, ranks: tuple[int, ...] = (1, 3, 12)) -> Path:
    """Write a random AdaLoRA adapter with different ranks of q_proj and v_proj, of which some are 0."""
    draw, tensors, pattern = torch.Generator().manual_seed(seed), {}, {}
    paths = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qv"]
    for path, rank in zip(paths, (*ranks, 0), strict=True):
        outputs, inputs = (64 if "q_proj" in path else 32), 64
        pattern[f"{path}.lora_E"] = [i < rank for i in range(12)]
        if rank:
            tensors[f"{PREFIX}{path}.lora_A"] = torch.randn(rank, inputs, generator=draw) / 8
            tensors[f"{PREFIX}{path}.lora_B"] = torch.randn(outputs, rank, generator=draw) * 0.3
            tensors[f"{PREFIX}{path}.lora_E"] = torch.randn(rank, 1, generator=draw)
    config = {
        "peft_type": "ADALORA", "task_type": "CAUSAL_LM", "init_r": 12, "target_r": 4, "lora_alpha": 32,
        "target_modules": ["q_proj", "v_proj"], "rank_pattern": pattern,
    }  # fmt: skip
    return write(folder, config, tensors)


SCALE = """
    import torch
    from budwood import LiveAdapter, LiveUpdate, InputError

    FAIL = []

    class Scale(Strategy):
        'A third-party method: multiplies outputs; its last vector is that of v_proj of the last layer.'

        @hookimpl
        def attach_adapter(self, model, config, tensors, name):
            raise AssertionError('the live table is used')

        @hookimpl
        def live_adapter(self, model, config, tensors):
            def update(path, vector):
                def row_forward(x, y, rows):
                    if FAIL:
                        raise ValueError('as told')
                    y[rows] = y[rows] * vector
                return LiveUpdate(row_forward=row_forward)
            return LiveAdapter({path: update(path, vector) for path, vector in tensors.items()})
"""


@pytest.fixture
def scale(tmp_path: Path, distribution: Callable[..., Path]) -> Path:
    """An adapter of a third party's method, which brings `row_forward`."""
    distribution("budwood-scale", SCALE, {"scale": "Scale"})
    vectors = {f"model.layers.{layer}.self_attn.v_proj": torch.linspace(-2, 3, 32) for layer in range(2)}
    return write(tmp_path / "scale", {"peft_type": "SCALE"}, vectors)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Adapters of every first-party method and kind."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "lora": make_adapter(root / "lora", 1),
        "wide": make_adapter(root / "wide", 2, rank=24, use_rslora=True, names=("self_attn.q_proj", "mlp.up_proj")),
        "twin": make_adapter(root / "twin", 3),
        "dora": make_adapter(root / "dora", 4, use_dora=True),
        "adalora": make_adalora(root / "adalora", 5),
        "head": make_adapter(root / "head", 6, modules_to_save=["lm_head"]),
        "rows": make_adapter(root / "rows", 7, trainable_token_indices=[5, 40, 99]),
    }

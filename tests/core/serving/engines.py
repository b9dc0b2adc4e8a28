"""Engines of the tiny base, what they are asked, and the logits of a row that is computed alone."""

from __future__ import annotations

from pathlib import Path

import torch

from budwood.model.base import load_base
from budwood.serving.engine import Engine

LONG = [[1, *((7 * i + 3 * j) % 290 + 5 for i in range(70 + 9 * j))] for j in range(4)]
SHORT = [[1, 40, 50, 60, 70], [1, 99, 7], [9], [1, 200, 201, 202, 203, 204, 205], [1, 30, 31], [1, 8, 9, 10]]


def open_engine(base: Path, **options) -> Engine:
    """Return an engine of an unquantised base in fp32."""
    return Engine(load_base(base, "none", "AutoModelForCausalLM", torch.float32), **options)


def load_all(engine: Engine, folders: dict[str, Path]) -> list[str | None]:
    """Load the adapters under their names; return None, for the base, and the names."""
    for name, folder in folders.items():
        engine.load(name, folder)
    return [None, *folders]


def alone(engine: Engine, name: str | None, tokens: list[int]) -> torch.Tensor:
    """Return the logits of the model's own forward, without a cache, with one adapter in use."""
    return engine.with_adapter(
        name, lambda: engine.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].detach()
    )

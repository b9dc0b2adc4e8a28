"""The conformance kit: the guarantees of every strategy and of every task, as tests to inherit.

    from budwood.testing import StrategyConformance, TaskConformance

    class TestMine(StrategyConformance):
        strategy = Mine

    class TestMyTask(TaskConformance):
        task = "my-task"
        rows = [{"x": 1.0, "y": 2.0}, …]

Budwood installs it as a pytest plugin. Importing it imports neither torch nor pytest nor a strategy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from budwood.testing.conformance import StrategyConformance as StrategyConformance
    from budwood.testing.files import Files as Files
    from budwood.testing.files import tiny_decoder as tiny_decoder
    from budwood.testing.files import tiny_encoder as tiny_encoder
    from budwood.testing.task_conformance import TaskConformance as TaskConformance

_EXPORTS = {
    "Files": "files",
    "StrategyConformance": "conformance",
    "TaskConformance": "task_conformance",
    "tiny_decoder": "files",
    "tiny_encoder": "files",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'budwood.testing' has no attribute '{name}'")
    return getattr(importlib.import_module(f"budwood.testing.{_EXPORTS[name]}"), name)

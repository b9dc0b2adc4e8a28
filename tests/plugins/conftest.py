"""Fixtures of all strategy tests."""

from __future__ import annotations

import os

import pytest

FEW = {
    "TestLoRA", "TestAdaLoRA", "TestFreeLB", "TestDPO", "TestGRPO", "TestSelfDistillation",
    "TestSequenceClassification", "TestEmbedding", "TestSequenceToSequence",
}  # fmt: skip
"""Strategies and tasks that the kit runs in two processes in `make test`; `make scale-test` runs all."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the other strategies' and tasks' runs in two processes, unless their number is given."""
    if "BUDWOOD_TEST_PROCESSES" in os.environ:
        return

    def left_out(item: pytest.Item) -> bool:
        name = getattr(item, "originalname", "")
        of_kit = name == "test_two_processes_equal_one" and hasattr(item.cls, "announce")
        return of_kit and item.cls.__name__ not in FEW

    config.hook.pytest_deselected(items=[item for item in items if left_out(item)])
    items[:] = [item for item in items if not left_out(item)]

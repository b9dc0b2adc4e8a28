"""Settings of the tests that run benchmarks and commands."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore sys.path after each test: an arm of a benchmark appends its strategy's distribution."""
    monkeypatch.setattr(sys, "path", list(sys.path))

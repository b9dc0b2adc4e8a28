"""The recipes of the loop tests, and the strategies that inject faults."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.core.conftest import make_recipe as make_recipe

STRATEGIES = Path(__file__).parent / "strategies"


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put the strategies that inject faults on the path."""
    monkeypatch.syspath_prepend(str(STRATEGIES))
    yield importlib.import_module("budwood_fault_strategies")
    sys.modules.pop("budwood_fault_strategies", None)

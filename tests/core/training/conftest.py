"""Fixture: a run with a strategy that does something wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.core.training.misuse import LORA, Make, mine

from budwood import PluginError, tune


@pytest.fixture
def refused(distribution: Callable, make_recipe: Make) -> Callable[..., str]:
    """Function `refused(body, kind, **sections)`: returns the single error line of a run with such a strategy."""

    def run(body: str, kind: type[Exception] = PluginError, **sections: Any) -> str:
        distribution("sprout", mine(body), {"mine": "Mine"})
        sections = {"strategies": [LORA, "mine"], "train": {"steps": 2}, **sections}
        with pytest.raises(kind) as caught:
            tune(make_recipe(**sections), quiet=True)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run

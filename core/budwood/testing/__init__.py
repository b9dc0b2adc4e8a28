"""The conformance kit: the guarantees of every strategy, as tests to inherit.

    from budwood.testing import StrategyConformance

    class TestMine(StrategyConformance):
        strategy = Mine

Budwood installs it as a pytest plugin. Importing it imports neither torch nor pytest nor a strategy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from budwood.testing.conformance import StrategyConformance as StrategyConformance
    from budwood.testing.files import Files as Files

__all__ = ["Files", "StrategyConformance"]


def __getattr__(name: str) -> Any:
    if name == "StrategyConformance":
        from budwood.testing.conformance import StrategyConformance

        return StrategyConformance
    if name == "Files":
        from budwood.testing.files import Files

        return Files
    raise AttributeError(f"module 'budwood.testing' has no attribute '{name}'")

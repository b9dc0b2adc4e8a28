"""Low-rank adapters whose ranks are allocated by importance while they train."""

from budwood_adalora.strategy import AdaLoRA

__all__ = ["AdaLoRA"]

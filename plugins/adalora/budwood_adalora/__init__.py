"""Low-rank adapters whose ranks are allocated by importance during training."""

from budwood_adalora.strategy import AdaLoRA

__all__ = ["AdaLoRA"]

"""Low-rank adapters on PEFT's layers."""

from budwood_lora.strategy import LoRA

__all__ = ["LoRA"]

"""Optimizers in place of core's AdamW."""

from budwood_optimizers.strategy import AdamW8bit

__all__ = ["AdamW8bit"]

"""Averages of the trainable parameters over the steps of a run."""

from budwood_averaging.strategy import EMA, SWA

__all__ = ["EMA", "SWA"]

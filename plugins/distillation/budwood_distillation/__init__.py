"""Distillation from a teacher, live or from a cache of its most probable tokens."""

from budwood_distillation.strategy import Distillation

__all__ = ["Distillation"]

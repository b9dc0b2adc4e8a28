"""Keeps the tuned model near its base: the divergence from the base's predictions at every label."""

from budwood_base_kl.strategy import BaseKl

__all__ = ["BaseKl"]

"""A diagonal scaling of activations, as an adapter."""

from budwood_scaling.strategy import Scaling

__all__ = ["Scaling"]

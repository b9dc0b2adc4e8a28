"""Regularisers of the task's loss, each a loss term of a few lines."""

from budwood_regularisation.distribution import Entropy, Focal, KLStart, LabelSmoothing, RDrop
from budwood_regularisation.parameters import L2SP, LayerDecay

__all__ = ["L2SP", "Entropy", "Focal", "KLStart", "LabelSmoothing", "LayerDecay", "RDrop"]

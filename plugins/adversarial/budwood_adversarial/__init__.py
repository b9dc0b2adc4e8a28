"""Adversarial training and evaluation with noise on the output of the embeddings."""

from budwood_adversarial.attacks import PGD
from budwood_adversarial.strategy import Adversarial
from budwood_adversarial.typos import Typos

__all__ = ["PGD", "Adversarial", "Typos"]

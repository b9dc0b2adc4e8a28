"""Adversarial training and adversarial evaluation, on the embeddings' output."""

from budwood_adversarial.attacks import PGD
from budwood_adversarial.strategy import Adversarial
from budwood_adversarial.typos import Typos

__all__ = ["PGD", "Adversarial", "Typos"]

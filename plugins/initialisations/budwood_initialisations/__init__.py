"""Starts of LoRA other than B = 0: from the weights, the data's activations, its gradients, the quantisation error."""

from budwood_initialisations.strategies import EVA, CorDA, LoftQ, LoRAGA, OLoRA, PiSSA

__all__ = ["EVA", "CorDA", "LoRAGA", "LoftQ", "OLoRA", "PiSSA"]

"""Decoder layers in two halves with their own backward passes: attention, and a gated MLP."""

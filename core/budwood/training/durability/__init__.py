"""Durability of a run: checkpoints, resume, lock and signals."""

"""Adapters on disk (store) and on a live model (pool); knows nothing of recipes or training."""

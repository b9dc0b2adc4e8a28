"""Adapters on disk (store) and on a live model (pool); independent of recipes and training."""

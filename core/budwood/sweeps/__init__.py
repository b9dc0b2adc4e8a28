"""Sweeps: many runs of one recipe, whose fields Optuna chooses."""

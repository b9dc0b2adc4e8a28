"""Training: setup, the loop, one step, evaluation, and a run's reports."""

"""What keeps a run's work: checkpoints, resume, lock, signals."""

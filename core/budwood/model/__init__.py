"""Models: loading a base, its fingerprint, tasks, generation, and linear operations for strategies."""

"""Models: a base, its fingerprint, tasks, generation, and linears for strategies."""

"""Benchmarks of Budwood and its peers, measured in the same run on the same machine."""

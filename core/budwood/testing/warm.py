"""Fills transformers' table of checkpoint conversions, for the process from which others are forked to import."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")  # a hundred expressions, compiled at the first base that a process loads

"""From a data file to packed batches: reading → forms → examples → packing."""

"""From a data file to packed batches: reading → formats → examples → packing."""

"""Text embeddings: vectors for search, learned from pairs and triplets with in-batch negatives.

Importing the package loads no torch, so that data is read before it.
"""

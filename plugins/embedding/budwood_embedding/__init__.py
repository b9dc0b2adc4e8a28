"""Text embeddings: vectors for search, learned from pairs and triplets with in-batch negatives."""

from budwood_embedding.formats import AnchorPositive, QueryDocument
from budwood_embedding.task import Embedding

__all__ = ["AnchorPositive", "Embedding", "QueryDocument"]

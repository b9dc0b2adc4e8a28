"""Roles of the texts of a row, which are their labels, and columns of examples."""

from __future__ import annotations

ANCHOR, POSITIVE, NEGATIVE, FIRST, SECOND = range(5)
"""Anchor, positive and negatives of a row; or first and second text of a pair with a score."""
ROLES = ("anchor", "positive", "negative", "sentence1", "sentence2")
TEXT = "embedding_text"
"""Column with a number for each text, the same for equal texts."""
SCORE = "embedding_score"
"""Column with the score of the pair that a text belongs to; 0 if there is none."""

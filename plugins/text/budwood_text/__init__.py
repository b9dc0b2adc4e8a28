"""Further tasks on text: tags of tokens, numbers, masked tokens, and sequences from sequences."""

from budwood_text.formats import TextScore, TextSpans, TokenTags
from budwood_text.masked import MaskedLM
from budwood_text.regression import SequenceRegression
from budwood_text.sequences import SequenceToSequence
from budwood_text.tags import TokenClassification

__all__ = [
    "MaskedLM",
    "SequenceRegression",
    "SequenceToSequence",
    "TextScore",
    "TextSpans",
    "TokenClassification",
    "TokenTags",
]

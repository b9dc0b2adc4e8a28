"""Policy gradients on rewards: GRPO and its relatives as one strategy, and the rewards that come with it."""

from budwood_grpo.checks import JSONSchema, MathVerify
from budwood_grpo.file import PythonFile
from budwood_grpo.models import AdapterLogProb, RewardModelScore
from budwood_grpo.strategy import GRPO
from budwood_grpo.texts import ExactMatch, Length, RegularExpression

__all__ = [
    "GRPO", "AdapterLogProb", "ExactMatch", "JSONSchema", "Length", "MathVerify", "PythonFile", "RegularExpression",
    "RewardModelScore",
]  # fmt: skip

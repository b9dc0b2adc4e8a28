"""Reward models: a scalar score of an answer, learned from preference pairs."""

from budwood_reward_model.task import RewardModel

__all__ = ["RewardModel"]

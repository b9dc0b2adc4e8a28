"""Objectives on preference data: pairs of a chosen and a rejected answer, and answers judged one by one."""

from budwood_preference.kto import KTO
from budwood_preference.pairs import CPO, DPO, ORPO, SimPO

__all__ = ["CPO", "DPO", "KTO", "ORPO", "SimPO"]

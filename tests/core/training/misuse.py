"""Strategies that do something wrong, and how the error line calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Make = Callable[..., Any]
LORA = {"lora": {"rank": 2}}
WHO = "strategy 'mine' (sprout 1.0)"
HEAD = """
import dataclasses, enum
import numpy as np
import torch
from budwood import Column, Example, LossTerm, Outputs, ParameterGroup
"""


def mine(body: str, name: str = "Mine") -> str:
    """Return the source of a strategy whose class has `body`."""
    lines = "\n".join(f"    {line}" for line in body.strip("\n").splitlines())
    return f"{HEAD}\nclass {name}(Strategy):\n    '''Misuses a hook.'''\n    api = 2\n{lines}\n"

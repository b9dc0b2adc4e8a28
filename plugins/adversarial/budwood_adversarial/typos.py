"""Typos as an attack on a trained model."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from budwood import Attack, InputError, Options

if TYPE_CHECKING:
    from torch import nn

KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
TEXTS = {
    "prompt-completion": "prompt",
    "text-label": "text",
    "text-score": "text",
    "anchor-positive": "anchor",
    "query-document": "query",
}
"""Data formats with one column that the model reads and is not scored on."""


def _neighbours() -> dict[str, str]:
    """Return the adjacent keys of each letter on an English keyboard."""
    near: dict[str, str] = {}
    for line, keys in enumerate(KEYS):
        for at, key in enumerate(keys):
            beside = keys[max(at - 1, 0) : at] + keys[at + 1 : at + 2]
            above = KEYS[line - 1][at : at + 2] if line > 0 else ""
            below = KEYS[line + 1][max(at - 1, 0) : at + 1] if line + 1 < len(KEYS) else ""
            near[key] = beside + above + below
    return near


NEIGHBOURS = _neighbours()


class TyposOptions(Options):
    """Options of the attack `typos`."""

    rate: float = Field(0.05, gt=0, le=1, description="share of letters with a typo")
    seed: int = Field(0, ge=0, description="seed of the typos; those of a row depend only on it and the row's number")


class Typos(Attack):
    """Typos in the text that the model reads, never in the answer: swaps, drops, doubles, neighbouring keys."""

    Options = TyposOptions

    def check(self, form: str, task: str, model: nn.Module | None) -> None:
        """Refuse data formats whose text is scored itself, or whose prompt is unknown."""
        if form not in TEXTS and form != "messages":
            known = ", ".join([*TEXTS, "messages"])
            reason = "its text itself is scored" if form == "text" else "the text that the model reads is unknown"
            raise InputError(
                f"--attack {self.name}: no typos for the data format '{form}': {reason}. Supported formats: {known}."
            )

    def change(self, row: Mapping[str, Any], index: int, form: str) -> Mapping[str, Any]:
        """Add typos to the prompt, the text, or the user's messages."""
        draw = random.Random(f"{self.options.seed} {index}")
        if form != "messages":
            column = TEXTS[form]
            return {**row, column: mistype(row[column], self.options.rate, draw)}
        messages = [
            {**m, "content": mistype(m["content"], self.options.rate, draw)} if m["role"] == "user" else m
            for m in row["messages"]
        ]
        return {**row, "messages": messages}


def mistype(text: str, rate: float, draw: random.Random) -> str:
    """Make a typo at each letter with probability `rate`; a text with a letter keeps at least one character."""
    written: list[str] = []
    letters = list(text)
    at = 0
    while at < len(letters):
        letter = letters[at]
        at += 1
        if not letter.isalpha() or draw.random() >= rate:
            written.append(letter)
            continue
        near = NEIGHBOURS.get(letter.lower(), "")
        kinds = ["drop", "double", *(["near", "slip"] if near else [])]
        if at < len(letters) and letters[at].isalpha() and letters[at] != letter:
            kinds.append("swap")
        kind = draw.choice(kinds)
        other = draw.choice(near) if near else ""
        other = other.upper() if letter.isupper() else other
        if kind == "swap":
            written += [letters[at], letter]
            at += 1
        elif kind == "double":
            written += [letter, letter]
        elif kind == "near":
            written.append(other)
        elif kind == "slip":
            written += [letter, other]
    return "".join(written) if "".join(written).strip() else text

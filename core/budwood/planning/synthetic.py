"""Writes rows that stand in for data that is not there yet, so that a recipe can be planned by tokens alone."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from budwood.data.preference import PAIRS
from budwood.data.prompts import PROMPTS
from budwood.errors import InputError
from budwood.model.limits import default_length
from budwood.model.task import Task
from budwood.recipe.data import recipe_skeleton, recipe_task, recipe_tokenizer
from budwood.recipe.schema import Recipe, build_composition

WORD, PROMPT, SPECIAL = "water ", 4, 8
"""A word, the words of a prompt, and the tokens that templates may add."""


def synthetic(recipe: Recipe, tokens: int) -> tuple[Recipe, str]:
    """Return a recipe whose micro-batches have `tokens` tokens, all with a loss, and a note about them.

    Args:
        tokens: of a micro-batch; examples have as many, or `data.max_length` if that is less.

    Raises:
        InputError: the base has no tokenizer, or its configuration is unknown.
    """
    hooks = build_composition(recipe)
    task = recipe_task(recipe)
    tokenizer = recipe_tokenizer(recipe) if task.needs_tokenizer else None
    length = recipe.data.max_length or default_length(recipe_skeleton(recipe, task.auto_class, tokenizer))
    trains_on = [*(strategy.trains_on for strategy in hooks.strategies), task.trains_on]
    kinds = [kind for kinds in trains_on if "" not in kinds[:1] for kind in kinds if kind]
    texts = 2 if PAIRS in kinds[:1] else 1 if kinds else task.planned_texts  # which stay together
    length = min(length, tokens // texts)
    words = length
    if tokenizer is not None and kinds:  # answers that are too long would be dropped, not truncated
        each = len(tokenizer(WORD * 32, add_special_tokens=False)["input_ids"]) / 32
        words = max(int((length - SPECIAL) / each) - PROMPT, 1)
    count = 2 * max(2, -(-tokens // length))
    rows = [_row(kinds[0] if kinds else "", task, words, number) for number in range(count)]
    folder = Path(tempfile.mkdtemp(prefix="budwood-plan-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = recipe.data.model_copy(
        update={"train": path, "eval": "none", "max_length": length, "group_by": None, "as_chat": False}
    )
    train = recipe.train.model_copy(update={"micro_tokens": tokens})
    return (
        recipe.model_copy(update={"data": data, "train": train}),
        f"planned without data, for micro-batches of {tokens:,} tokens in examples of {length:,}, all with a loss",
    )


def _row(kind: str, task: Task, words: int, number: int) -> dict[str, Any]:
    """Return a row of `words` words beside a short prompt; encoding truncates plain text."""
    text, short = WORD * words, WORD * PROMPT
    if kind == PAIRS:
        return {"prompt": short, "chosen": text, "rejected": WORD * max(words - 1, 1) + "other"}
    if kind == PROMPTS:
        return {"prompt": text}
    if kind:
        return {"prompt": short, "completion": text, "label": number % 2 == 0}
    row = task.planned_row([f"{number} {text}"] * task.planned_texts, number)
    if row is None:
        raise InputError(f"--tokens: task '{task.name}' plans with data only: leave --tokens out.")
    return row

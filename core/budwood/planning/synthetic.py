"""Writes rows that stand in for data that is not there yet, so that a recipe can be planned by tokens alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from budwood.data.preference import PAIRS
from budwood.data.prompts import PROMPTS
from budwood.errors import InputError
from budwood.model.limits import default_length, positions_of
from budwood.model.task import Task
from budwood.recipe.data import recipe_skeleton, recipe_task, recipe_tokenizer
from budwood.recipe.schema import Recipe, build_composition

WORD, PROMPT, SPECIAL = "water ", 4, 8
"""A word, the words of a prompt, and the tokens that templates may add."""


@contextmanager
def synthetic(recipe: Recipe, tokens: int) -> Iterator[tuple[Recipe, str]]:
    """Yield a recipe whose micro-batches have `tokens` tokens, all with a loss, and a note about them.

    Its data is removed at the end.

    Args:
        tokens: of a micro-batch; examples have as many, or `data.max_length` if that is less.

    Raises:
        InputError: the base has no tokenizer, its configuration is unknown, the task has no stand-in rows, or
            `data.max_length` is beyond the base's positions.
    """
    hooks = build_composition(recipe)
    task = recipe_task(recipe)
    tokenizer = recipe_tokenizer(recipe) if task.needs_tokenizer else None
    trains_on = [*(strategy.trains_on for strategy in hooks.strategies), task.trains_on]
    kind = next((kinds[0] for kinds in trains_on if any(kinds[:1])), "")
    skeleton = recipe_skeleton(recipe, task.auto_class, tokenizer)
    length = min(recipe.data.max_length or default_length(skeleton), tokens // _examples(kind, task))
    limit = positions_of(skeleton)
    if limit is not None and length > limit:
        raise InputError(
            f"data.max_length: {recipe.data.max_length:,} tokens are more than base '{recipe.base.model}' takes "
            f"({limit:,}, its positions): set it to at most {limit:,}."
        )
    words = length
    if tokenizer is not None and kind:  # answers that are too long would be dropped, not truncated
        each = len(tokenizer(WORD * 32, add_special_tokens=False)["input_ids"]) / 32
        words = max(int((length - SPECIAL) / each) - PROMPT, 1)
    count = 2 * max(2, -(-tokens // length))
    with tempfile.TemporaryDirectory(prefix="budwood-plan-") as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(_row(kind, task, words, number)) + "\n" for number in range(count))
        data = recipe.data.model_copy(
            update={"train": path, "eval": "none", "max_length": length, "group_by": None, "as_chat": False}
        )
        train = recipe.train.model_copy(update={"micro_tokens": tokens})
        yield (
            recipe.model_copy(update={"data": data, "train": train}),
            f"planned without data, for micro-batches of {tokens:,} tokens in examples of {length:,}, all with a loss",
        )


def _examples(kind: str, task: Task) -> int:
    """Return the examples of a row that have the full length, and stay together or count together."""
    if kind:
        return 2 if kind == PAIRS else 1
    row = _row(kind, task, 1, 0)
    return max(sum(WORD in value for value in row.values() if isinstance(value, str)), 1)


def _row(kind: str, task: Task, words: int, number: int) -> dict[str, Any]:
    """Return a row of `words` words beside a short prompt; encoding truncates plain text.

    Raises:
        InputError: the task has no stand-in rows.
    """
    text, short = WORD * words, WORD * PROMPT
    if kind == PAIRS:
        return {"prompt": short, "chosen": text, "rejected": WORD * max(words - 1, 1) + "other"}
    if kind == PROMPTS:
        return {"prompt": text}
    if kind:
        return {"prompt": short, "completion": text, "label": number % 2 == 0}
    row = task.planned_row(text, number)
    if row is None:
        raise InputError(
            f"--tokens: {task} has no rows that stand in for data (`planned_row`): plan with data instead."
        )
    return row

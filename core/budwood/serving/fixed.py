"""Answers of a base whose rows cannot join and leave a batch: fixed batches, as in training."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from budwood.errors import BudwoodError, describe
from budwood.model.generate import Continuation, continue_rows

if TYPE_CHECKING:
    from budwood.serving.engine import Engine
    from budwood.serving.requests import Row


def answer_in_batches(engine: Engine, rows: list[Row]) -> None:
    """Answer rows, those with the same adapter and settings in one batch, and send the results."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        wanted = row.sampling
        groups.setdefault((row.loaded, wanted.temperature, wanted.top_p, wanted.top_k), []).append(row)
    for members in groups.values():
        errors: dict[Row, BaseException] = {}
        try:
            _answer(engine, members, errors)
        except BaseException as problem:
            errors |= {row: problem for row in members if row.writer.reason is None}
        for row in members:
            error = errors.get(row)
            if error is not None and not isinstance(error, BudwoodError):
                error = BudwoodError(f"the request failed: {describe(error)}.")
            engine.scheduler.count(row, row.prompt, len(row.writer.tokens))
            engine.scheduler.end(row, None, error)


def _answer(engine: Engine, rows: list[Row], errors: dict[Row, BaseException]) -> None:
    loaded = rows[0].loaded
    engine.loader.select(loaded)
    engine.table.plan = engine.table.base if loaded is None else loaded.plan
    try:
        asked = [
            Continuation(
                row.ids, row.writer, row.sampling.seed, row.sampling.score if row.sampling.scores else None,
                partial(getattr, row.answer, "cancelled"), partial(errors.__setitem__, row),
            )
            for row in rows
        ]  # fmt: skip
        continue_rows(engine.model, engine.tokenizer, asked, rows[0].sampling)
    finally:
        engine.table.plan = None

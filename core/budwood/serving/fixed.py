"""Answers of a base whose rows cannot join and leave a batch: fixed batches, computed by transformers' generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from budwood.errors import BudwoodError, InputError, describe
from budwood.model.generate import generate

if TYPE_CHECKING:
    from budwood.serving.engine import Engine
    from budwood.serving.requests import Row


def answer_in_batches(engine: Engine, rows: list[Row]) -> None:
    """Answer rows, those with the same adapter and settings in one batch, and send the results."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        wanted = row.sampling
        if wanted.log_probs or wanted.top_log_probs:
            row.fail(InputError("log_probs: this base is answered in fixed batches, which return none."))
            if row.loaded is not None:
                engine.residents.release(row.loaded, request=True)
            continue
        groups.setdefault((row.loaded, wanted.temperature, wanted.top_p, wanted.top_k, wanted.stop), []).append(row)
    for (loaded, temperature, top_p, top_k, stop), members in groups.items():
        engine.loader.select(loaded)
        engine.table.plan = engine.table.base if loaded is None else loaded.plan
        try:
            limit = max(row.writer.limit for row in members)
            answers = generate(
                engine.model, engine.tokenizer, [row.ids for row in members], limit, temperature=temperature,
                top_p=top_p, top_k=top_k, stop=stop, stop_ids=[row.sampling.stop_ids for row in members],
                keys=[row.sampling.seed for row in members],
            )  # fmt: skip
            for row, answer in zip(members, answers, strict=True):
                end = [] if answer.end_token is None else [answer.end_token]
                for token in (*answer.tokens, *end):
                    row.writer.add(token)
                if row.writer.reason is None:
                    row.writer.reason = "length"
                row.finish()
        except Exception as error:
            known = isinstance(error, BudwoodError)
            for row in members:
                row.fail(error if known else BudwoodError(f"the request failed: {describe(error)}."))
        finally:
            engine.table.plan = None
            for row in members:
                if row.loaded is not None:
                    engine.residents.release(row.loaded, request=True)

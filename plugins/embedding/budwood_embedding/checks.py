"""Checks of the data before the base loads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from budwood import Example, InputError, Run
from budwood_embedding.roles import ANCHOR, FIRST, NEGATIVE, SCORE, SECOND, TEXT


def check_data(run: Run, examples: Sequence[Example]) -> bool:
    """Refuse data that has nothing to compare with; return whether it is pairs with scores.

    Raises:
        InputError: the message says what to change.
    """
    graded = have_scores(examples)
    held = run.eval_examples
    if held is not None and len(held) and have_scores(held) != graded:
        raise InputError(
            f"{held.path}: it must have the same columns as the training data: "
            f"{'sentence1, sentence2 and score' if graded else 'anchors with what belongs to them'}."
        )
    (_check_scores if graded else _check_negatives)(run, examples)
    return graded


def have_scores(examples: Sequence[Example]) -> bool:
    """Return whether examples are pairs with scores; core refuses files of both kinds in one run."""
    return len(examples) > 0 and int(examples[0].labels[0]) in (FIRST, SECOND)


def _check_scores(run: Run, examples: Iterable[Example]) -> None:
    """Refuse data without two pairs to compare: steps of a single one, or equal scores."""
    if run.recipe.train.batch_examples == 1:
        raise InputError(
            f"{run.recipe.where('train', 'batch_examples')}: train.batch_examples: 1: pairs are compared with the "
            "others of a step: raise it."
        )
    scores: set[float] = set()
    for example in examples:
        scores.add(float(example.columns[SCORE].values))
        if len(scores) > 1:
            return
    raise InputError(f"{run.recipe.data.train}: all pairs have the same score, so there is nothing to rank.")


def _check_negatives(run: Run, examples: Iterable[Example]) -> None:
    """Refuse data whose steps hold no negatives: single rows without hard ones, or one document alone."""
    documents: set[int] = set()
    alone, hard = run.recipe.train.batch_examples == 1, True
    for example in examples:
        role = int(example.labels[0])
        if role == ANCHOR:
            if (alone and not hard) or (not alone and len(documents) > 1):
                break
            hard = False
        else:
            hard = hard or role == NEGATIVE
            documents.add(int(example.columns[TEXT].values))
    if alone and not hard:
        raise InputError(
            f"{run.recipe.where('train', 'batch_examples')}: train.batch_examples: 1: the other rows of a step are "
            "an anchor's negatives, and a row without a 'negative' of its own would have none: raise it."
        )
    if len(documents) < 2:
        raise InputError(f"{run.recipe.data.train}: all rows have the same document, so no anchor has a negative.")

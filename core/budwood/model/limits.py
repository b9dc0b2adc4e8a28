"""What a base takes: how many positions, and which token ids. Rows beyond either are refused, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from budwood.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from budwood.data.examples import Examples

LENGTH = 1024
"""Maximum tokens per example if neither the recipe nor the base says less."""
BLOCK = 1 << 24
"""Number of token ids that are looked at at once."""
OFFSETS = 8
"""A table of learned positions may have so many rows beside those of the configuration."""
EXTENDED = ("linear", "dynamic", "yarn")
"""Types of RoPE scaling whose factor is not contained in `max_position_embeddings`."""


def positions_of(model: Any) -> int | None:
    """Return the longest sequence that a model was made for, in tokens; None if its positions have no end.

    Learned positions end with their table, of which some models skip the first rows (OPT two, RoBERTa those up to the
    padding token's). Rotary positions are counted up to the length of the configuration, beyond which a model answers,
    but was not trained; a RoPE scaling extends it.

    Args:
        model: a model or its skeleton.
    """
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "max_position_embeddings", None)
    if type(count) is not int or count <= 0 or getattr(config, "alibi", False):
        return None
    for name, module in model.named_modules():
        rows = getattr(module, "num_embeddings", None)
        if rows is None or not re.search(r"(^|\.)(wpe|\w*pos(ition)?s?(_embed\w*)?)$", name):
            continue
        if count <= rows <= count + OFFSETS:  # those of a vision tower are others
            padding = getattr(module, "padding_idx", None)
            return int(rows - getattr(module, "offset", 0 if padding is None else padding + 1))
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) in EXTENDED:
        trained, factor = scaling.get("original_max_position_embeddings") or count, scaling.get("factor")
        if isinstance(trained, int) and isinstance(factor, int | float):
            return max(count, int(trained * factor))
    return count


def default_length(model: Any) -> int:
    """Return the maximum tokens per example of a recipe that gives none: `LENGTH`, or the base's positions if less."""
    return min(LENGTH, positions_of(model) or LENGTH)


def embeddings_of(model: nn.Module) -> int | None:
    """Return the number of token embeddings of a model; None if it has no such table."""
    try:
        count = getattr(model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # it reads images
        return None
    return count if isinstance(count, int) else None


def check_fits(examples: Examples, model: Any, tokenizer: Any, name: str) -> None:
    """Refuse examples that a base cannot take.

    Args:
        examples: a file's examples; those of a task without token ids all fit.
        model: the base, or its skeleton.
        name: the base's name, for messages.

    Raises:
        InputError: a row has more tokens than the base has positions, or a token id without an embedding; the
            message names the longest row, or the first.
    """
    ids = examples.input_values("input_ids")
    if ids is None or not len(ids):
        return
    limit = positions_of(model)
    longest = int(examples.lengths.argmax())
    if limit is not None and examples.lengths[longest] > limit:
        raise InputError(
            f"{examples.location(longest)} has {examples.lengths[longest]:,} tokens, but base '{name}' takes {limit:,} "
            f"(its positions): set data.max_length to {limit}, or shorten the longer rows."
        )
    count = embeddings_of(model)
    if count is None:
        return
    for start in range(0, len(ids.values), BLOCK):
        beyond = np.flatnonzero(ids.values[start : start + BLOCK] >= count)
        ids.release()
        if len(beyond):
            first = start + int(beyond[0])
            raise InputError(
                f"{examples.location(ids.index_at(first))} "
                f"uses {no_embedding(int(ids.values[first]), count, tokenizer, name)}"
            )


class ContextFullError(InputError):
    """A prompt leaves no room for an answer in the base's context."""


def answer_limit(length: int, wanted: int, context: int | None, where: str) -> int:
    """Return the largest number of tokens of an answer to a prompt of so many.

    Raises:
        InputError: the prompt is empty.
        ContextFullError: it fills the context.
    """
    if not length:
        raise InputError(f"{where} is empty.")
    if context is None:
        return wanted
    if length >= context:
        raise ContextFullError(f"{where} has {length} tokens; the base's context holds {context} with the answer.")
    return min(wanted, context - length)


def check_tokens(ids: Iterable[Any], count: int | None, tokenizer: Any, name: str, where: str) -> None:
    """Refuse a prompt in which something is not a token id, or has no embedding.

    Args:
        ids: the prompt.
        count: number of token embeddings; None: there is no such table.
        tokenizer: the base's.
        name: the base's name; where: what messages call the prompt.

    Raises:
        InputError: the message names the token.
    """
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int | np.integer) or token < 0:
            ids_are = "" if count is None else f", which are 0 to {count - 1}"
            raise InputError(f"{where}: {token!r} is not a token id of the base '{name}'{ids_are}.")
        if count is not None and token >= count:
            raise InputError(f"{where} uses {no_embedding(int(token), count, tokenizer, name)}")


def no_embedding(token: int, count: int, tokenizer: Any, name: str) -> str:
    return (
        f"token {token} '{tokenizer.convert_ids_to_tokens(token)}', but base '{name}' has {count:,} embeddings: the "
        "token was added to its tokenizer alone. Train an embedding for it with base.resize_embeddings: true, or do "
        "without the token."
    )

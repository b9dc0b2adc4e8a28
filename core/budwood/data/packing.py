"""Examples to optimizer steps, steps to micro-batches, micro-batches to tensors. Only `plan_epoch` draws numbers."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Literal

import numpy as np
import torch

from budwood.contract.types import Batch, Example

Pool = Literal["tokens", "last", "row"]


def plan_epoch(
    lengths: np.ndarray, seed: int, epoch: int, batch_tokens: int | None = None, batch_examples: int | None = None
) -> list[np.ndarray]:
    """Order of an epoch, cut into optimizer steps of about equal size; depends on nothing but the arguments.

    Args:
        lengths: [n] tokens of each example.
        seed: of the run.
        epoch: from 0.
        batch_tokens: a step has at most so many tokens, unless it is a single longer example.
        batch_examples: a step has at most so many examples. Exactly one of the two is given.

    Returns:
        Indices of each step, every example in exactly one. As few steps as the order allows, then as even as it allows.
    """
    if (batch_tokens is None) == (batch_examples is None):
        raise ValueError("plan_epoch: give batch_tokens or batch_examples, one of the two")
    if not len(lengths):
        return []
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    if batch_examples is not None:
        return np.array_split(order, -(-len(order) // batch_examples))
    assert batch_tokens is not None
    return np.split(order, _cut_evenly(np.concatenate([[0], np.cumsum(lengths[order], dtype=np.int64)]), batch_tokens))


def _cut_evenly(upto: np.ndarray, capacity: int) -> list[int]:
    """Where steps meet: the fewest steps of at most `capacity` tokens, each near its share of what is left.

    `upto` [n + 1] are the tokens before each example, and all at the end.
    """
    least = [len(upto) - 1]  # filled from the end: where each step must stop at least for the rest to fit
    while least[-1] > 0:
        first = int(np.searchsorted(upto, upto[least[-1]] - capacity, side="left"))
        least.append(min(first, least[-1] - 1))
    least = least[::-1][1:-1]
    stops: list[int] = []
    at = 0
    for number, low in enumerate(least):
        share = (upto[-1] - upto[at]) / (len(least) + 1 - number)
        high = int(np.searchsorted(upto, upto[at] + capacity, side="right")) - 1
        near = int(np.searchsorted(upto, upto[at] + share))
        near -= upto[near] - upto[at] - share > share - (upto[near - 1] - upto[at])
        at = max(low, at + 1, min(near, high))
        stops.append(at)
    return stops


def split_micro(
    indices: Sequence[int] | np.ndarray, lengths: np.ndarray, micro_tokens: int, packed: bool
) -> list[list[int]]:
    """Split examples into micro-batches of at most `micro_tokens` tokens; a longer example has one of its own.

    Args:
        indices: of the examples.
        lengths: tokens of all examples, which `indices` index.
        micro_tokens: real tokens where rows are packed; else rows times the longest, padding included.
        packed: as few rows as best-fit decreasing needs, then as even as they get, since the largest row decides how
            much memory a step takes; else put examples of like length together.

    Returns:
        Indices of each micro-batch, the same for the same examples in whatever order.
    """
    longest_first = sorted((int(i) for i in indices), key=lambda i: (-int(lengths[i]), i))
    batches: list[list[int]] = []
    if not packed:
        for index in longest_first:
            if not batches or (len(batches[-1]) + 1) * int(lengths[batches[-1][0]]) > micro_tokens:
                batches.append([])
            batches[-1].append(index)
        return batches
    room: list[tuple[int, int]] = []  # free tokens and batch, sorted
    for index in longest_first:
        length = int(lengths[index])
        at = bisect_left(room, (length, -1))
        free, batch = room.pop(at) if at < len(room) else (max(micro_tokens, length), len(batches))
        if batch == len(batches):
            batches.append([])
        batches[batch].append(index)
        insort(room, (free - length, batch))
    return _even(longest_first, lengths, len(batches), micro_tokens) or batches


def _even(longest_first: list[int], lengths: np.ndarray, count: int, micro_tokens: int) -> list[list[int]] | None:
    """Deal examples into `count` rows, each to the emptiest (longest first); None where one becomes too full."""
    batches: list[list[int]] = [[] for _ in range(count)]
    fill = [(0, batch) for batch in range(count)]
    for index in longest_first:
        tokens, batch = heappop(fill)
        if batches[batch] and tokens + int(lengths[index]) > micro_tokens:
            return None
        batches[batch].append(index)
        heappush(fill, (tokens + int(lengths[index]), batch))
    return batches


def collate(examples: Sequence[Example], packed: bool, pad_id: int, pool: Pool = "tokens") -> Batch:
    """Make a micro-batch; its label positions are computed here, so a step has no shape that depends on data.

    Args:
        examples: at least one; all with the same `columns`.
        packed: one row of all, end to end; else a row each, padded on the right.
        pad_id: what rows are padded with.
        pool: where labels stand. "tokens": before each supervised token. "last": at each example's last token, and
            "row": at each row, which the model pools itself; with the class as label.

    Raises:
        ValueError: an example is empty, its first token is supervised, it lacks a label or column, or packed rows are
            to be pooled by row.
    """
    lengths = np.array([len(example) for example in examples], dtype=np.int64)
    if not len(lengths) or not lengths.all():
        raise ValueError("collate: there is no example, or an empty one")
    if packed and pool == "row":
        raise ValueError("collate: a model that pools by row takes padded rows, not packed ones")
    count, longest = len(lengths), int(lengths.max())
    firsts = np.concatenate([[0], np.cumsum(lengths)[:-1]])  # of each example among the real tokens
    owner = np.repeat(np.arange(count), lengths)
    position = np.arange(int(lengths.sum())) - firsts[owner]
    # Where each real token stands in the flattened [rows, width].
    place = firsts[owner] + position if packed else owner * longest + position
    shape = (1, len(place)) if packed else (count, longest)

    def spread(values: np.ndarray, fill: int) -> torch.Tensor:
        whole = np.full((shape[0] * shape[1], *values.shape[1:]), fill, dtype=values.dtype)
        whole[place] = values
        return torch.from_numpy(whole)

    tokens = np.concatenate([example.input_ids for example in examples]).astype(np.int64)
    if pool == "tokens":
        supervised = np.concatenate([example.supervised for example in examples])
        if supervised[firsts].any():
            wrong = examples[int(np.argmax(supervised[firsts]))].id
            raise ValueError(f"collate: the first token of example {wrong} is supervised, and nothing comes before it")
        at = np.flatnonzero(supervised)
        label_positions, labels, label_owner = place[at] - 1, tokens[at], owner[at]
    else:
        classes = [example.label for example in examples]
        if None in classes:
            raise ValueError(f"collate: example {examples[classes.index(None)].id} has no label")
        labels, label_owner = np.array(classes, dtype=np.int64), np.arange(count)
        label_positions = np.arange(count) if pool == "row" else place[firsts + lengths - 1]
    return Batch(
        input_ids=spread(tokens, pad_id).view(shape),
        position_ids=spread(position, 0).view(shape),
        attention_mask=None if packed else spread(np.ones(len(place), dtype=bool), 0).view(shape),
        segments=(*firsts.tolist(), len(place)) if packed else (),
        example_of_token=spread(owner, -1),
        label_positions=torch.from_numpy(label_positions),
        labels=torch.from_numpy(labels),
        example_of_label=torch.from_numpy(label_owner),
        example_ids=tuple(example.id for example in examples),
        num_tokens=len(place),
        lengths=tuple(lengths.tolist()),
        columns={name: _column(name, examples, spread, shape) for name in _column_names(examples)},
    )


def _column_names(examples: Sequence[Example]) -> list[str]:
    names = list(examples[0].columns)
    for example in examples:
        if set(example.columns) != set(names):
            differ = ", ".join(sorted(set(example.columns) ^ set(names)))
            raise ValueError(f"collate: column {differ} is not in all of the examples {examples[0].id}, {example.id}")
    return names


def _column(name: str, examples: Sequence[Example], spread: Callable, shape: tuple[int, int]) -> torch.Tensor:
    """Scalars stacked to [examples]; arrays of a value per token laid out as the tokens are, padded with zeros."""
    arrays = [np.asarray(example.columns[name]) for example in examples]
    if all(array.ndim == 0 for array in arrays):
        return torch.from_numpy(np.stack(arrays))
    for example, array in zip(examples, arrays, strict=True):
        if array.ndim == 0 or len(array) != len(example):
            raise ValueError(
                f"collate: column {name} of example {example.id} has shape {array.shape}; it must be a scalar in "
                f"every example, or have one value for each of its {len(example)} tokens"
            )
    laid_out: torch.Tensor = spread(np.concatenate(arrays), 0)
    return laid_out.view(*shape, *laid_out.shape[1:])


def pad_share(batch: Batch) -> float:
    """Share of the batch's positions that are padding."""
    return 1.0 - batch.num_tokens / batch.input_ids.numel()

"""From examples to optimizer steps, micro-batches and tensors. Only `plan_epoch` draws random numbers."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
import torch

from budwood.contract.examples import Batch, Column, Example


def plan_epoch(
    lengths: np.ndarray,
    seed: int,
    epoch: int,
    batch_tokens: int | None = None,
    batch_examples: int | None = None,
    groups: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Order of an epoch, cut into optimizer steps of about equal size; depends on nothing but the arguments.

    Args:
        lengths: [n] size of each example.
        seed: of the run.
        epoch: from 0.
        batch_tokens: a step has at most so many tokens, unless it is a single larger group.
        batch_examples: a step has at most so many groups (examples, if none are grouped). Exactly one of the two is
            given.
        groups: [n] number of each example's group, from 0 in order; None: each example is one. Groups stay together.

    Returns:
        Indices of each step, every example in exactly one. As few steps as the order allows, then as even as it allows.
    """
    if (batch_tokens is None) == (batch_examples is None):
        raise ValueError("plan_epoch: give batch_tokens or batch_examples, one of the two")
    if not len(lengths):
        return []
    starts = np.arange(len(lengths)) if groups is None else np.flatnonzero(np.diff(groups, prepend=-1))
    order = np.random.default_rng([seed, epoch]).permutation(len(starts))
    if batch_examples is not None:
        steps = np.array_split(order, -(-len(order) // batch_examples))
    else:
        assert batch_tokens is not None
        sizes = np.add.reduceat(lengths, starts)[order]
        steps = np.split(order, _cut_evenly(np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]), batch_tokens))
    if len(starts) == len(lengths):
        return steps
    stops = np.append(starts[1:], len(lengths))
    return [np.concatenate([np.arange(starts[g], stops[g]) for g in step]) for step in steps]


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
    indices: Sequence[int] | np.ndarray,
    lengths: np.ndarray,
    micro_tokens: int,
    packed: bool,
    groups: np.ndarray | None = None,
) -> list[list[int]]:
    """Split examples into micro-batches of at most `micro_tokens` tokens; a larger group has one of its own.

    Args:
        indices: of the examples; those of a group are adjacent and in order.
        lengths: sizes of all examples, which `indices` index.
        micro_tokens: real tokens if rows are packed; else rows times the longest, padding included.
        packed: as few rows as best-fit decreasing needs, then as even as they get, since the largest row decides how
            much memory a step takes; else put examples of like length together.
        groups: [n] number of the group of every example; None: each is one of its own.

    Returns:
        Indices of each micro-batch, the same for the same examples in whatever order. Groups stay together.
    """
    atoms = _atoms(indices, lengths, groups)
    batches: list[list[_Atom]] = []
    if not packed:
        rows = longest = 0
        for atom in sorted(atoms, key=lambda a: (-a.longest, a.members)):
            if not batches or (rows + len(atom.members)) * longest > micro_tokens:
                batches.append([])
                rows, longest = 0, atom.longest
            batches[-1].append(atom)
            rows += len(atom.members)
        return [[i for atom in batch for i in atom.members] for batch in batches]
    largest_first = sorted(atoms, key=lambda a: (-a.tokens, a.members))
    room: list[tuple[int, int]] = []  # free tokens and batch, sorted
    for atom in largest_first:
        at = bisect_left(room, (atom.tokens, -1))
        free, batch = room.pop(at) if at < len(room) else (max(micro_tokens, atom.tokens), len(batches))
        if batch == len(batches):
            batches.append([])
        batches[batch].append(atom)
        insort(room, (free - atom.tokens, batch))
    batches = _even(largest_first, len(batches), micro_tokens) or batches
    return [[i for atom in batch for i in atom.members] for batch in batches]


class _Atom(NamedTuple):
    """Examples that stay together."""

    members: tuple[int, ...]
    tokens: int
    longest: int


def _atoms(indices: Sequence[int] | np.ndarray, lengths: np.ndarray, groups: np.ndarray | None) -> list[_Atom]:
    members: list[list[int]] = []
    for index in map(int, indices):
        if groups is None or not members or groups[index] != groups[members[-1][-1]]:
            members.append([])
        members[-1].append(index)
    sizes = [[int(lengths[i]) for i in group] for group in members]
    return [_Atom(tuple(group), sum(size), max(size)) for group, size in zip(members, sizes, strict=True)]


def _even(largest_first: list[_Atom], count: int, micro_tokens: int) -> list[list[_Atom]] | None:
    """Deal groups into `count` rows, each to the emptiest (largest first); None if one becomes too full."""
    batches: list[list[_Atom]] = [[] for _ in range(count)]
    fill = [(0, batch) for batch in range(count)]
    for atom in largest_first:
        tokens, batch = heappop(fill)
        if batches[batch] and tokens + atom.tokens > micro_tokens:
            return None
        batches[batch].append(atom)
        heappush(fill, (tokens + atom.tokens, batch))
    return batches


def collate_tokens(examples: Sequence[Example], packed: bool, pad_id: int, pool_rows: bool = False) -> Batch:
    """Make a micro-batch of text; its label positions are computed here, so a step has no shape that depends on data.

    Args:
        examples: at least one, whose inputs include `input_ids` [T]; all with the same inputs and `columns`. Inputs as
            long as `input_ids` are laid out as the tokens are, others are concatenated along their first dimension.
        packed: one row of all, end to end; else a row each, padded on the right.
        pad_id: what rows are padded with.
        pool_rows: the model pools by row and gives one output for each, which the labels are for.

    Raises:
        ValueError: an example is empty, a label stands beyond its example, columns differ, or packed rows are to be
            pooled.
    """
    lengths = np.array([len(example.inputs["input_ids"]) for example in examples], dtype=np.int64)
    if not len(lengths) or not lengths.all():
        raise ValueError("collate: there is no example, or an empty one")
    if packed and pool_rows:
        raise ValueError("collate: a model that pools by row takes padded rows, not packed ones")
    count, longest = len(lengths), int(lengths.max())
    firsts = np.concatenate([[0], np.cumsum(lengths)[:-1]])  # of each example among the real tokens
    owner = np.repeat(np.arange(count), lengths)
    position = np.arange(int(lengths.sum())) - firsts[owner]
    # The index of each real token in the flattened [rows, width].
    place = firsts[owner] + position if packed else owner * longest + position
    rows, width = (1, len(place)) if packed else (count, longest)

    def spread(values: np.ndarray, fill: int) -> torch.Tensor:
        whole = np.full((rows * width, *values.shape[1:]), fill, dtype=values.dtype)
        whole[place] = values
        return torch.from_numpy(whole).view(rows, width, *values.shape[1:])

    tokens = np.concatenate([example.inputs["input_ids"] for example in examples]).astype(np.int64)
    inputs = {"input_ids": spread(tokens, pad_id), "position_ids": spread(position, 0)}
    for name in (name for name in examples[0].inputs if name != "input_ids"):
        values = [example.inputs[name] for example in examples]
        as_tokens = all(len(v) == n for v, n in zip(values, lengths, strict=True))
        inputs[name] = spread(np.concatenate(values), 0) if as_tokens else torch.from_numpy(np.concatenate(values))
    if not packed:
        inputs["attention_mask"] = spread(np.ones(len(place), dtype=bool), 0)
    at = [np.asarray(example.label_positions, dtype=np.int64) for example in examples]
    for example, positions, length in zip(examples, at, lengths, strict=True):
        if len(positions) and positions.max() >= length:
            raise ValueError(f"collate: example {example.key} has a label at {positions.max()} of {length} positions")
    starts = np.arange(count) if pool_rows else place[firsts]
    offsets = [np.full_like(p, start) if pool_rows else start + p for p, start in zip(at, starts, strict=True)]
    return _finish(
        examples, inputs, np.concatenate(offsets), spread(owner, -1).flatten(), lengths, rows, width,
        segments=(*firsts.tolist(), len(place)) if packed else (), spread=spread,
    )  # fmt: skip


def collate_rows(examples: Sequence[Example], lengths: Sequence[int]) -> Batch:
    """Make a micro-batch of inputs that are all of one shape: each example is a row, with one output position.

    Args:
        examples: at least one; every input is stacked.
        lengths: size of each, as the task counts it.

    Raises:
        ValueError: shapes or columns differ.
    """
    inputs = {name: torch.from_numpy(np.stack([e.inputs[name] for e in examples])) for name in examples[0].inputs}
    count = len(examples)
    at = np.repeat(np.arange(count), [len(example.label_positions) for example in examples])
    return _finish(examples, inputs, at, torch.arange(count), np.asarray(lengths), count, 1)


def _finish(
    examples: Sequence[Example],
    inputs: dict[str, torch.Tensor],
    label_positions: np.ndarray,
    example_of_position: torch.Tensor,
    lengths: np.ndarray,
    rows: int,
    width: int,
    segments: tuple[int, ...] = (),
    spread: Callable[[np.ndarray, int], torch.Tensor] | None = None,
) -> Batch:
    labels = np.concatenate([np.asarray(example.labels) for example in examples])
    labels = labels.astype(np.int64) if labels.dtype.kind in "iu" else labels
    owners = np.repeat(np.arange(len(examples)), [len(example.label_positions) for example in examples])
    weights = np.concatenate([np.asarray(example.weights, dtype=np.float32) for example in examples])
    return Batch(
        inputs=inputs,
        label_positions=torch.from_numpy(label_positions.astype(np.int64)),
        labels=torch.from_numpy(labels),
        weights=torch.from_numpy(weights),
        example_of_label=torch.from_numpy(owners),
        example_of_position=example_of_position,
        keys=tuple(example.key for example in examples),
        lengths=tuple(lengths.tolist()),
        groups=_groups(examples),
        rows=rows,
        width=width,
        segments=segments,
        source_rows=tuple(example.row for example in examples),
        columns={name: _column(name, examples, spread) for name in _column_names(examples)},
        total_weight=float(weights.sum(dtype=np.float64)),
    )


def _groups(examples: Sequence[Example]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for index, example in enumerate(examples):
        same = index > 0 and example.group is not None and example.group == examples[index - 1].group
        start = found.pop()[0] if same else index
        found.append((start, index + 1))
    return tuple(found)


def _column_names(examples: Sequence[Example]) -> list[str]:
    names = list(examples[0].columns)
    for example in examples:
        if set(example.columns) != set(names):
            differ = ", ".join(sorted(set(example.columns) ^ set(names)))
            raise ValueError(f"collate: column {differ} is not in all of the examples {examples[0].key}, {example.key}")
    return names


def _column(
    name: str, examples: Sequence[Example], spread: Callable[[np.ndarray, int], torch.Tensor] | None
) -> torch.Tensor:
    """A column laid out by its axis: [examples, …], [L, …], or as the inputs are, padded with zeros."""
    columns = [example.columns[name] for example in examples]
    wrong = next((e for e, c in zip(examples, columns, strict=True) if not isinstance(c, Column)), None)
    if wrong is not None:
        raise ValueError(
            f'collate: column {name} of example {wrong.key} must be a Column, such as Column(values, axis="input")'
        )
    axis = columns[0].axis
    if any(column.axis != axis for column in columns):
        raise ValueError(f"collate: column {name} has several axes: {sorted({column.axis for column in columns})}")
    if axis == "example":
        return torch.from_numpy(np.stack([column.values for column in columns]))
    for example, column in zip(examples, columns, strict=True):
        size = len(example.label_positions) if axis == "label" else len(next(iter(example.inputs.values())))
        if column.values.ndim == 0 or len(column.values) != size:
            raise ValueError(
                f"collate: column {name} of example {example.key} has shape {column.values.shape}; its axis is {axis}, "
                f"so that it must have one value for each of its {size}"
            )
    whole = np.concatenate([column.values for column in columns])
    return torch.from_numpy(whole) if axis == "label" or spread is None else spread(whole, 0)


def pad_share(batch: Batch) -> float:
    """Share of the batch's positions that are padding."""
    return 1.0 - sum(batch.lengths) / (batch.rows * batch.width)

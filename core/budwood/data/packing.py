"""Splits examples into optimizer steps and micro-batches, and collates them. Only `plan_epoch` is random."""

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
    """Shuffle the examples of an epoch and split them into optimizer steps of similar size.

    The result depends only on the arguments.

    Args:
        lengths: [n] size of each example.
        seed: seed of the run.
        epoch: index of the epoch, from 0.
        batch_tokens: maximum number of tokens in a step; a larger group is a step by itself.
        batch_examples: maximum number of groups in a step (of examples, if they are not grouped). Exactly one of the
            two limits must be set.
        groups: [n] group of each example, numbered from 0 in order; None: each example is a group. Groups are not
            split.

    Returns:
        Indices of the examples in each step; each example is in exactly one. The number of steps is the minimum that
        the order allows, and their sizes are as equal as it allows.
    """
    if (batch_tokens is None) == (batch_examples is None):
        raise ValueError("plan_epoch: exactly one of batch_tokens and batch_examples must be set")
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


def _cut_evenly(offsets: np.ndarray, capacity: int) -> list[int]:
    """Boundaries of the fewest steps of at most `capacity` tokens, each close to an equal share of the remaining ones.

    Args:
        offsets: [n + 1] number of tokens before each example, then the total.
    """
    earliest = [len(offsets) - 1]  # earliest end of each step such that the rest fits; filled from the last step
    while earliest[-1] > 0:
        first = int(np.searchsorted(offsets, offsets[earliest[-1]] - capacity, side="left"))
        earliest.append(min(first, earliest[-1] - 1))
    earliest = earliest[::-1][1:-1]
    stops: list[int] = []
    at = 0
    for number, low in enumerate(earliest):
        share = (offsets[-1] - offsets[at]) / (len(earliest) + 1 - number)
        high = int(np.searchsorted(offsets, offsets[at] + capacity, side="right")) - 1
        near = int(np.searchsorted(offsets, offsets[at] + share))
        near -= offsets[near] - offsets[at] - share > share - (offsets[near - 1] - offsets[at])
        at = max(low, at + 1, min(near, high))
        stops.append(at)
    return stops


def split_micro(
    indices: Sequence[int] | np.ndarray,
    lengths: np.ndarray,
    micro_tokens: int,
    packed: bool,
    groups: np.ndarray | None = None,
    parts: int = 1,
) -> list[list[int]]:
    """Split examples into micro-batches of at most `micro_tokens` tokens; a larger group is a micro-batch by itself.

    Args:
        indices: indices of the examples; those of a group are adjacent and in order.
        lengths: [n] sizes of all examples, indexed by `indices`.
        micro_tokens: limit on real tokens if rows are packed, otherwise on rows times the longest, padding included.
        packed: if True, use as many rows as best-fit decreasing needs, then equalize them, since the largest row
            determines the memory of a step. If False, examples of similar length are batched together.
        groups: [n] group of each example; None: each example is a group.
        parts: make the number of micro-batches a multiple of this, as far as there are groups, so that every
            `parts`-th of them are as many and as large.

    Returns:
        Indices of the examples in each micro-batch, independent of the order of `indices`. Groups are not split.
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
        return [[i for atom in batch for i in atom.members] for batch in _multiple(batches, parts)]
    largest_first = sorted(atoms, key=lambda a: (-a.tokens, a.members))
    room: list[tuple[int, int]] = []  # free tokens and batch, sorted
    for atom in largest_first:
        at = bisect_left(room, (atom.tokens, -1))
        free, batch = room.pop(at) if at < len(room) else (max(micro_tokens, atom.tokens), len(batches))
        if batch == len(batches):
            batches.append([])
        batches[batch].append(atom)
        insort(room, (free - atom.tokens, batch))
    count = min(-(-len(batches) // parts) * parts, len(atoms))
    batches = _even(largest_first, count, micro_tokens) or _multiple(batches, parts)
    return [[i for atom in batch for i in atom.members] for batch in batches]


class _Atom(NamedTuple):
    """A group of examples, which must be in the same micro-batch."""

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


def _multiple(batches: list[list[_Atom]], parts: int) -> list[list[_Atom]]:
    """Halve the largest micro-batches until their number is a multiple of `parts`, or each is a single group."""
    batches = list(batches)
    while len(batches) % parts:
        largest = max(range(len(batches)), key=lambda i: (len(batches[i]) > 1, sum(atom.tokens for atom in batches[i])))
        if len(batches[largest]) == 1:
            break
        batch = batches[largest]
        batches[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return batches


def _even(largest_first: list[_Atom], count: int, micro_tokens: int) -> list[list[_Atom]] | None:
    """Distribute groups over `count` rows, largest first to the emptiest row; None if a row would exceed the limit."""
    batches: list[list[_Atom]] = [[] for _ in range(count)]
    fill = [(0, batch) for batch in range(count)]
    for atom in largest_first:
        tokens, batch = heappop(fill)
        if batches[batch] and tokens + atom.tokens > micro_tokens:
            return None
        batches[batch].append(atom)
        heappush(fill, (tokens + atom.tokens, batch))
    return batches


def collate_tokens(
    examples: Sequence[Example], packed: bool, pad_id: int, pooled: bool = False, multiple: int = 1
) -> Batch:
    """Collate text examples into a micro-batch.

    Label positions are computed here, so that no shape in a step depends on data.

    Args:
        examples: at least one, whose inputs include `input_ids` [T]; all with the same inputs and `columns`. Inputs as
            long as `input_ids` are laid out like the tokens; others are concatenated along their first dimension.
        packed: concatenate all examples in one row; otherwise each example is a row, padded on the right.
        pad_id: token that rows are padded with.
        pooled: the model pools each example to one output, to which the labels apply.
        multiple: a packed row is padded at its end to a multiple of so many tokens.

    Raises:
        ValueError: an example is empty, a label is beyond the end of its example, or columns differ.
    """
    lengths = np.array([len(example.inputs["input_ids"]) for example in examples], dtype=np.int64)
    if not len(lengths) or not lengths.all():
        raise ValueError("collate: there are no examples, or one is empty")
    count, longest = len(lengths), int(lengths.max())
    firsts = np.concatenate([[0], np.cumsum(lengths)[:-1]])  # index of each example's first token in all real tokens
    owner = np.repeat(np.arange(count), lengths)
    position = np.arange(int(lengths.sum())) - firsts[owner]
    # The index of each real token in the flattened [rows, width].
    place = firsts[owner] + position if packed else owner * longest + position
    rows, width = (1, -(-len(place) // multiple) * multiple) if packed else (count, longest)

    def spread(values: np.ndarray, fill: int) -> torch.Tensor:
        grid = np.full((rows * width, *values.shape[1:]), fill, dtype=values.dtype)
        grid[place] = values
        return torch.from_numpy(grid).view(rows, width, *values.shape[1:])

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
    starts = np.arange(count) if pooled else place[firsts]
    offsets = [np.full_like(p, start) if pooled else start + p for p, start in zip(at, starts, strict=True)]
    return _finish(
        examples, inputs, np.concatenate(offsets), spread(owner, -1).flatten(), lengths, rows, width,
        segments=(*firsts.tolist(), len(place)) if packed else (), spread=spread,
    )  # fmt: skip


def collate_rows(examples: Sequence[Example], lengths: Sequence[int]) -> Batch:
    """Stack examples whose inputs have equal shapes into a micro-batch: each is a row with one output position.

    Args:
        examples: at least one; every input is stacked.
        lengths: size of each example, as the task counts it.

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
    groups: list[tuple[int, int]] = []
    for index, example in enumerate(examples):
        same = index > 0 and example.group is not None and example.group == examples[index - 1].group
        start = groups.pop()[0] if same else index
        groups.append((start, index + 1))
    return tuple(groups)


def _column_names(examples: Sequence[Example]) -> list[str]:
    names = list(examples[0].columns)
    for example in examples:
        if set(example.columns) != set(names):
            differ = ", ".join(sorted(set(example.columns) ^ set(names)))
            raise ValueError(f"collate: column {differ} is missing from example {examples[0].key} or {example.key}")
    return names


def _column(
    name: str, examples: Sequence[Example], spread: Callable[[np.ndarray, int], torch.Tensor] | None
) -> torch.Tensor:
    """Collate a column along its axis: [examples, …], [L, …], or like the inputs, padded with zeros."""
    columns = [example.columns[name] for example in examples]
    wrong = next((e for e, c in zip(examples, columns, strict=True) if not isinstance(c, Column)), None)
    if wrong is not None:
        raise ValueError(
            f'collate: column {name} of example {wrong.key} must be a Column, such as Column(values, axis="input")'
        )
    axis = columns[0].axis
    if any(column.axis != axis for column in columns):
        raise ValueError(f"collate: column {name} has different axes: {sorted({column.axis for column in columns})}")
    if axis == "example":
        return torch.from_numpy(np.stack([column.values for column in columns]))
    for example, column in zip(examples, columns, strict=True):
        size = len(example.label_positions) if axis == "label" else len(next(iter(example.inputs.values())))
        if column.values.ndim == 0 or len(column.values) != size:
            raise ValueError(
                f"collate: column {name} of example {example.key} has shape {column.values.shape}; its axis is {axis}, "
                f"so its first dimension must be {size}"
            )
    values = np.concatenate([column.values for column in columns])
    return torch.from_numpy(values) if axis == "label" or spread is None else spread(values, 0)


def pad_share(batch: Batch) -> float:
    """Fraction of the batch's positions that are padding."""
    return 1.0 - sum(batch.lengths) / (batch.rows * batch.width)

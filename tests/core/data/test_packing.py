"""Steps, micro-batches and tensors: nothing lost, nothing twice, nothing over the limit, labels where they belong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.contract.types import Batch, Example
from budwood.data.packing import collate, pad_share, plan_epoch, split_micro

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80).map(np.array)
settings.register_profile("fast", max_examples=60, deadline=None)
settings.load_profile("fast")


@given(LENGTHS, st.integers(1, 200), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_every_example_once_and_no_step_too_large(lengths: np.ndarray, tokens: int, seed: int, epoch: int) -> None:
    steps = plan_epoch(lengths, seed, epoch, batch_tokens=tokens)
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(lengths)))
    for step in steps:
        assert len(step) > 0
        assert lengths[step].sum() <= tokens or len(step) == 1
    smallest, left = 0, -1  # as few as this order of the examples allows
    for length in lengths[np.concatenate(steps)]:
        smallest, left = (smallest, left - length) if left >= length else (smallest + 1, tokens - length)
    assert len(steps) == smallest
    again = plan_epoch(lengths, seed, epoch, batch_tokens=tokens)
    assert all(np.array_equal(one, two) for one, two in zip(steps, again, strict=True))


@given(LENGTHS, st.integers(1, 20))
def test_steps_by_examples_are_even(lengths: np.ndarray, count: int) -> None:
    steps = plan_epoch(lengths, 0, 0, batch_examples=count)
    sizes = [len(step) for step in steps]
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(lengths)))
    assert max(sizes) <= count
    assert max(sizes) - min(sizes) <= 1
    assert len(steps) == -(-len(lengths) // count)


def test_the_last_step_is_no_remainder() -> None:
    lengths = np.full(21, 100)
    assert [len(step) for step in plan_epoch(lengths, 0, 0, batch_tokens=1000)] == [7, 7, 7]
    lengths = np.random.default_rng(0).integers(1, 400, 2000)
    sizes = [int(lengths[step].sum()) for step in plan_epoch(lengths, 0, 0, batch_tokens=4096)]
    assert min(sizes) > 0.75 * max(sizes)
    assert len(sizes) <= 1.1 * lengths.sum() / 4096


def test_order_depends_on_seed_and_epoch() -> None:
    lengths = np.full(50, 3)
    orders = [np.concatenate(plan_epoch(lengths, s, e, batch_examples=8)).tolist() for s in (0, 1) for e in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert plan_epoch(np.array([], dtype=np.int64), 0, 0, batch_examples=8) == []
    for sizes in ({}, {"batch_tokens": 8, "batch_examples": 8}):
        with pytest.raises(ValueError, match="one of the two"):
            plan_epoch(lengths, 0, 0, **sizes)


@given(LENGTHS, st.integers(1, 200), st.booleans(), st.randoms())
def test_micro_batches_hold_everything_within_the_limit(
    lengths: np.ndarray, tokens: int, packed: bool, random: Any
) -> None:
    chosen = [i for i in range(len(lengths)) if random.random() < 0.7]
    batches = split_micro(chosen, lengths, tokens, packed)
    assert sorted(i for batch in batches for i in batch) == chosen
    for batch in batches:
        size = lengths[batch].sum() if packed else len(batch) * lengths[batch].max()
        assert size <= tokens or len(batch) == 1
    random.shuffle(chosen)
    assert split_micro(np.array(chosen, dtype=np.int64), lengths, tokens, packed) == batches


def test_rows_are_few_and_even() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 5_000).astype(int).clip(4, 1024)
    rows = split_micro(range(len(lengths)), lengths, 2048, packed=True)
    assert lengths.sum() / (len(rows) * 2048) > 0.97
    few = split_micro([0, 1, 2, 3], np.array([60, 50, 40, 30]), 100, packed=True)
    assert few == [[0, 3], [1, 2]]  # 90 and 90, not 100 and 80
    assert split_micro([0, 1, 2], np.array([200, 60, 40]), 100, packed=True) == [[0], [1, 2]]


@st.composite
def examples(draw: Any, labels: bool = False) -> list[Example]:
    made = []
    for number in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 9))
        supervised = np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        supervised[0] = False
        tokens = np.array(draw(st.lists(st.integers(1, 99), min_size=length, max_size=length)), dtype=np.int32)
        made.append(Example(10 * number + 3, tokens, supervised, number % 3 if labels else None))
    return made


def labels_by_hand(rows: list[Example]) -> list[tuple[int, int, int]]:
    """(example, position in it, label) of each label."""
    return [
        (e, at - 1, int(row.input_ids[at]))
        for e, row in enumerate(rows)
        for at in range(len(row))
        if row.supervised[at]
    ]


def where(batch: Batch, flat: int) -> tuple[int, int]:
    """(example, position in it) of a place in the flattened batch."""
    return int(batch.example_of_token[flat]), int(batch.position_ids.flatten()[flat])


@given(examples(), st.booleans())
def test_labels_stand_where_they_are_predicted(rows: list[Example], packed: bool) -> None:
    batch = collate(rows, packed, pad_id=0)
    found = [(*where(batch, int(p)), int(y)) for p, y in zip(batch.label_positions, batch.labels, strict=True)]
    assert found == labels_by_hand(rows)
    assert batch.example_of_label.tolist() == [e for e, _, _ in found]
    assert batch.example_ids == tuple(row.id for row in rows)
    assert batch.counts == {"label": len(found), "example": len(rows), "token": sum(map(len, rows))}


@given(examples(), st.booleans())
def test_tokens_and_positions(rows: list[Example], packed: bool) -> None:
    batch = collate(rows, packed, pad_id=77)
    flat, owner = batch.input_ids.flatten(), batch.example_of_token
    for e, row in enumerate(rows):
        assert flat[owner == e].tolist() == row.input_ids.tolist()
        assert batch.position_ids.flatten()[owner == e].tolist() == list(range(len(row)))
    for tensor in (batch.input_ids, batch.position_ids, owner, batch.label_positions, batch.labels):
        assert tensor.dtype == torch.int64
    if packed:
        assert batch.input_ids.shape == (1, sum(map(len, rows)))
        assert batch.segments == tuple(np.cumsum([0, *map(len, rows)]).tolist())
        assert all(type(bound) is int for bound in batch.segments)
        assert batch.attention_mask is None
        assert pad_share(batch) == 0.0
        return
    assert batch.input_ids.shape == (len(rows), max(map(len, rows)))
    assert batch.segments == ()
    assert batch.attention_mask is not None
    assert batch.attention_mask.dtype == torch.bool
    assert torch.equal(batch.attention_mask.flatten(), owner >= 0)
    assert set(flat[owner < 0].tolist()) <= {77}
    assert pad_share(batch) == pytest.approx(float((owner < 0).float().mean()), abs=1e-6)
    starts = [int((owner == e).nonzero()[0]) for e in range(len(rows))]
    assert starts == [e * batch.input_ids.shape[1] for e in range(len(rows))]  # padded on the right


@given(examples(labels=True), st.sampled_from([(True, "last"), (False, "last"), (False, "row")]))
def test_classes(rows: list[Example], how: tuple[bool, Any]) -> None:
    packed, pool = how
    batch = collate(rows, packed, 0, pool)
    assert batch.labels.tolist() == [row.label for row in rows]
    assert batch.example_of_label.tolist() == list(range(len(rows)))
    if pool == "row":
        assert batch.label_positions.tolist() == list(range(len(rows)))
    else:
        assert [where(batch, int(p)) for p in batch.label_positions] == [(e, len(r) - 1) for e, r in enumerate(rows)]


@given(examples(), st.booleans())
def test_columns(rows: list[Example], packed: bool) -> None:
    for number, row in enumerate(rows):
        row.columns["score"] = np.float32(number)
        row.columns["weights"] = row.input_ids.astype(np.float32) / 2
        row.columns["vectors"] = np.stack([row.input_ids, -row.input_ids], axis=1).astype(np.int64)
    batch = collate(rows, packed, pad_id=0)
    assert batch.columns["score"].tolist() == list(range(len(rows)))
    assert torch.equal(batch.columns["weights"], batch.input_ids / 2)
    assert batch.columns["weights"].dtype == torch.float32
    assert torch.equal(batch.columns["vectors"], torch.stack([batch.input_ids, -batch.input_ids], dim=-1))


def example(*tokens: int, number: int = 5, supervised: int = 1, **columns: np.ndarray) -> Example:
    return Example(number, np.array(tokens, np.int32), np.arange(len(tokens)) >= supervised, columns=columns)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "no example"),
        ([example()], {}, "empty one"),
        ([example(1, 2), example(3, 4, number=9, supervised=0)], {}, "first token of example 9 is supervised"),
        ([example(1, 2)], {"pool": "last"}, "example 5 has no label"),
        ([example(1, 2)], {"pool": "row"}, "pools by row"),
        ([example(1, x=np.array(1)), example(2)], {}, "column x is not in all"),
        ([example(1, 2, x=np.zeros(3))], {}, r"column x of example 5 has shape \(3,\)"),
        ([example(1, x=np.zeros(1)), example(2, x=np.array(1))], {}, r"column x of example 5 has shape \(\)"),
    ],
)
def test_what_cannot_be_collated(rows: list[Example], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate(rows, **{"packed": True, "pad_id": 0, **options})


def test_the_batch_shares_no_memory_with_the_examples() -> None:
    row = example(1, 2, 3)
    batch = collate([row], packed=True, pad_id=0)
    batch.input_ids.zero_()
    assert row.input_ids.tolist() == [1, 2, 3]

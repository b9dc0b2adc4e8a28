"""Optimizer steps, micro-batches and tensors: completeness, size limits and label positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood.contract.examples import Batch, Column, Example
from budwood.data.packing import collate_tokens, pad_share, plan_epoch, split_micro

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80).map(np.array)
settings.register_profile("fast", max_examples=60, deadline=None)
settings.load_profile("fast")


@given(LENGTHS, st.integers(1, 200), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_each_example_is_in_one_step_within_the_limit(lengths: np.ndarray, tokens: int, seed: int, epoch: int) -> None:
    steps = plan_epoch(lengths, seed, epoch, batch_tokens=tokens)
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(lengths)))
    for step in steps:
        assert len(step) > 0
        assert lengths[step].sum() <= tokens or len(step) == 1
    smallest, left = 0, -1  # the minimum number of steps for this order
    for length in lengths[np.concatenate(steps)]:
        smallest, left = (smallest, left - length) if left >= length else (smallest + 1, tokens - length)
    assert len(steps) == smallest
    again = plan_epoch(lengths, seed, epoch, batch_tokens=tokens)
    assert all(np.array_equal(one, two) for one, two in zip(steps, again, strict=True))


@given(LENGTHS, st.integers(1, 20))
def test_steps_by_examples_have_equal_sizes(lengths: np.ndarray, count: int) -> None:
    steps = plan_epoch(lengths, 0, 0, batch_examples=count)
    sizes = [len(step) for step in steps]
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(lengths)))
    assert max(sizes) <= count
    assert max(sizes) - min(sizes) <= 1
    assert len(steps) == -(-len(lengths) // count)


def test_the_last_step_is_not_a_small_remainder() -> None:
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
        with pytest.raises(ValueError, match="exactly one of"):
            plan_epoch(lengths, 0, 0, **sizes)


@given(LENGTHS, st.integers(1, 200), st.booleans(), st.randoms())
def test_micro_batches_contain_every_example_within_the_limit(
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
    shared = split_micro(chosen, lengths, tokens, packed, parts=3)
    assert sorted(i for batch in shared for i in batch) == sorted(chosen)
    assert len(shared) % 3 == 0 or all(len(batch) == 1 for batch in shared)
    for batch in shared:
        size = lengths[batch].sum() if packed else len(batch) * lengths[batch].max()
        assert size <= tokens or len(batch) == 1


def test_the_number_of_rows_is_small_and_their_sizes_are_similar() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 5_000).astype(int).clip(4, 1024)
    rows = split_micro(range(len(lengths)), lengths, 2048, packed=True)
    assert lengths.sum() / (len(rows) * 2048) > 0.97
    few = split_micro([0, 1, 2, 3], np.array([60, 50, 40, 30]), 100, packed=True)
    assert few == [[0, 3], [1, 2]]  # 90 and 90, not 100 and 80
    assert split_micro([0, 1, 2], np.array([200, 60, 40]), 100, packed=True) == [[0], [1, 2]]


def text(ids: Any, at: Any, key: Any = 5, label: int | None = None, **more: Any) -> Example:
    """Return an example of token ids with labels after the positions `at`; with `label`, one class at the end."""
    tokens = np.asarray(ids, dtype=np.int32)
    if label is not None:
        where, labels = np.array([len(tokens) - 1]), np.array([label])
    else:
        where = np.asarray(at, dtype=np.int64)
        labels = tokens[where + 1]
    weights = more.pop("weights", np.ones(len(where), dtype=np.float32))
    return Example({"input_ids": tokens}, where, labels, weights, key=key, **more)


@st.composite
def examples(draw: Any, labels: bool = False) -> list[Example]:
    made = []
    for number in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 9))
        supervised = np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        supervised[0] = False
        tokens = draw(st.lists(st.integers(1, 99), min_size=length, max_size=length))
        at, key = np.flatnonzero(supervised) - 1, 10 * number + 3
        made.append(text(tokens, at, key, number % 3 if labels else None))
    return made


def ids_of(row: Example) -> list[int]:
    return row.inputs["input_ids"].tolist()


def size(row: Example) -> int:
    return len(row.inputs["input_ids"])


def expected_labels(rows: list[Example]) -> list[tuple[int, int, int]]:
    """Return (example, position in it, label) of each label."""
    return [(e, int(at), ids_of(row)[at + 1]) for e, row in enumerate(rows) for at in row.label_positions]


def where(batch: Batch, flat: int) -> tuple[int, int]:
    """Return (example, position in it) of an index into the flattened batch."""
    return int(batch.example_of_position[flat]), int(batch.inputs["position_ids"].flatten()[flat])


@given(examples(), st.booleans())
def test_label_positions_are_those_that_predict_the_labels(rows: list[Example], packed: bool) -> None:
    batch = collate_tokens(rows, packed, pad_id=0)
    labels = [(*where(batch, int(p)), int(y)) for p, y in zip(batch.label_positions, batch.labels, strict=True)]
    assert labels == expected_labels(rows)
    assert batch.example_of_label.tolist() == [e for e, _, _ in labels]
    assert batch.keys == tuple(row.key for row in rows)
    assert batch.groups == tuple((e, e + 1) for e in range(len(rows)))
    tokens = sum(map(size, rows))
    assert batch.counts == {"label": len(labels), "example": len(rows), "group": len(rows), "token": tokens}


@given(examples(), st.booleans(), st.sampled_from([1, 8]))
def test_tokens_and_positions(rows: list[Example], packed: bool, multiple: int) -> None:
    batch = collate_tokens(rows, packed, pad_id=77, multiple=multiple)
    ids, positions, owner = batch.inputs["input_ids"], batch.inputs["position_ids"], batch.example_of_position
    flat = ids.flatten()
    for e, row in enumerate(rows):
        assert flat[owner == e].tolist() == ids_of(row)
        assert positions.flatten()[owner == e].tolist() == list(range(size(row)))
    for tensor in (ids, positions, owner, batch.label_positions, batch.labels):
        assert tensor.dtype == torch.int64
    assert ids.shape == (batch.rows, batch.width)
    if packed:
        tokens = sum(map(size, rows))
        assert batch.width % multiple == 0 and tokens <= batch.width < tokens + multiple
        assert set(flat[tokens:].tolist()) <= {77} and set(owner[tokens:].tolist()) <= {-1}
        assert batch.segments == tuple(np.cumsum([0, *map(size, rows)]).tolist())
        assert all(type(bound) is int for bound in batch.segments)
        assert "attention_mask" not in batch.inputs
        assert pad_share(batch) == pytest.approx(1 - tokens / batch.width)
        return
    assert ids.shape == (len(rows), max(map(size, rows)))
    assert batch.segments == ()
    mask = batch.inputs["attention_mask"]
    assert mask.dtype == torch.bool
    assert torch.equal(mask.flatten(), owner >= 0)
    assert set(flat[owner < 0].tolist()) <= {77}
    assert pad_share(batch) == pytest.approx(float((owner < 0).float().mean()), abs=1e-6)
    starts = [int((owner == e).nonzero()[0]) for e in range(len(rows))]
    assert starts == [e * ids.shape[1] for e in range(len(rows))]  # padded on the right


@given(examples(labels=True), st.sampled_from([(True, False), (False, False), (False, True)]))
def test_classes(rows: list[Example], layout: tuple[bool, bool]) -> None:
    packed, pools = layout
    batch = collate_tokens(rows, packed, 0, pools)
    assert batch.labels.tolist() == [int(row.labels[0]) for row in rows]
    assert batch.example_of_label.tolist() == list(range(len(rows)))
    if pools:
        assert batch.label_positions.tolist() == list(range(len(rows)))
    else:
        assert [where(batch, int(p)) for p in batch.label_positions] == [(e, size(r) - 1) for e, r in enumerate(rows)]


@given(examples(), st.booleans())
def test_columns(rows: list[Example], packed: bool) -> None:
    for number, row in enumerate(rows):
        ids = row.inputs["input_ids"]
        row.columns["score"] = Column(np.float32(number))
        row.columns["halves"] = Column(ids.astype(np.float32) / 2, "input")
        row.columns["vectors"] = Column(np.stack([ids, -ids], axis=1).astype(np.int64), "input")
        row.columns["old"] = Column(row.labels * 2, "label")
    batch = collate_tokens(rows, packed, pad_id=0)
    ids = batch.inputs["input_ids"]
    assert batch.columns["score"].tolist() == list(range(len(rows)))
    assert torch.equal(batch.columns["halves"], ids / 2)
    assert batch.columns["halves"].dtype == torch.float32
    assert torch.equal(batch.columns["vectors"], torch.stack([ids, -ids], dim=-1))
    assert batch.columns["old"].tolist() == (2 * batch.labels).tolist()


def test_weights_are_summed_in_float64() -> None:
    weights = np.array([0.1, 0.2], dtype=np.float32)
    batch = collate_tokens([text([1, 2, 3], [0, 1], weights=weights)], packed=True, pad_id=0)
    assert batch.weights.tolist() == weights.tolist()
    assert batch.counts["label"] == float(weights.astype(np.float64).sum())


GROUPED = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4])


@pytest.mark.parametrize("sizes", [{"batch_examples": 2}, {"batch_tokens": 12}])
def test_groups_stay_together_and_in_order(sizes: dict[str, int]) -> None:
    lengths = np.array([3, 4, 5, 2, 2, 2, 6, 1, 9])
    for epoch in range(5):
        steps = plan_epoch(lengths, 0, epoch, **sizes, groups=GROUPED)
        assert sorted(np.concatenate(steps).tolist()) == list(range(9))
        for step in steps:
            micro = [
                split_micro(step, lengths, tokens, packed, GROUPED) for tokens in (4, 12) for packed in (True, False)
            ]
            for batch in (step.tolist(), *(batch for batches in micro for batch in batches)):
                for group in set(GROUPED[batch].tolist()):
                    members = np.flatnonzero(group == GROUPED).tolist()
                    at = batch.index(members[0])
                    assert batch[at : at + len(members)] == members
            if "batch_examples" in sizes:
                assert len(set(GROUPED[step].tolist())) <= 2  # the limit counts groups
    pair = [text([1, 2], [0], key=0, group=7), text([3, 4], [0], key=1, group=7), text([5, 6], [0], key=2, group=8)]
    assert collate_tokens(pair, packed=True, pad_id=0).groups == ((0, 2), (2, 3))


def test_a_group_above_the_limit_is_a_micro_batch_by_itself() -> None:
    lengths = np.array([3, 3, 3, 2])
    assert split_micro([0, 1, 2, 3], lengths, 4, True, np.array([0, 0, 0, 1])) == [[0, 1, 2], [3]]
    assert split_micro([0, 1, 2, 3], lengths, 4, False, np.array([0, 0, 0, 1])) == [[0, 1, 2], [3]]


def example(*tokens: int, number: int = 5, **columns: Any) -> Example:
    return text(tokens, np.arange(len(tokens) - 1), number, columns=columns)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "there are no examples"),
        (
            [Example({"input_ids": np.zeros(0, np.int32)}, np.zeros(0, int), np.zeros(0), np.zeros(0))],
            {},
            "one is empty",
        ),
        ([replace(text([1, 2], [0]), label_positions=np.array([2]), key=9)], {}, "example 9 has a label at 2 of 2"),
        ([example(1, x=Column(1)), example(2)], {}, "column x is missing from"),
        ([example(1, 2, x=Column(np.zeros(3), "input"))], {}, r"column x of example 5 has shape \(3,\)"),
        ([example(1, 2, x=Column(np.zeros(2), "label"))], {}, r"shape \(2,\); its axis is label"),
        ([example(1, x=np.zeros(1))], {}, "must be a Column"),
        ([example(1, x=Column(np.zeros(1), "input")), example(2, x=Column(1))], {}, "column x has different axes"),
    ],
)
def test_invalid_examples_are_not_collated(rows: list[Example], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate_tokens(rows, **{"packed": True, "pad_id": 0, **options})


def test_the_batch_shares_no_memory_with_the_examples() -> None:
    row = example(1, 2, 3)
    batch = collate_tokens([row], packed=True, pad_id=0)
    batch.inputs["input_ids"].zero_()
    assert ids_of(row) == [1, 2, 3]

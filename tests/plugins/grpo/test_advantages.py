"""Advantages against the papers' formulas, written out answer by answer."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from budwood_grpo.advantages import EPSILON, advantages

REWARDS = np.array([[1.0, 0.0, 0.5, 0.0], [2.0, 2.0, 2.0, 2.0], [0.25, -1.0, 3.0, 0.0]])
LENGTHS = np.array([3, 1, 2, 4, 2, 2, 1, 3, 5, 1, 2, 2])


def alone(values: np.ndarray) -> np.ndarray:
    """Return the values of all processes, if there is one."""
    return values


@pytest.mark.parametrize("baseline", ["group", "leave-one-out", "none"])
@pytest.mark.parametrize("scale", ["group", "batch", "advantages", "none"])
def test_the_advantage_of_an_answer(baseline: str, scale: str) -> None:
    everything = REWARDS.ravel().tolist()
    expected = []
    for group in REWARDS.tolist():
        for index, reward in enumerate(group):
            others = [r for at, r in enumerate(group) if at != index]
            base = {"group": statistics.mean(group), "leave-one-out": statistics.mean(others), "none": 0.0}[baseline]
            by = {"group": statistics.stdev(group), "batch": statistics.stdev(everything)}.get(scale)
            expected.append((reward - base) / (by + EPSILON if by is not None else 1.0))
    if scale == "advantages":
        mean, spread = statistics.mean(expected), statistics.stdev(expected)
        expected = [(value - mean) / (spread + EPSILON) for value in expected]
    result = advantages(REWARDS, LENGTHS, baseline, scale, alone)
    assert [len(values) for values in result] == LENGTHS.tolist()
    for values, value in zip(result, expected, strict=True):
        np.testing.assert_allclose(values, value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", ["advantages", "none"])
def test_a_penalty_lowers_the_return_of_its_token_and_of_all_before_it(scale: str) -> None:
    draw = np.random.default_rng(0)
    penalties = [draw.normal(size=length) for length in LENGTHS]
    expected = [
        [reward - sum(penalty[at:].tolist()) for at in range(len(penalty))]
        for reward, penalty in zip(REWARDS.ravel().tolist(), penalties, strict=True)
    ]
    if scale == "advantages":
        tokens = [value for answer in expected for value in answer]
        mean, spread = statistics.mean(tokens), statistics.stdev(tokens)
        expected = [[(value - mean) / (spread + EPSILON) for value in answer] for answer in expected]
    result = advantages(REWARDS, LENGTHS, "none", scale, alone, penalties)
    for values, value in zip(result, expected, strict=True):
        np.testing.assert_allclose(values, value, rtol=0, atol=1e-12)


def test_one_sample_and_equal_rewards_have_an_advantage_of_zero() -> None:
    for scale in ("batch", "advantages"):
        (value,) = advantages(np.array([[3.0]]), np.array([2]), "none", scale, alone)
        assert np.isfinite(value).all()
    equal = advantages(np.full((2, 3), 0.7), np.full(6, 2), "group", "group", alone)
    assert max(np.abs(values).max() for values in equal) < 1e-10  # the rounding of a mean, divided by 1e-4


def test_statistics_of_a_set_cover_all_processes() -> None:
    whole = advantages(REWARDS, LENGTHS, "none", "advantages", alone)
    halves = (REWARDS[:1], REWARDS[1:])
    shares = [
        advantages(half, LENGTHS[start : start + half.size], "none", "advantages", lambda _: REWARDS.ravel())
        for half, start in zip(halves, (0, 4), strict=True)
    ]
    for values, value in zip([*shares[0], *shares[1]], whole, strict=True):
        np.testing.assert_allclose(values, value, rtol=0, atol=1e-12)

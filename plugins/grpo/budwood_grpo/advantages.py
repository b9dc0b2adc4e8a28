"""Advantages of sampled answers, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Gather = Callable[[np.ndarray], np.ndarray]
"""Concatenates an array [n] over all processes."""
EPSILON = 1e-4
"""Added to a standard deviation before dividing by it, as TRL does."""


def centre(rewards: np.ndarray, baseline: str) -> np.ndarray:
    """Subtract the baseline from rewards [prompts, samples].

    "group": the mean of the prompt's samples (Shao et al., 2024, section 4.1.2). "leave-one-out": the mean of its other
    samples (RLOO; Ahmadian et al., 2024). "none": 0.
    """
    if baseline == "none":
        return rewards
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    samples = rewards.shape[1]
    return centred * (samples / (samples - 1)) if baseline == "leave-one-out" else centred


def advantages(
    rewards: np.ndarray,
    lengths: np.ndarray,
    baseline: str,
    scale: str,
    gather: Gather,
    penalties: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Return the advantage of each token of each answer, prompt by prompt.

    Args:
        rewards: [prompts, samples], with the KL subtracted if it is part of the answer's reward.
        lengths: [prompts · samples] tokens of each answer.
        baseline: see `centre`.
        scale: "group", "batch": divide by the rewards' standard deviation in the prompt or in the whole set;
            "advantages": subtract the mean of the set's advantages, and divide by their standard deviation; "none".
        gather: for "batch" and "advantages".
        penalties: of each token of each answer [T]; each token's return is its answer's centred reward less the
            penalties from this token on ("REINFORCE++"; Hu et al., 2025). "advantages" then counts tokens,
            otherwise answers.
    """
    values = centre(rewards, baseline)
    if scale == "group":
        values = values / (deviation(rewards, axis=1)[:, None] + EPSILON)
    elif scale == "batch":
        values = values / (deviation(gather(rewards.ravel())) + EPSILON)
    flat = values.ravel()
    if penalties is None:
        if scale == "advantages":
            flat = normalise(flat, gather(flat))
        return [np.full(length, value) for value, length in zip(flat, lengths, strict=True)]
    per_token = [value - np.cumsum(penalty[::-1])[::-1] for value, penalty in zip(flat, penalties, strict=True)]
    if scale == "advantages":
        everywhere = gather(np.concatenate([np.zeros(0), *per_token]))
        return [normalise(value, everywhere) for value in per_token]
    return per_token


def normalise(values: np.ndarray, everywhere: np.ndarray) -> np.ndarray:
    """Subtract the mean of `everywhere` and divide by its standard deviation."""
    return (values - everywhere.mean()) / (deviation(everywhere) + EPSILON) if len(values) else values


def deviation(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Return the standard deviation with n - 1 in the denominator; 0 of a single value."""
    count = values.size if axis is None else values.shape[axis]
    if count < 2:
        return np.zeros(np.delete(values.shape, axis) if axis is not None else ())
    return np.asarray(np.std(values, axis=axis, ddof=1))

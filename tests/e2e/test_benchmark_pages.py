"""The pages of `benchmarks.defaults` and `benchmarks.evidence` say what speaks against Budwood."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks import defaults_page, evidence_page


def test_a_default_that_learns_nothing_is_seen_although_the_ratio_is_high() -> None:
    settings = ["default", *(f'{{"steps": {number}}}' for number in range(4))]
    runs: dict[str, Any] = {
        f"long text/50/{strategy}/{setting}": {"score": score, "used": {"learning_rate": 1e-3}, "steps": 8}
        for strategy, scores in (("lora", [0.49, 0.5, 0.4, 0.4, 0.4]), ("fgm", [0.48, 0.5, 0.4, 0.4, 0.4]))
        for setting, score in zip(settings, scores, strict=True)
    }
    lines, ratios, gains = defaults_page.table(runs, {"long text": 0.48})
    assert ratios == pytest.approx([0.98, 0.96]) and gains == pytest.approx([0.5, 0.0])
    assert lines[2].endswith("| 0.980 | 0.480 | 0.50 |") and not defaults_page.holds(ratios, gains)
    assert defaults_page.holds(ratios, [0.5, 0.3]) and not defaults_page.holds(ratios, [])
    assert "the lowest share is 0.00 (due: above 0)" in defaults_page.verdict(ratios, gains)


def test_runs_that_answer_with_the_most_frequent_class_are_named() -> None:
    scores = {"lora": (0.7, 0.555, 0.71), "adalora": (0.72, 0.74, 0.73), "adalora-7": (0.72, 0.75, 0.71)}
    result = {
        "settings": {"sets": {"tweets": {}}, "trials": {"tweets": {arm: [{}] for arm in scores}}}, "trials": {},
        "finals": {f"tweets/{arm}/0/{seed}": {"clean": s} for arm, row in scores.items() for seed, s in enumerate(row)},
        "frequent": {"tweets": 0.55},
    }  # fmt: skip
    text = evidence_page._failed(result)
    assert "55.0 % of the rows; at most a point above it are 1 of LoRA, rank 8." in text
    assert "AdaLoRA, rank 12 to 8 +2.0" in text
    assert evidence_page._failed({**result, "frequent": {"tweets": 0.5}}) == ""

"""The benchmark of what continues a short SFT: its rows, its arms on a tiny base, its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import after_sft, after_sft_page


def test_seeds_share_no_row_with_the_choice_of_settings() -> None:
    base = after_sft.BASES["smollm2"]
    parts = [[{row["prompt"] for row in part} for part in after_sft.draw(base, seed)] for seed in (0, 1, 1000)]
    held, tried = parts[0][2], parts[2][2]
    assert held == parts[1][2] and len(tried) > 290, "texts that occur twice are few"
    for start, more, _ in parts:
        assert len(more & tried) <= 3 and len(start & tried) <= 3, "the same text under two packages"
    assert all(row["rejected"] != row["chosen"] for row in after_sft.draw(base, 0)[1])


def test_arms_continue_the_start(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = {"dpo": [after_sft.paired(1e-3)], "grpo": [after_sft.rewarded(1e-2, rewards=[{"length": {"target": 3}}])]}
    small = replace(
        after_sft.BASES["demo"], folder=lambda: tiny_base, shown=8, steps=1, batch=8, held_out=6, trials=trials
    )
    monkeypatch.setitem(after_sft.BASES, "demo", small)
    monkeypatch.setattr(after_sft, "DEV", 6)
    monkeypatch.setattr(after_sft_page, "NAMES", {"dpo": "`dpo`", "grpo": "`grpo`"})
    out = tmp_path / "out.json"
    runs = after_sft.Runs("demo", tmp_path, out)
    runs.run(["dpo"], [0])
    found = json.loads(out.read_text())["demo"]
    assert found["trials"]["dpo"].keys() == {"rate 0.001, beta 0.1, rejected sampled"}
    assert found["finals"]["0"]["start"]["eval_accuracy"] == 0.5, "the reference is the start, not the base"
    runs.run(["dpo", "grpo"], [0])
    again = json.loads(out.read_text())["demo"]
    assert again["finals"]["0"].keys() == {"start", "dpo", "grpo"}
    assert again["finals"]["0"]["dpo"] == found["finals"]["0"]["dpo"], "a run that is there is not repeated"
    assert again["finals"]["0"]["grpo"]["eval_right"] == 0
    assert "| `grpo` | 0.0 | " in after_sft_page.section(json.loads(out.read_text()))


def test_differences_are_paired() -> None:
    finals = {
        str(seed): {"start": {"x": 0.1 * seed}, "dpo": {"x": 0.1 * seed + gain}}
        for seed, gain in ((0, 0.01), (5, 0.03))
    }
    finals["7"] = {"start": {"x": 9.0}}
    assert after_sft_page.difference(finals, "dpo", "start", "x", 100) == "+2.0 ± 1.0"

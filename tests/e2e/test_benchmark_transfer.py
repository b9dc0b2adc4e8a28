"""The benchmark of masked language modelling before a classification: its runs on a tiny base, and its page."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import transfer, transfer_page

from budwood.testing import tiny_encoder


def test_both_arms_train_on_the_rows_of_their_seed(tmp_path: Path) -> None:
    small = {"rows": 20, "steps": 1, "epochs": 1, "rates": [2e-3], "heldout": 20, "texts": 16, "eval": 10, "rank": 2}
    result = {"settings": {**transfer.SETTINGS, **small}, "machine": {"processor": "one"}, "runs": {}}
    saved: list[str] = []
    base = tiny_encoder(tmp_path / "base", ["data files for the runtime"])
    benchmark = transfer.Benchmark(result, tmp_path, base, lambda result: saved.append(json.dumps(result)))
    assert not benchmark.run(1, -1.0) and not saved, "no run starts after the time is over"
    assert benchmark.run(1, 600.0)
    runs = ["trial/without/0.002", "pretraining/0", "trial/with/0.002", "final/without/0", "final/with/0"]
    assert [*json.loads(saved[-1])["runs"]] == runs and len(saved) == 5
    made = json.loads((tmp_path / "with-0" / "adapter" / "budwood.json").read_text())
    parent = json.loads((tmp_path / "pretraining-0" / "adapter" / "budwood.json").read_text())
    assert made["parent"]["weights"] == parent["files"]["adapter_model.safetensors"]
    assert benchmark.run(1, 600.0) and len(saved) == 5, "a run that is there is not repeated"
    held = {json.loads(line)["text"] for line in (tmp_path / "heldout.jsonl").read_text().splitlines()}
    drawn = [json.loads(line)["text"] for line in (tmp_path / "train-0.jsonl").read_text().splitlines()]
    assert len(drawn) == 20 and len(held & {*drawn}) <= 1, "the same text under two packages"


def test_differences_are_paired_by_seed() -> None:
    runs = {f"final/without/{seed}": {"accuracy": 0.5 + seed / 10, "macro_f1": 0.4} for seed in range(3)}
    runs |= {f"final/with/{seed}": {"accuracy": 0.52 + seed / 10, "macro_f1": 0.4} for seed in range(3)}
    runs |= {f"trial/{arm}/{rate:g}": {"accuracy": rate} for arm in transfer_page.ARMS for rate in (0.1, 0.2)}
    runs["pretraining/0"] = {"before": 9.0, "after": 5.0}
    runs = {key: {"seconds": 1.0, **values} for key, values in runs.items()}
    settings = {**transfer.SETTINGS, "texts": 9, "eval": 8}
    page = transfer_page.section({"settings": settings, "machine": {"processor": "one"}, "runs": runs})
    assert "| difference |  |  | +2.0 ± 0.0, better | +0.0 ± 0.0, not shown |" in page
    assert "falls from 9.00 to 5.00" in page and "| a new adapter | 0.2 | 3 | 60.0 ± 10.0 |" in page
    assert max(map(len, page.splitlines())) <= 120

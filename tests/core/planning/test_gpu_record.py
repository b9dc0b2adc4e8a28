"""`make gpu-record` on a CPU: every stage runs, and the commands of the last one exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import gpu_record, train


def test_every_stage_runs_on_a_cpu_with_tiny_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert gpu_record.main(["--dry", "--out", str(tmp_path)]) == 0
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in gpu_record.STAGES}
    assert not any("failed" in stage or stage.get("late") for stage in found.values())
    assert capsys.readouterr().out.count("done after") == len(gpu_record.STAGES)
    assert set(found["layers"]) > {f"64 tokens, recomputed, {name}" for name in ("halves", "modules")}
    for stage in found["train"].values():
        if isinstance(stage, dict):
            chosen = train.make_parser().parse_args(stage["command"][3:])
            assert chosen.warmup >= 3 and chosen.steps >= 5 and len(chosen.arms) == 1


def test_a_stage_that_fails_or_is_late_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(bench: gpu_record.Bench) -> dict[str, object]:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_record, "STAGES", {"broken": broken, "after": lambda bench: {"fine": True}})
    bench = gpu_record.Bench(True, tmp_path, 60)
    found = gpu_record.record(bench, ["broken", "after"])
    assert "no kernel image" in found["broken"]["failed"] and found["after"]["fine"]
    bench.limit = 0
    assert gpu_record.record(bench, ["after"])["after"]["late"]


def test_without_a_gpu_nothing_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert gpu_record.main(["--out", str(tmp_path / "out")]) == 3
    assert "no CUDA device" in capsys.readouterr().err and not (tmp_path / "out").exists()

"""Budwood's arms of the benchmarks run on the current core; their measurements are not checked."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from benchmarks import adalora, adversarial, arms
from benchmarks import workload as w

SMALL = w.Size(1, 32, 48, 4, 2, 300)


@pytest.fixture
def workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> w.Workload:
    """Two steps of a tiny model."""
    monkeypatch.setattr(w, "EXAMPLES_PER_STEP", 4)
    return w.build(tmp_path / "workload", 2, SMALL)


def test_training(workload: w.Workload) -> None:
    losses: list[float] = []

    class Pace:
        def ready(self) -> None:
            losses.append(math.nan)

        def stepped(self, loss: float) -> None:
            losses.append(loss)

    arms.budwood(workload, 2, Pace())
    assert len(losses) == 3 and all(map(math.isfinite, losses[1:]))


@pytest.mark.parametrize("name", adversarial.ARMS)
def test_adversarial_training(workload: w.Workload, tmp_path: Path, name: str) -> None:
    arm = adversarial.Arm(adversarial.ARMS[name][0], workload, tmp_path / "run", 2)
    arm.step()
    arm.step()
    assert arm.run.step == 2 and len(arm.wall) == len(arm.processor) == 2


def test_adalora(workload: w.Workload) -> None:
    pauses: list[None] = []
    strategy = {"adalora": {"initial_rank": 4, "target_rank": 2, "initial_phase": 0, "final_phase": 1, "interval": 1}}
    adalora.budwood(workload, strategy, 2, "run", lambda: pauses.append(None))
    assert len(pauses) == 3

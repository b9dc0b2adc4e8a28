"""Plans against runs on a CUDA device: `make gpu`. What needs none of it runs on the CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks import plan_cuda
from benchmarks.plan import describe_base
from benchmarks.plan_cuda import CASES, compare_case, compared, is_within

from budwood.planning.devices import find_device
from budwood.recipe.schema import Recipe
from budwood.testing.allocations import measured_peak_cuda


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases and rows, shared by all cases."""
    return tmp_path_factory.mktemp("plan-cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_that_of_a_real_run_on_cuda(name: str, folder: Path):
    needed = 12e9 if name.startswith("1B") else 30e9
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free CUDA memory, and {free / 1e9:.0f} GB are free")
    row = compare_case(name, folder)
    assert is_within(row), row


def test_the_comparison_runs_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on CUDA, at a tiny shape: the counters are made up, and the steps are those of the CPU."""
    card = find_device("H200")
    monkeypatch.setitem(plan_cuda.SHAPES, "1B", (64, 128, 2, 8))
    monkeypatch.setattr(plan_cuda, "describe_base", partial(describe_base, vocabulary=600))
    monkeypatch.setattr(plan_cuda, "find_device", lambda name: card)
    calls: list[str] = []

    def measure(recipe: Recipe) -> tuple[int, int]:
        assert recipe.base.device == "cuda"
        base = recipe.base.model_copy(update={"device": "cpu"})
        return measured_peak_cuda(recipe.model_copy(update={"base": base}))

    monkeypatch.setattr(plan_cuda, "measured_peak_cuda", measure)
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    for name, value in (("memory_allocated", 5), ("memory_reserved", 7)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
        monkeypatch.setattr(torch.cuda, f"max_{name}", lambda value=value: 1000 + value)
    row = compare_case("1B, lora, nf4", tmp_path, words=3)
    assert (row["allocated"], row["reserved"]) == (1000, 1000) and not is_within(row)
    assert calls.count("reset_peak_memory_stats") == 2 and calls[-1] == "synchronize"
    assert is_within(compared(100, 104, 109, "")) and not is_within(compared(100, 106, 109, ""))
    assert not is_within(compared(100, 104, 112, ""))

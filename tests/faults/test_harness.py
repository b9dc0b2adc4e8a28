"""A sample of `make faults`, and a check that it detects losses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from budwood.errors import ResourceError
from budwood.training.durability import checkpoint
from budwood.training.loop import tune

from .disk import Disk
from .harness import Outcome, incomplete, tally

Make = Callable[..., Any]
ROOT = Path(__file__).parents[2]


def test_a_run_survives_a_sample_of_the_faults(forked: None) -> None:
    """Kills, a failing disk, corrupt files, environment faults: `make faults` tries them all."""
    command = [sys.executable, "-m", "tests.faults", "kills", "disk", "damage", "surroundings"]
    done = subprocess.run(
        [*command, "--kills", "1", "--every", "151", "--workers", "1"], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    table = {line[:30].split("  ")[0]: line.split()[-3:] for line in done.stdout.splitlines()}
    assert table["fault"] == ["tried", "survived", "lost"]
    assert int(table["all"][0]) >= 8 and table["all"][2] == "0"
    assert {kind.split(":")[0].split(" ")[0] for kind in table} >= {
        "SIGKILL", "EIO", "ENOSPC", "checkpoint", "adapter", "surroundings",
    }  # fmt: skip


def test_the_table_counts_and_lists_what_was_lost() -> None:
    table, lost = tally([Outcome("kill", "1"), Outcome("kill", "2", "bytes differ"), Outcome("disk", "3")])
    assert lost == 1
    rows = [line.split() for line in table.splitlines()]
    assert rows[1:4] == [["kill", "2", "1", "1"], ["disk", "1", "1", "0"], ["all", "3", "2", "1"]]
    assert rows[4][:2] == ["lost:", "kill:"]


class BadState(Disk):
    """Lets the first write of a checkpoint's state.json fail halfway."""

    def fails(self, operation: str, path: Any) -> bool:
        if self.failed or operation != "write" or not str(path).endswith("state.json"):
            return False
        self.failed.append(str(path))
        return True


def test_the_harness_detects_writing_in_place(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """If checkpoints are written in place, a failing write leaves an incomplete one."""

    @contextmanager
    def in_place(directory: Path, **_: Any) -> Iterator[Path]:
        directory.mkdir(parents=True, exist_ok=True)
        yield directory

    def problem(output: str) -> str:
        recipe = make_recipe(output, train={"steps": 2, "save_every": 1})
        with BadState(recipe.output).failing(), pytest.raises((OSError, ResourceError), match="error"):
            tune(recipe, quiet=True)
        return incomplete(recipe.output)

    assert problem("complete-or-absent") == ""
    monkeypatch.setattr(checkpoint, "complete_directory", in_place)
    assert "step-00000001: " in problem("in-place")

"""A sample of `make faults`, and that it would notice what it looks for."""

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
from .harness import Outcome, tally, unsound

Make = Callable[..., Any]
ROOT = Path(__file__).parents[2]


def test_a_sample_of_the_faults_is_survived() -> None:
    """Kills, a failing disk, damaged files, a terminal that goes: `make faults` tries them all."""
    command = [sys.executable, "-m", "tests.faults", "kills", "disk", "damage", "surroundings"]
    done = subprocess.run(
        [*command, "--kills", "2", "--every", "53"], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line[:30].split("  ")[0]: line.split()[-3:] for line in done.stdout.splitlines()}
    assert found["fault"] == ["tried", "survived", "lost"]
    assert int(found["all"][0]) >= 8 and found["all"][2] == "0"
    assert {kind.split(":")[0].split(" ")[0] for kind in found} >= {
        "SIGKILL", "EIO", "ENOSPC", "checkpoint", "adapter", "surroundings",
    }  # fmt: skip


def test_the_table_counts_and_lists_what_was_lost() -> None:
    table, lost = tally([Outcome("kill", "1"), Outcome("kill", "2", "bytes differ"), Outcome("disk", "3")])
    assert lost == 1
    rows = [line.split() for line in table.splitlines()]
    assert rows[1:4] == [["kill", "2", "1", "1"], ["disk", "1", "1", "0"], ["all", "3", "2", "1"]]
    assert rows[4][:2] == ["lost:", "kill:"]


class BadState(Disk):
    """The first write of a checkpoint's state.json fails, halfway."""

    def fails(self, operation: str, path: Any) -> bool:
        if self.failed or operation != "write" or not str(path).endswith("state.json"):
            return False
        self.failed.append(str(path))
        return True


def test_writing_in_place_would_be_found_out(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With checkpoints that are written where they stand, a failing write leaves half of one."""

    @contextmanager
    def in_place(directory: Path, **_: Any) -> Iterator[Path]:
        directory.mkdir(parents=True, exist_ok=True)
        yield directory

    def found(output: str) -> str:
        recipe = make_recipe(output, train={"steps": 2, "save_every": 1})
        with BadState(recipe.output).failing(), pytest.raises((OSError, ResourceError), match="error"):
            tune(recipe, quiet=True)
        return unsound(recipe.output)

    assert found("complete-or-absent") == ""
    monkeypatch.setattr(checkpoint, "complete_directory", in_place)
    assert "step-00000001: " in found("in-place")

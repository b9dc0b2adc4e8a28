"""The kit's promise that several processes equal one, for every first-party strategy and task."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[1] / "plugins"
FILES = [
    "test_conformance.py", "test_task_conformance.py", "initialisations/test_conformance_of_initialisations.py",
    "peft_methods/test_conformance_of_methods.py",
]  # fmt: skip


@pytest.mark.parametrize(("processes", "parallel"), [(2, "replicate"), (4, "replicate"), (2, "shard"), (4, "shard")])
def test_every_strategy_and_task_gives_what_one_process_gives(processes: int, parallel: str) -> None:
    """In fp32, to the bounds of the kit; strategies that cannot be sharded are skipped with the reason."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", "two_processes", "-rs",
            *(str(PLUGINS / file) for file in FILES),
        ],
        env={
            **os.environ, "BUDWOOD_COMBINATIONS": "all", "BUDWOOD_TEST_PROCESSES": str(processes),
            "BUDWOOD_TEST_PARALLEL": parallel,
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout[-8000:]
    skipped = done.stdout.count("needs the base's weights whole") + done.stdout.count("is a weight of the sharded base")
    assert parallel == "shard" or not skipped

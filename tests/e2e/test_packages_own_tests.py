"""The tests of packages from `budwood new strategy`, for every hook that it offers, and of the example packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.forked import forking

from budwood.cli import app
from budwood.cli.new import HOOKS

EVERYTHING = "BUDWOOD_COMBINATIONS"
EXAMPLES = Path(__file__).parents[2] / "examples" / "strategies"


def test_the_tests_of_every_package_pass(tmp_path: Path) -> None:
    paths = [tmp_path / f"package-{number}" for number in range(len(HOOKS))]
    for number, hook in enumerate(HOOKS):
        assert app.run(["new", "strategy", f"mine-{number}", "--hook", hook, "--folder", str(paths[number])]) == 0
    paths += [EXAMPLES / "budwood-base-kl", EXAMPLES / "budwood-scaling"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    if not os.environ.get(EVERYTHING):  # `make combinations` runs the longest for every template, too
        longest = "composes_with or two_processes or resumed or same_seed or runs_on or hooks_removed"
        command += ["-k", f"not TestMine or TestMine0 or not ({longest})"]
    with forking():
        done = subprocess.run(
            [*command, *map(str, paths)], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
        )
    assert done.returncode == 0, done.stdout
    for number in range(len(HOOKS)):
        assert f"TestMine{number}::test_merged_equals_unmerged: it owns no adapter" in done.stdout
    assert "TestBaseKl::test_merged_equals_unmerged: it owns no adapter" in done.stdout
    assert "TestScaling::test_merged_equals_unmerged" not in done.stdout

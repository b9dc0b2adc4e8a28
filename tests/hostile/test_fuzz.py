"""The targets of `make fuzz` accept their valid seed inputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.hostile import fuzz

from budwood.errors import BudwoodError

UNFINISHED = {"manifest", "index", "base_config"}
"""Targets whose valid inputs name missing files or hashes, so parsing raises a regular error."""


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_target_accepts_its_valid_inputs(tmp_path, name):
    file, sound, parse = fuzz.TARGETS[name]()
    for data in sound:
        (tmp_path / file).write_bytes(data)
        try:
            parse(tmp_path / file)
        except BudwoodError as error:
            assert name in UNFINISHED or "no such file" in str(error), error
        else:
            continue


def test_a_missing_atheris_is_reported_with_the_install_command(tmp_path):
    code = "import sys; sys.modules['atheris'] = None; sys.argv = ['fuzz']; from tests.hostile import fuzz; "
    code += "fuzz.importlib.util.find_spec = lambda name: None; sys.exit(fuzz.main())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(fuzz.__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "pip install 'budwood[fuzz]'" in done.stderr

"""The targets of `make fuzz` parse what is sound, so that fuzzing begins there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.hostile import fuzz

from budwood.errors import BudwoodError

UNFINISHED = {"manifest", "index", "base_config"}
"""Their sound inputs name files or hashes that are not there; they end with an error of their own."""


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_target_takes_its_sound_inputs(tmp_path, name):
    file, sound, parse = fuzz.TARGETS[name]()
    for data in sound:
        (tmp_path / file).write_bytes(data)
        try:
            parse(tmp_path / file)
        except BudwoodError as error:
            assert name in UNFINISHED or "no such file" in str(error), error
        else:
            continue


def test_without_atheris_it_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['atheris'] = None; sys.argv = ['fuzz']; from tests.hostile import fuzz; "
    code += "fuzz.importlib.util.find_spec = lambda name: None; sys.exit(fuzz.main())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(fuzz.__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "pip install 'budwood[fuzz]'" in done.stderr

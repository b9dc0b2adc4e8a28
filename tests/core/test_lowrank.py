"""budwood.lowrank: its names, its lazy imports, and the error for imports written for version 1."""

from __future__ import annotations

import subprocess
import sys

import pytest

import budwood
from budwood import lowrank
from budwood.contract.discovery import PluginError
from budwood.contract.loading import load_strategy


def test_every_name_exists_and_none_is_also_in_budwood():
    for name in lowrank.__all__:
        assert getattr(lowrank, name) is not None
        assert name not in budwood.__all__
    assert dir(lowrank) == sorted(lowrank.__all__)
    with pytest.raises(AttributeError, match="no attribute 'low_rank_linaer'"):
        lowrank.low_rank_linaer  # noqa: B018


def test_it_imports_neither_torch_nor_peft():
    code = "import sys; from budwood.lowrank import SavedLowRankConfig; print({'torch', 'peft'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_the_new_location_of_a_name_is_given(distribution):
    with pytest.raises(ImportError, match="write `from budwood.lowrank import low_rank_linear`"):
        from budwood import low_rank_linear  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'low_rank_linaer'"):
        budwood.low_rank_linaer  # noqa: B018
    distribution("sprout", "from budwood import select_adapters\nclass Mine(Strategy): pass", {"mine": "Mine"})
    with pytest.raises(PluginError, match="'mine' of sprout 1.0.*write `from budwood.lowrank import select_adapters`"):
        load_strategy("mine")

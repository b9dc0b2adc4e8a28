"""Configuration of the tests of several processes and machines: for `make scale-test`, not for `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.core.conftest import write_rows
from tests.faulty import write_recipe


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave these tests out, unless they are selected by `scale`."""
    return None if "scale" in config.option.markexpr else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark these tests."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.scale)


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A folder with recipe.json and its data, to be run from there."""
    write_rows(tmp_path / "train.jsonl")
    write_recipe(tmp_path, tiny_base, {})
    return tmp_path

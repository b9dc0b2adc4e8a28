"""The process that estimates: started ahead, asked once, and gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from budwood.errors import ResourceError
from budwood.planning import waiting
from budwood.planning.waiting import PlanningProcess


def test_a_process_that_is_not_needed_is_gone() -> None:
    with PlanningProcess() as process:
        assert process._process.poll() is None
    assert process._process.returncode is not None


def test_a_process_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "budwood").mkdir()
    (tmp_path / "budwood" / "__init__.py").write_text("raise SystemExit('no memory left')")
    monkeypatch.syspath_prepend(tmp_path)
    with PlanningProcess() as process, pytest.raises(ResourceError, match="ended with code 1: no memory left"):
        process.ask({})


def test_a_process_that_takes_too_long_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "budwood").mkdir()
    (tmp_path / "budwood" / "__init__.py").write_text("import time; time.sleep(600)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(waiting, "LIMIT", 0.1)
    with PlanningProcess() as process, pytest.raises(ResourceError, match=r"not finished after 0\.1 seconds"):
        process.ask({})
    assert process._process.returncode is not None

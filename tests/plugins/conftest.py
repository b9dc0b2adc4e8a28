"""Fixtures of all strategy tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_rank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw ranks.png, which takes longer than a run, only in tests marked `plots`."""
    if "plots" not in request.keywords:
        monkeypatch.setattr("budwood_adalora.picture.draw_ranks", lambda *given: None)

"""What the tests of all strategies stand on."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_rank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdaLoRA draws no ranks.png, which takes longer than a run, but in tests marked `plots`."""
    if "plots" not in request.keywords:
        monkeypatch.setattr("budwood_adalora.picture.draw_ranks", lambda *given: None)

"""Settings of the tests of data."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _forked_templates(forked_templates: None) -> None:
    """Fork the processes of chat templates."""

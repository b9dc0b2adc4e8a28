"""docs/reliability.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"


def test_every_promise_names_a_test_and_every_test_exists() -> None:
    tables = PAGE.read_text(encoding="utf-8").split("| promise | test |\n|---|---|\n")[1:]
    promises = [row for table in tables for row in table.partition("\n\n")[0].splitlines()]
    assert len(promises) > 30
    for row in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
        assert named, f"no test holds: {row}"
        for path, name in named:
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.M), f"{path}::{name}"

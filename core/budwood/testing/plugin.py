"""What pytest loads wherever Budwood is installed: it tells why a check of the conformance kit does not apply.

It is loaded for tests that have nothing to do with Budwood too, so it imports nothing.
"""

from __future__ import annotations

from typing import Any

SKIPPED = "budwood: does not apply"
"""Key of the property under which a skipped check keeps its reason."""


def pytest_collection_finish(session: Any) -> None:
    """Note which strategies are to run in two processes, so that they can share a start."""
    for item in session.items:
        name = getattr(item, "originalname", "")
        if name == "test_two_processes_equal_one" and hasattr(item.cls, "announce"):
            # Under xdist every worker collects all files, and runs some of them.
            item.cls.announce(str(item.path) if hasattr(session.config, "workerinput") else "")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the checks that do not apply, each with its reason."""
    found = [
        (report.nodeid, reason)
        for report in terminalreporter.stats.get("skipped", ())
        for name, reason in getattr(report, "user_properties", ())
        if name == SKIPPED
    ]
    if found:
        terminalreporter.section("budwood: checks that do not apply")
        for nodeid, reason in found:
            terminalreporter.line(f"{nodeid.partition('::')[2]}: {reason}")

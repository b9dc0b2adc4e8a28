"""The pytest plugin of Budwood: reports why checks of the conformance kit do not apply.

pytest also loads it for unrelated tests, so it imports nothing.
"""

from __future__ import annotations

from typing import Any

SKIPPED = "budwood: does not apply"
"""Key of the test property that stores the reason of a skipped check."""


def pytest_collection_finish(session: Any) -> None:
    """Collect the strategies to run in two processes, so that they share one start of processes."""
    for item in session.items:
        name = getattr(item, "originalname", "")
        if name == "test_two_processes_equal_one" and hasattr(item.cls, "announce"):
            # Under xdist every worker collects all files but runs only some of them.
            item.cls.announce(str(item.path) if hasattr(session.config, "workerinput") else "")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the checks that do not apply, each with its reason."""
    skipped = [
        (report.nodeid, reason)
        for report in terminalreporter.stats.get("skipped", ())
        for name, reason in getattr(report, "user_properties", ())
        if name == SKIPPED
    ]
    if skipped:
        terminalreporter.section("budwood: checks that do not apply")
        for nodeid, reason in skipped:
            terminalreporter.line(f"{nodeid.partition('::')[2]}: {reason}")

"""A process that estimates plans, started before it is needed: it imports its libraries beside the caller's work."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from types import TracebackType
from typing import Any

from budwood.errors import ResourceError

LIMIT = 600
"""Seconds after which an estimate is given up."""


def saves_time() -> bool:
    """Return whether the caller has still to import what a process would import meanwhile."""
    return "torch" not in sys.modules


class PlanningProcess:
    """A process that reads one request from stdin and answers it; a context at whose end it is gone."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", "-c", "from budwood.planning.process import main; main()"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def __enter__(self) -> PlanningProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was not read has nowhere to go
                    stream.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send the request, and return the answer; once.

        Raises:
            ResourceError: the process fails or takes too long.
        """
        try:
            out, problems = self._process.communicate(json.dumps(request), timeout=LIMIT)
        except subprocess.TimeoutExpired:
            text = f"plan: not finished after {LIMIT} seconds: plan with fewer tokens, or a smaller base."
            raise ResourceError(text) from None
        try:
            answer: dict[str, Any] = json.loads(out)
        except ValueError:
            last = (problems.strip().splitlines() or ["no output"])[-1]
            raise ResourceError(f"plan: its process ended with code {self._process.returncode}: {last}") from None
        return answer

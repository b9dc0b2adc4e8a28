"""The terminal of a run, which may go away before the run ends."""

from __future__ import annotations

import contextlib
import sys
from typing import Any


class Terminal:
    """A text stream to stderr. Writing never fails: lines that can no longer be written are counted."""

    def __init__(self) -> None:
        self.lost = 0

    def write(self, text: str) -> int:
        """Write `text` or count its lines as lost; returns the number of characters in `text`."""
        try:
            self._stream.write(text)
        except (OSError, ValueError, AttributeError):  # hang-up, pipe without a reader, full disk; closed; None
            self.lost += text.count("\n")
        return len(text)

    def flush(self) -> None:
        """Flush if possible."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Whether stderr is a terminal."""
        try:
            return bool(self._stream.isatty())
        except (OSError, ValueError, AttributeError):
            return False

    @property
    def _stream(self) -> Any:
        """The current stderr; beneath rich's proxy while a progress bar is shown."""
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

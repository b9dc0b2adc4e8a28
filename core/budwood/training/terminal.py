"""The terminal of a run, which may go away before the run ends."""

from __future__ import annotations

import contextlib
import sys
from typing import Any


class Terminal:
    """A text stream onto stderr. What can no longer be written is counted in lines, and nothing fails."""

    def __init__(self) -> None:
        self.lost = 0

    def write(self, text: str) -> int:
        """Write, or count; returns the number of characters given."""
        try:
            self._stream.write(text)
        except (OSError, ValueError, AttributeError):  # hung up, a pipe without a reader, a full disk; closed; None
            self.lost += text.count("\n")
        return len(text)

    def flush(self) -> None:
        """Flush, as far as it goes."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Whether someone can watch."""
        try:
            return bool(self._stream.isatty())
        except (OSError, ValueError, AttributeError):
            return False

    @property
    def _stream(self) -> Any:
        """Today's stderr; beneath rich's own stand-in while a progress bar is shown."""
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

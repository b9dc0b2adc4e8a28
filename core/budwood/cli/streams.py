"""Standard output of the commands: readable on terminals without UTF-8, and quiet when its reader has gone."""

from __future__ import annotations

import codecs

from rich.console import Console

_ASCII = {
    "⟦": "[[", "⟧": "]]", "↵": "\\n", "·": "-", "–": "-", "—": "-", "─": "-", "…": "...", "→": "->", "×": "x",
    "≥": ">=", "≤": "<=", "’": "'", "‘": "'", "“": '"', "”": '"', "█": "#", "▉": "#", "▊": "#", "▋": "#", "▌": "#",
    "▍": "", "▎": "", "▏": "",
}  # fmt: skip
"""What stands for Budwood's own marks."""


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(character, "?") for character in text), error.end


codecs.register_error("budwood", _spell)


class Output(Console):
    """A rich console on standard output; a reader that has gone is a BrokenPipeError, as for `print`."""

    def on_broken_pipe(self) -> None:
        """Raise instead of ending the process with a code of rich's own."""
        raise BrokenPipeError

"""Output of the commands: readable on terminals without UTF-8, and quiet when its reader has gone."""

from __future__ import annotations

import codecs
import json
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console

_ASCII = {
    "⟦": "[[", "⟧": "]]", "↵": "\\n", "·": "-", "–": "-", "—": "-", "─": "-", "…": "...", "→": "->", "×": "x",
    "≥": ">=", "≤": "<=", "’": "'", "‘": "'", "“": '"', "”": '"', "█": "#", "▉": "#", "▊": "#", "▋": "#", "▌": "#",
    "▍": "", "▎": "", "▏": "", "±": "+/-", "²": "^2", "‖": "|", "Σ": "sum",
    "■": "#", "□": ".", "µ": "u", "β": "beta", "γ": "gamma", "λ": "lambda",
}  # fmt: skip
"""What stands for Budwood's own marks."""


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    spelled = (_ASCII[c] if c in _ASCII else c.encode("unicode_escape").decode() for c in text)
    return "".join(spelled), error.end


codecs.register_error("budwood", _spell)


class Output(Console):
    """A rich console on standard output; a reader that has gone is a BrokenPipeError, as for `print`."""

    def on_broken_pipe(self) -> None:
        """Raise instead of ending the process with a code of rich's own."""
        raise BrokenPipeError


def echo(text: str = "", err: bool = False) -> None:
    """Print a line to standard output, or to standard error."""
    # typer's own writes UTF-8 to every terminal.
    print(text, file=sys.stderr if err else sys.stdout, flush=True)


def echo_json(value: Any, indent: int | None = None) -> None:
    """Print a value as JSON; where the output cannot hold a character, it is escaped."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    echo(json.dumps(value, indent=indent, ensure_ascii=not unicode, default=str))


def print_notes(notes: Iterable[str]) -> None:
    """Print notes to standard error, one line each."""
    for note in notes:
        echo(f"note: {note}", err=True)


def print_piece(piece: str) -> None:
    """Print a piece of an answer, to a terminal without control characters, which could command it."""
    if sys.stdout.isatty():
        piece = "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in piece)
    sys.stdout.write(piece)
    sys.stdout.flush()


def one_line(text: str) -> str:
    """Return a message as one line without control characters."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))

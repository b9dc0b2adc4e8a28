"""Reads the fields of a row."""

from __future__ import annotations

import math
from typing import Any

from budwood.data.rows import Row
from budwood.errors import InputError
from budwood.untrusted.redaction import shorten

_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""Range of the positive normal fp32 numbers."""


def read_weight(row: Row, where: str) -> float:
    """Return the `weight` of a row or message, a factor of its labels' loss; 1 if it has none.

    Raises:
        InputError: it is not a non-negative fp32 number, nor the text of one (as in CSV).
    """
    value = row.get("weight")
    if value is None or value == "":
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not (weight == 0 or _SMALLEST <= weight <= _LARGEST):
        raise InputError(f"{where}: field 'weight' must be 0 or a positive fp32 number, not {shorten(repr(value))}.")
    return weight


def string(row: Row, field: str, where: str) -> str:
    """Return the text of a field.

    Raises:
        InputError: it is missing, null, not text, or not encodable as UTF-8.
    """
    value = row.get(field)
    if not isinstance(value, str):
        raise InputError(f"{where}: field '{field}' must be text, not {describe_type(row, field)}.")
    return encodable(value, f"field '{field}'", where)


def encodable(text: str, field: str, where: str) -> str:
    """Return a text, or refuse it if it cannot be encoded as UTF-8."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: {field} has half a character (\\u{ord(text[error.start]):04x}).") from error
    return text


def describe_type(row: Row, field: str) -> str:
    """Return what a field holds, for messages: "missing", "null", or "a list"."""
    if field not in row:
        return "missing"
    return "null" if row[field] is None else type_name(row[field])


def type_name(value: Any) -> str:
    """Return the type of a value with its article, for messages: "an int"."""
    name = type(value).__name__
    return f"an {name}" if name == "int" else f"a {name}"

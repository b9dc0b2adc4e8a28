"""What the quantisers of stored checkpoints share."""

from __future__ import annotations

import importlib.util
from typing import Any

from budwood import CorruptError, InputError, Quantizer, ResourceError

SAVED = "take the config.json that was saved with these weights"


class Stored(Quantizer):
    """A quantiser that reads checkpoints and makes none."""

    stored_only = True


def wrong_setting(field: str, value: Any, needed: str) -> InputError:
    """Return the error for an entry of quantization_config in config.json, by its path in there."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return InputError(f"the base's config.json: quantization_config.{field} is {shown}, and {needed}: {SAVED}.")


def is_size(value: Any) -> bool:
    """Return whether a value from JSON is a positive number of things."""
    return type(value) is int and value > 0


def missing(path: str, name: str, entry: Any) -> CorruptError:
    """Return the error for a linear's tensor that is not there, beside `entry`, one that is."""
    return CorruptError(
        f"{entry.file}: the tensor '{path}.{name}' is missing, without which '{path}.weight' cannot be dequantised: "
        "take complete files."
    )


def sizes_in(value: Any) -> tuple[int, ...]:
    """Return the sizes of a block that a file gives, as positive numbers; () if it gives none."""
    given = value if isinstance(value, list | tuple) else ()
    return tuple(given) if all(map(is_size, given)) else ()


def needs(module: str, package: str, name: str) -> None:
    """Check that a library is installed.

    Raises:
        ResourceError: it is not; the message names the extra that brings it.
    """
    if importlib.util.find_spec(module) is None:
        raise ResourceError(
            f"the base is quantised with {name}, whose library {package} is not installed: "
            f"pip install 'budwood[{name}]', or give the unquantised base."
        )

"""What the quantisers of stored checkpoints share."""

from __future__ import annotations

import importlib.util

from budwood import Quantizer, ResourceError


class Stored(Quantizer):
    """A quantiser that reads checkpoints and makes none."""

    stored_only = True


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

"""What the quantisers of stored checkpoints share."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from budwood import InputError, Quantizer, ResourceError

if TYPE_CHECKING:
    import torch


class Stored(Quantizer):
    """A quantiser that reads checkpoints and makes none: the base must be quantised already."""

    def config(self, dtype: torch.dtype, double_quantization: bool, skip: list[str]) -> Any:
        raise InputError(
            f"quantization: {self.name} reads bases that are quantised already, and this one is not: "
            "use nf4, fp4 or int8, or take such a base."
        )


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

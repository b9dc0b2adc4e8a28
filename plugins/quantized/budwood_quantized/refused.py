"""Formats that are recognised and refused, each with its remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from budwood import InputError
from budwood_quantized.stored import Stored


class _Refused(Stored):
    method: str
    title: str
    reason: ClassVar[str] = "has not been tried with adapters"

    def reads(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == self.method

    def check_stored(self, config: Mapping[str, Any], device: str | None) -> None:
        raise InputError(
            f"the base is quantised with {self.title}, which {self.reason}: give the unquantised base with "
            "quantization nf4, which takes as much memory."
        )


class AWQ(_Refused):
    """AWQ (Lin et al., 2023): refused."""

    api = 2
    method, title = "awq", "AWQ"

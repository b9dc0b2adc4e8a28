"""How the tensors of a weighted sum of adapters follow from those of the parts; sums.py applies it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LINEAR, FACTOR, SAME, ROWS, COLUMNS, POSITIONS = "linear", "factor", "same", "rows", "columns", "positions"
"""How a tensor of the sum follows from those of the parts: Σ wᵢ tᵢ; 1 + Σ wᵢ (tᵢ - 1); equal in all; the factors A
[r, in] and B [out, r] of low-rank matrices side by side, weighted in B; values at positions: see sparse_sums.py."""


@dataclass(frozen=True)
class Sum:
    """How adapters of a method are summed.

    Attributes:
        rules: part of a tensor's key → how it is summed; the first that fits.
        free: fields of PEFT's config that may differ, since the sum has its own.
        same_targets: what a value means depends on all targets together, so that they must be equal.
    """

    rules: Mapping[str, str]
    free: tuple[str, ...] = ()
    same_targets: bool = False

    def rule(self, key: str) -> str | None:
        """Return how the tensor with this key is summed; None: it is none of the method's."""
        return next((rule for part, rule in self.rules.items() if f".{part}" in key), None)

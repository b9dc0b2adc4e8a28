"""Optimizers as strategies of the slot `optimizer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from budwood import Options, Strategy, hookimpl

if TYPE_CHECKING:
    import torch

    from budwood import Run


class AdamW8bitOptions(Options):
    """Options of `adamw-8bit`."""

    min_elements: int = Field(4096, ge=1, description="parameters with fewer elements keep their states in 32 bit")


class AdamW8bit(Strategy):
    """AdamW with states of 8 bit, a quarter of their memory (Dettmers et al., 2022)."""

    Options = AdamW8bitOptions
    slots = ("optimizer",)
    provides = ("compact-optimizer",)

    @hookimpl
    def build_optimizer(self, run: Run, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from budwood_optimizers.blockwise import BlockwiseAdamW

        least = self.options.min_elements
        sizes = [parameter.numel() for group in groups for parameter in group["params"]]
        small = sum(size for size in sizes if size < least)
        if small == sum(sizes):
            run.say(
                f"note: {self.name} keeps every state in 32 bit, since no parameter has {least:,} elements: leave it "
                f"out, or lower {self.name}.min_elements"
            )
        else:
            rest = f", of the other {small:,} in 32 bit" if small else ""
            run.say(f"{self.name}: the states of {sum(sizes) - small:,} elements are kept in 8 bit{rest}")
        return BlockwiseAdamW(groups, least, run.planning)

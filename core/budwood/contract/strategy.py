"""The base class of every strategy, its options, and the marker for its hooks."""

from __future__ import annotations

from typing import Any, ClassVar

import pluggy
from pydantic import BaseModel, ConfigDict

API_VERSION = 1
"""Major version of the contract; a strategy that was written for another one is refused by name."""

hookimpl = pluggy.HookimplMarker("budwood")
"""Marks a method of a strategy as an implementation of the hook of the same name."""


class Options(BaseModel):
    """Base of a strategy's options: unknown keys, NaN and infinities are refused; a frozen instance."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Strategy:
    """One way to change training. Subclass it, declare, and mark the hooks that it takes part in with `@hookimpl`.

    The first line of the subclass's docstring is what `budwood plugins` shows.
    """

    Options: ClassVar[type[BaseModel]] = Options
    slots: ClassVar[tuple[str, ...]] = ()
    """What the strategy owns alone, such as "adapter", "teacher", "optimizer"."""
    provides: ClassVar[tuple[str, ...]] = ()
    """Capabilities that others may require; unlike a slot, several strategies may provide the same."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Strategies, slots or capabilities that must be in the same recipe."""
    conflicts: ClassVar[tuple[str, ...]] = ()
    """Strategies, slots or capabilities that must not be in the same recipe."""
    before: ClassVar[tuple[str, ...]] = ()
    """Strategies (or owners of a slot or capability) that this one goes before, where they are present."""
    after: ClassVar[tuple[str, ...]] = ()
    """Strategies (or owners of a slot or capability) that this one goes after, where they are present."""
    api: ClassVar[int] = API_VERSION

    def __init__(self, options: Any = None, name: str = "", distribution: str = "") -> None:
        """Hold validated `options`; `name` and `distribution` ("dist 1.2") come from the registry."""
        self.options: Any = self.Options() if options is None else options
        self.name = name or type(self).__name__
        self.distribution = distribution

    def __str__(self) -> str:
        return f"strategy '{self.name}' ({self.distribution})" if self.distribution else f"strategy '{self.name}'"

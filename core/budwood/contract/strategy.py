"""The base class of every plugin and of every strategy, its options, and the marker for its hooks."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pluggy
from pydantic import BaseModel, ConfigDict

from budwood.contract.discovery import STRATEGIES, WORDS

API_VERSION = 2
"""Major version of the contract."""
SUPPORTED = {STRATEGIES: (1, 2), "budwood.attacks": (1, 2)}
"""Versions that still load, by entry point group; of other groups only the current one."""

RUN_ADAPTER = "default"
"""Name under which a run's adapter stands on its model; the slot "adapter" has one owner, so there is one."""

hookimpl = pluggy.HookimplMarker("budwood")
"""Marks a method of a strategy as an implementation of the hook of the same name."""


class Options(BaseModel):
    """Base of a strategy's options: unknown keys, NaN and infinities are refused; a frozen instance."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Plugin:
    """Base of everything that comes through an entry point. A subclass of `Strategy`, `Task`, … has all of it."""

    group: ClassVar[str] = ""
    """Entry point group that it registers in."""
    api: ClassVar[int] = 1
    """Major version of the contract that it was written for. Stays 1 here: who declares none knew of no other."""
    must_declare: ClassVar[tuple[str, ...]] = ()
    """Class attributes without a default."""
    must_implement: ClassVar[tuple[str, ...]] = ()
    """Methods that the class which lists them leaves to its subclasses."""
    distribution: str = ""
    """Whose it is ("dist 1.2"); the registry sets it, and the name."""
    _calls: Any = None
    """The guarded calls of the composition that it stands in."""

    def __str__(self) -> str:
        name = getattr(self, "name", "") or type(self).__name__
        owner = f" ({self.distribution})" if self.distribution else ""
        return f"{WORDS[self.group]} '{name}'{owner}"


class Strategy(Plugin):
    """One way to change training. Subclass it, declare, and mark the hooks that it takes part in with `@hookimpl`.

    The first line of the subclass's docstring is what `budwood plugins` shows.
    """

    group = STRATEGIES
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

    adapter_types: ClassVar[tuple[str, ...]] = ()
    """PEFT's names of the adapter types that it reads, such as "LORA", for adapters that stock PEFT saved."""
    uses_reference: Literal["", "base", "start"] = ""
    """Which `step.reference()` it asks for: the adapter off, or as it started; it then comes before the forward."""
    log_prob_temperature: float = 1.0
    """Temperature of the log-probabilities in `sequence_terms` and `step_values`: that of sampling, for a policy."""
    updates: int = 1
    """Optimizer steps that use one set of `next_examples`."""

    def __init__(self, options: Any = None, name: str = "", distribution: str = "") -> None:
        """Hold validated `options`; `name` and `distribution` ("dist 1.2") come from the registry."""
        self.options: Any = self.Options() if options is None else options
        self.name = name or type(self).__name__
        self.distribution = distribution

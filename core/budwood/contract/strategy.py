"""Base classes of plugins, strategies and their options, and the marker for hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pluggy
from pydantic import BaseModel, ConfigDict

from budwood.contract.discovery import STRATEGIES, WORDS
from budwood.errors import InputError

API_VERSION = 2
"""Major version of the contract."""
SUPPORTED = {STRATEGIES: (1, 2), "budwood.attacks": (1, 2)}
"""Versions that load, by entry point group; other groups accept only the current one."""

RUN_ADAPTER = "default"
"""Name of a run's adapter on its model; there is only one, since the slot "adapter" has one owner."""

hookimpl = pluggy.HookimplMarker("budwood")
"""Marks a method of a strategy as an implementation of the hook of the same name."""


class Options(BaseModel):
    """Base class of a strategy's options: frozen; refuses unknown keys, NaN and infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    other_names: ClassVar[Mapping[str, str]] = {}
    """Option by the name that another tool has for it; a recipe with that name is told the option's."""


class Plugin:
    """Base class of everything loaded through an entry point: `Strategy`, `Task`, …"""

    group: ClassVar[str] = ""
    """Entry point group in which it is registered."""
    api: ClassVar[int] = 1
    """Major version of the contract that it was written for. The default stays 1: no declaration predates version 2."""
    must_declare: ClassVar[tuple[str, ...]] = ()
    """Class attributes that a subclass must define."""
    must_implement: ClassVar[tuple[str, ...]] = ()
    """Methods that subclasses of the class that lists them must implement."""
    distribution: str = ""
    """Distribution and version, such as "dist 1.2"; set by the registry, like the name."""
    _calls: Any = None
    """The guarded calls of its composition."""

    def __str__(self) -> str:
        name = getattr(self, "name", "") or type(self).__name__
        owner = f" ({self.distribution})" if self.distribution else ""
        return f"{WORDS[self.group]} '{name}'{owner}"


class Strategy(Plugin):
    """A modification of training. Subclass it, declare what it needs, and mark its hooks with `@hookimpl`.

    The first line of the subclass's docstring is what `budwood plugins` shows.
    """

    group = STRATEGIES
    Options: ClassVar[type[BaseModel]] = Options
    slots: ClassVar[tuple[str, ...]] = ()
    """Roles that the strategy owns exclusively, such as "adapter", "teacher", "optimizer"."""
    provides: ClassVar[tuple[str, ...]] = ()
    """Capabilities that others may require; unlike slots, several strategies may provide the same one."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Strategies, slots or capabilities that must be in the same recipe."""
    conflicts: ClassVar[tuple[str, ...]] = ()
    """Strategies, slots or capabilities that may not be in the same recipe."""
    before: ClassVar[tuple[str, ...]] = ()
    """Strategies (or owners of a slot or capability) that this one precedes, if present."""
    after: ClassVar[tuple[str, ...]] = ()
    """Strategies (or owners of a slot or capability) that this one follows, if present."""

    adapter_types: ClassVar[tuple[str, ...]] = ()
    """PEFT's names of the adapter types that it reads, such as "LORA", for adapters saved by PEFT itself."""
    beyond_linears: ClassVar[bool] = False
    """Whether its adapters change other parts of the base than weights of linears, so that no LoRA comes near them."""
    uses_reference: Literal["", "start", "base"] = ""
    """Which `step.reference()` it uses: the model at the start, or the base. It is then computed before the forward."""
    caches_reference: bool = False
    """Compute `step.reference_log_probs()` of all examples before the first step, instead of in every micro-step."""
    needs_whole_weights: bool = False
    """Whether it reads weights of the base's layers between passes, other than by `linear_weight`.

    Its base cannot be sharded over processes then, and `train.parallel: shard` is refused before the base loads.
    """
    trains_on: ClassVar[tuple[str, ...]] = ()
    """Kinds of data (`DataFormat.holds`) of which the training data must be one: "preference pairs"; () for any.

    Data of a kind, in turn, needs a strategy or a task that names it here. "" stands for data of no kind.
    """
    reads_columns: tuple[str, ...] = ()
    """Columns of the data's rows that it reads besides those of the data format; a row without one is refused."""
    code_files: tuple[str, ...] = ()
    """Python files, named in the recipe, that it runs; refused unless the user passes --allow-code."""
    writes: tuple[str, ...] = ()
    """Files that it writes to the run's folder during the run."""
    shows: tuple[str, ...] = ()
    """Metrics of an optimizer step that the terminal shows after the loss, such as "reward"."""
    log_prob_temperature: float = 1.0
    """Temperature of the log-probabilities in `sequence_terms` and `step_values`: that of sampling, for a policy."""
    learning_rate_scale: float = 1.0
    """Multiple of LoRA's learning rate that suits it, for a recipe that names no rate; those of all are multiplied."""
    updates: int = 1
    """Optimizer steps that use one set of `next_examples`."""

    @classmethod
    def continued_options(cls, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the options of a run that continues an adapter of this type; implement it if that is supported.

        Such a strategy checks `plan.start_adapter` in `check_plan`, and attaches `run.start_adapter` as the adapter
        `RUN_ADAPTER` in `prepare_model`, in place of a new one.

        Args:
            config: the adapter's adapter_config.json.

        Returns:
            Options that must be equal to the recipe's, such as a rank, and others that are the defaults.

        Raises:
            InputError: such an adapter cannot be continued.
        """
        raise InputError(f"adapters of the strategy '{cls.__name__}' cannot be continued.")

    def __init__(self, options: Any = None, name: str = "", distribution: str = "") -> None:
        """Store validated `options`; the registry passes `name` and `distribution` ("dist 1.2")."""
        self.options: Any = self.Options() if options is None else options
        self.name = name or type(self).__name__
        self.distribution = distribution

"""Adapters of a model: read, checked, and put in the live table, or attached by an owner that has no entries for it."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from budwood.adapters.live import module_ids, unchanged_on_error
from budwood.adapters.live_blend import blend
from budwood.adapters.live_table import LiveTable, Plan
from budwood.adapters.live_update import LiveAdapter
from budwood.adapters.match import check_task, check_task_options, mismatch
from budwood.adapters.owner import owner_options, start_owner
from budwood.adapters.peft_config import MisfitError
from budwood.adapters.store import SavedAdapter, read_adapter
from budwood.adapters.use import use_adapters
from budwood.contract.calls import ask_owner
from budwood.contract.discovery import plugin_fault
from budwood.contract.loading import load_strategy
from budwood.contract.strategy import Strategy
from budwood.errors import BudwoodError, CorruptError, InputError
from budwood.model.base import Base
from budwood.model.task import Task


@dataclass(eq=False)
class Memory:
    """What an adapter has in memory.

    Attributes:
        live: its entries in the live table; empty for an attached adapter.
        plan: the plan in which it computes all rows.
        attached: its name on the model, to which its owner attached it; None: it is in the table.
    """

    live: LiveAdapter
    plan: Plan
    attached: str | None = None


@dataclass(eq=False)
class Loaded:
    """An adapter that rows can use.

    Attributes:
        identity: hash of its content and of the base: what cached prefixes and stacks are stored under.
        owner: the strategy that loads it.
        saved: the adapter on disk; None: a blend.
        memory: None while it is not in memory.
        bytes: of its tensors.
        embeddings: number of token embeddings that it brings; 0: it brings none.
        unblendable: why it cannot be part of a blend; "": it can.
        allow_other_base: whether it may be read for another base than its own.
        pinned: whether it stays in memory.
        quarantined: why no request may use it any more; "": it is fine.
        parts: of a blend, its adapters.
    """

    label: str
    identity: str
    owner: Strategy
    saved: SavedAdapter | None
    memory: Memory | None
    bytes: int = 0
    embeddings: int = 0
    unblendable: str = ""
    allow_other_base: bool = False
    pinned: bool = False
    quarantined: str = ""
    parts: tuple[Loaded, ...] = field(default=())

    @property
    def in_memory(self) -> Memory:
        """What it has in memory, for a row that uses it."""
        assert self.memory is not None, f"adapter '{self.label}' is not in memory"
        return self.memory

    @property
    def live(self) -> LiveAdapter:
        """Its entries in the live table."""
        return self.in_memory.live

    @property
    def plan(self) -> Plan:
        """The plan in which it computes all rows."""
        return self.in_memory.plan

    @property
    def attached(self) -> str | None:
        """Its name on the model; None: it is in the table."""
        return self.in_memory.attached


class Loader:
    """Loads adapters onto one model; used by the engine's thread alone.

    Attributes:
        selected: the attached adapter whose owner is in use.
        task_plugin: the task, if the options of adapters must be its own.
        table_first: whether owners are asked for entries of the table before they attach.
    """

    def __init__(self, base: Base, task: str, table: LiveTable) -> None:
        self.base, self.task, self.table = base, task, table
        self.task_plugin: Task | None = None
        self.selected: Loaded | None = None
        self.table_first = True
        self._modules = module_ids(base.model)
        self._owners: dict[tuple[str, str], Strategy] = {}  # keyed by adapter type and options
        self._keys = (f"adapter{number}" for number in itertools.count(1))
        self._attached = 0

    def read(self, directory: str | Path, allow_other_base: bool) -> SavedAdapter:
        """Read and check an adapter, and what it needs of the base; the only step that any thread may take.

        Raises:
            InputError, CorruptError: see `AdapterPool.load`.
        """
        saved = read_adapter(
            directory, base_name=self.base.name, base_fingerprint=self.base.fingerprint,
            allow_other_base=allow_other_base, weights=True,
        )  # fmt: skip
        check_task(saved, self.task, self.base)
        if self.task_plugin is not None:
            check_task_options(saved, self.task_plugin)
        return saved

    def add(self, label: str, saved: SavedAdapter) -> Loaded:
        """Put an adapter in the table, or attach it. On failure the model stays unchanged.

        Raises:
            InputError, CorruptError: it does not fit the base.
        """
        owner, identity = self._owner(saved), self._identity(saved)
        memory = self._enter(label, identity, owner, saved)
        loaded = Loaded(label, identity, owner, _without_content(saved), memory)
        live = memory.live
        hidden = memory.attached is not None or any(update.row_forward is not None for update in live.updates.values())
        loaded.bytes = max(live.bytes, saved.bytes if hidden else 0)
        loaded.embeddings = max((getattr(module, "num_embeddings", 0) for module in live.modules.values()), default=0)
        if memory.attached is not None:
            loaded.unblendable = (
                f"adapter '{label}' is attached to the model by {owner}, not an entry of the live table"
            )
        elif live.modules:
            what = "whole modules or rows of embeddings" if live.updates else "modules by its own"
            loaded.unblendable = f"adapter '{label}' of type '{saved.adapter_type}' replaces {what}"
        return loaded

    def restore(self, loaded: Loaded, saved: SavedAdapter) -> None:
        """Put an adapter that was dropped back in memory.

        Raises:
            CorruptError: its folder now holds another.
        """
        if self._identity(saved) != loaded.identity:
            raise CorruptError(f"{saved.directory}: has changed since it was loaded: load it again.")
        loaded.memory = self._enter(loaded.label, loaded.identity, loaded.owner, saved)

    def _identity(self, saved: SavedAdapter) -> str:
        return f"{saved.identity}:{self.base.fingerprint}"

    def _enter(self, label: str, identity: str, owner: Strategy, saved: SavedAdapter) -> Memory:
        try:
            asks = self.table_first and hasattr(type(owner), "live_adapter")
            live = self._live(owner, saved) if asks else None
            if live is None:
                return self._attach(label, identity, owner, saved)
        except BudwoodError as error:
            if isinstance(error, MisfitError) and mismatch(saved, self.base.fingerprint) is InputError:
                raise InputError(f"{saved.directory}: {error} Give the base that it was trained on.") from error
            raise type(error)(f"{saved.directory}: {error}") from error
        live.key, live.label = identity, label
        self.table.add(live)
        return Memory(live, Plan([live]))

    def _live(self, owner: Strategy, saved: SavedAdapter) -> LiveAdapter | None:
        tensors = saved.load_tensors()
        with torch.no_grad(), self.base.autocast():
            live: LiveAdapter | None = ask_owner(
                owner, "live_adapter", model=self.base.model, config=saved.config, tensors=tensors
            )
        if live is None:
            return None
        unknown = sorted(path for path in live.paths if path not in self.table.places)
        if unknown:
            raise plugin_fault(owner.distribution, f"{owner}: the base has no module '{unknown[0]}'", True)
        cast = live.cast(torch.device(self.base.device), self.base.dtype)
        if not all(t.sum().isfinite() or t.isfinite().all() for t in cast.tensors() if t.is_floating_point()):
            raise CorruptError(f"a value is too large for {self.base.dtype}: open the base with precision fp32.")
        for module in cast.modules.values():
            module.to(self.base.device)
        return cast

    def _attach(self, label: str, identity: str, owner: Strategy, saved: SavedAdapter) -> Memory:
        key, model = next(self._keys), self.base.model
        with unchanged_on_error(model):
            ask_owner(owner, "attach_adapter", model=model, config=saved.config, tensors=saved.load_tensors(), name=key)
            model.eval().requires_grad_(False)
            use_adapters(owner, model)
            if self.selected is not None and self.selected.owner is owner and self.selected.attached is not None:
                use_adapters(owner, model, [self.selected.attached])
        self._attached += 1
        return Memory(LiveAdapter(key=identity, label=label), self.table.base, key)

    def blend(self, parts: list[tuple[Loaded, float]]) -> Loaded:
        """Return the weighted sum of adapters that can be blended, which are in memory."""
        weights: dict[LiveAdapter, float] = {}
        for loaded, weight in parts:
            weights[loaded.live] = weights.get(loaded.live, 0.0) + weight
        biases = {path: getattr(self.table.places[path], "bias", None) for part in weights for path in part.biases}
        live = blend(weights, biases).cast(torch.device(self.base.device), self.base.dtype)
        self.table.add(live)
        adapters = tuple(dict.fromkeys(loaded for loaded, _ in parts))
        return Loaded(
            live.label, live.key, parts[0][0].owner, None, Memory(live, Plan([live])), live.bytes, parts=adapters
        )

    def remove(self, loaded: Loaded) -> None:
        """Take an adapter from memory: from the table, or from the model, whose modules are the base's own after the
        last one.

        Raises:
            PluginError: the adapter's owner left modules on the model.
        """
        memory, attached = loaded.in_memory, loaded.attached
        if self.selected is loaded:
            self.select(None)
        loaded.memory = None
        if attached is None:
            self.table.remove(memory.live)
            return
        ask_owner(loaded.owner, "detach_adapter", model=self.base.model, name=attached)
        self._attached -= 1
        if not self._attached and module_ids(self.base.model) != self._modules:
            raise plugin_fault(loaded.owner.distribution, f"{loaded.owner} left its own modules on the base", True)

    def select(self, loaded: Loaded | None) -> None:
        """Let an attached adapter compute all rows of the next passes; None, or one in the table: no attached one."""
        wanted = loaded if loaded is not None and loaded.attached is not None else None
        if wanted is self.selected:
            return
        if self.selected is not None:
            use_adapters(self.selected.owner, self.base.model)
        self.selected = None
        if wanted is not None:
            use_adapters(wanted.owner, self.base.model, [str(wanted.attached)])
            self.selected = wanted

    def merge(self, loaded: Loaded) -> None:
        """Merge an adapter permanently into the weights of an unquantised base.

        Raises:
            InputError: its type cannot be merged.
            CorruptError: its file has changed since it was loaded.
        """
        assert loaded.saved is not None
        owner, model = loaded.owner, self.base.model
        if not hasattr(type(owner), "merge_adapter"):
            raise InputError(f"{owner} cannot merge its adapters.")
        self.select(None)
        if loaded.attached is not None:
            ask_owner(owner, "merge_adapter", model=model, name=loaded.attached)
            self._attached -= 1
            loaded.memory = None
            return
        saved = read_adapter(loaded.saved.directory, weights=True)
        if self._identity(saved) != loaded.identity:
            raise CorruptError(f"{saved.directory}: has changed since it was loaded: load it again.")
        tensors = saved.load_tensors()
        key = next(self._keys)
        self.table.close()  # the owner's layers and products are those of training
        try:
            with unchanged_on_error(model):
                ask_owner(owner, "attach_adapter", model=model, config=saved.config, tensors=tensors, name=key)
                model.eval().requires_grad_(False)
            ask_owner(owner, "merge_adapter", model=model, name=key)
        finally:
            self.table.open()
        self.table.remove(loaded.live)
        loaded.memory = None

    def _owner(self, saved: SavedAdapter) -> Strategy:
        cls, entry = load_strategy(saved.adapter_type)
        if not hasattr(cls, "attach_adapter"):
            raise InputError(f"strategy '{saved.adapter_type}' of {entry.owner} attaches no adapters.")
        key = saved.adapter_type, json.dumps(owner_options(saved), sort_keys=True)
        if key not in self._owners:
            self._owners[key] = start_owner(saved)
        return self._owners[key]


def _without_content(saved: SavedAdapter) -> SavedAdapter:
    """Return the adapter without the bytes of its file, which the table's tensors are views of as far as they need."""
    return SavedAdapter(saved.directory, saved.adapter_type, saved.config, saved.infos, saved.manifest, saved.notes)

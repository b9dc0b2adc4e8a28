"""Which adapters are in memory: those in use, those pinned and, under a budget, those that were used last."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from budwood.adapters.store import SavedAdapter
from budwood.errors import BudwoodError, ResourceError, describe, is_out_of_memory
from budwood.serving.loaded import Loaded, Loader

if TYPE_CHECKING:
    from budwood.serving.engine import Engine
    from budwood.serving.requests import Answer, Row

READERS = 2
"""Largest number of adapters that are read at a time."""


@dataclass(eq=False)
class Wait:
    """What waits for adapters.

    Attributes:
        adapters: those that must be in memory together.
        ready: called on the engine's thread once they are, or with the error for which they never will be.
        room: further bytes that it needs.
        row: the request that waits.
    """

    adapters: list[Loaded]
    ready: Callable[[BaseException | None], None]
    room: int = 0
    row: Row | None = None


class Residents:
    """The adapters of an engine; its thread's alone.

    What needs adapters that are in memory does not wait for others that are read from their folders; but if one of
    those finds no room, later requests wait behind it, since it might otherwise wait for ever.

    Attributes:
        uses: number of names, waits, requests and blends that hold each adapter; it is forgotten with the last.
        requests: number of requests and blends alone: while there are any, the adapter stays in memory.
        blends: those in use, by the identities and weights of their parts.
        loads: how many adapters were put in memory; evictions: how many left it to make room.
    """

    def __init__(self, engine: Engine, loader: Loader, budget: int | None) -> None:
        self._engine: weakref.ref[Engine] = weakref.ref(engine)
        self.loader, self.budget = loader, budget
        self.loads = self.evictions = 0
        self.uses: Counter[Loaded] = Counter()
        self.requests: Counter[Loaded] = Counter()
        self.blends: dict[tuple[tuple[str, float], ...], Loaded] = {}
        self.order: OrderedDict[Loaded, None] = OrderedDict()  # those in memory, the longest unused first
        self.reading: set[Loaded] = set()
        self.waits: list[Wait] = []
        self._advancing = False

    @property
    def engine(self) -> Engine:
        """The engine, which is there while its thread calls."""
        engine = self._engine()
        assert engine is not None
        return engine

    @property
    def bytes(self) -> int:
        """Bytes of the adapters in memory, and of those that are being read."""
        return sum(loaded.bytes for loaded in {*self.order, *self.reading})

    # Uses.

    def hold(self, loaded: Loaded, request: bool = False) -> None:
        """Keep an adapter until it is released; for a request also in memory, where it must be."""
        self.uses[loaded] += 1
        if request:
            self.requests[loaded] += 1
            self.order.move_to_end(loaded)

    def release(self, loaded: Loaded, request: bool = False) -> None:
        """End a use of an adapter; with the last one it is forgotten.

        Raises:
            PluginError: the adapter's owner left modules on the model.
        """
        if request:
            self.requests[loaded] -= 1
            if not self.requests[loaded]:
                del self.requests[loaded]
        self.uses[loaded] -= 1
        try:
            if not self.uses[loaded]:
                del self.uses[loaded]
                self._forget(loaded)
        finally:
            self.advance()

    def _forget(self, loaded: Loaded) -> None:
        self.blends = {key: blend for key, blend in self.blends.items() if blend is not loaded}
        if self.engine.default is loaded:
            self.engine.set_default(None)
        try:
            if loaded.memory is not None:
                self._drop(loaded)
        finally:
            for part in loaded.parts:
                self.release(part, request=True)

    def blend(self, parts: list[tuple[Loaded, float]]) -> Loaded:
        """Return the weighted sum of adapters, which are in memory."""
        key = _key(parts)
        if key not in self.blends:
            made = self.blends[key] = self.loader.blend(parts)
            self.order[made] = None
            for loaded in made.parts:
                self.hold(loaded, request=True)
        return self.blends[key]

    def room_of(self, parts: list[tuple[Loaded, float]]) -> int:
        """Return the bytes that a blend needs beside its parts."""
        return 0 if _key(parts) in self.blends else sum(loaded.bytes for loaded, _ in parts)

    # Memory.

    def enter(self, loaded: Loaded) -> None:
        """Count an adapter that was just loaded, for which others may leave; it is read again later if they cannot.

        Raises:
            ResourceError: the budget never has room for it; it is in memory no more.
        """
        self.loads += 1
        self.order[loaded] = None
        if self._make_room(0, {loaded}):
            return
        never = loaded.pinned or not self._make_room(0, {loaded}, idle=True)
        self._drop(loaded)
        if never:
            raise self._no_room([loaded])

    def want(self, wait: Wait) -> None:
        """Let something wait for adapters; it is called at once if they are in memory, or if it needs none."""
        if not wait.adapters:
            wait.ready(None)
            return
        for loaded in wait.adapters:
            self.hold(loaded)
        self.waits.append(wait)
        self.advance()

    def cancel(self, answer: Answer) -> Row | None:
        """End the wait of a request, and return it; None: it does not wait here."""
        for wait in self.waits:
            if wait.row is not None and wait.row.answer is answer:
                self.waits.remove(wait)
                self._end(wait)
                return wait.row
        return None

    def fetch(self, loaded: Loaded) -> None:
        """Put an adapter in memory now; for calls of the engine's own thread.

        Raises:
            InputError, CorruptError: its folder no longer holds it.
            ResourceError: there is no room.
        """
        if loaded.memory is None:
            if not self._make_room(loaded.bytes, {loaded}):
                raise self._no_room([loaded])
            self._restore(loaded, self._read(loaded))

    def advance(self) -> None:
        """Call what waits for adapters that are in memory now, and start to read those that are not."""
        if self._advancing:
            return
        self._advancing = True
        try:
            again = True
            while again:  # what ends may make room
                again = self._pass()
        finally:
            self._advancing = False

    def _pass(self) -> bool:
        """Look at what waits, in order; return whether something ended."""
        wanted: set[Loaded] = set()
        for wait in list(self.waits):
            wanted.update(wait.adapters)
            error: BaseException | None = None
            try:
                absent = [loaded for loaded in wait.adapters if loaded.memory is None]
                for loaded in absent:
                    if loaded not in self.reading and len(self.reading) < READERS:
                        if not self._make_room(loaded.bytes, wanted):
                            self._check_hope(wait)
                            return False
                        arguments = (self._engine, self, loaded)
                        threading.Thread(target=_read_for, args=arguments, name="budwood-reader").start()
                        self.reading.add(loaded)
                if absent:
                    continue
                if not self._make_room(wait.room, wanted):
                    self._check_hope(wait)
                    return False
            except BaseException as problem:
                error = problem
            self.waits.remove(wait)
            try:
                wait.ready(error)
            finally:
                self._end(wait)
            return True
        return False

    def _end(self, wait: Wait) -> None:
        for loaded in wait.adapters:
            self.release(loaded)

    def _read(self, loaded: Loaded) -> SavedAdapter:
        assert loaded.saved is not None
        return self.loader.read(loaded.saved.directory, loaded.allow_other_base)

    def arrived(self, loaded: Loaded, found: SavedAdapter | BaseException) -> None:
        """Put an adapter that was read in memory, if it is still wanted."""
        self.reading.discard(loaded)
        if loaded.memory is None and self.uses[loaded]:
            error = found if isinstance(found, BaseException) else None
            try:
                if isinstance(found, SavedAdapter):
                    self._restore(loaded, found)
            except BaseException as problem:
                error = problem
            for wait in [wait for wait in self.waits if error is not None and loaded in wait.adapters]:
                self.waits.remove(wait)
                try:
                    wait.ready(error)
                finally:
                    self._end(wait)
        self.advance()

    def _restore(self, loaded: Loaded, saved: SavedAdapter) -> None:
        self.loader.restore(loaded, saved)
        self.loads += 1
        self.order[loaded] = None

    def _make_room(self, needed: int, keep: Collection[Loaded], idle: bool = False) -> bool:
        """Let idle adapters leave until so many bytes are free; return whether they are.

        Args:
            idle: ask whether there would be room if no requests were in flight; nothing leaves.
        """
        if self.budget is None:
            return True
        default = self.engine.default
        evictable = [
            loaded for loaded in self.order
            if loaded not in keep and loaded is not default and not loaded.pinned
            and (not self.requests[loaded] or idle)
        ]  # fmt: skip
        over = self.bytes + needed - self.budget
        if over > sum(loaded.bytes for loaded in evictable):
            return False
        for loaded in () if idle else evictable:
            if over <= 0:
                break
            with self.engine.switching:
                if loaded is self.engine.default:
                    continue
                self._drop(loaded)
            self.evictions += 1
            over -= loaded.bytes
        return idle or over <= 0

    def _drop(self, loaded: Loaded) -> None:
        self.order.pop(loaded, None)
        self.engine.scheduler.forward.forget_plans()
        self.loader.remove(loaded)

    def _check_hope(self, wait: Wait) -> None:
        """Raise an error if what a wait needs could not be in memory even if no requests were in flight."""
        needed = wait.room + sum(loaded.bytes for loaded in wait.adapters if loaded.memory is None)
        if not self.reading and not self._make_room(needed, wait.adapters, idle=True):
            raise self._no_room(wait.adapters)

    def _no_room(self, adapters: Collection[Loaded]) -> ResourceError:
        names = ", ".join(f"'{loaded.label}'" for loaded in adapters)
        return ResourceError(
            f"adapter {names}: no room in adapter_bytes ({(self.budget or 0) / 1e6:.1f} MB) beside the adapters that "
            "stay in memory: raise it, or unload or unpin one."
        )


def _key(parts: list[tuple[Loaded, float]]) -> tuple[tuple[str, float], ...]:
    """Return what equal blends share."""
    return tuple(sorted((loaded.identity, weight) for loaded, weight in parts))


def _read_for(owner: weakref.ref[Engine], residents: Residents, loaded: Loaded) -> None:
    try:
        found: SavedAdapter | BaseException = residents._read(loaded)
    except BudwoodError as error:
        found = error
    except BaseException as error:
        kind = ResourceError if is_out_of_memory(error) else BudwoodError
        found = kind(f"adapter '{loaded.label}': reading it failed: {describe(error)}.")
    engine = owner()
    if engine is not None:
        engine.thread.post(lambda: residents.arrived(loaded, found), own_threads=True)

"""The adapters that clients can name: what each name stands for now, and how that changes while requests run.

Each adapter has a name of its own in the engine, which is never given to another one. A client's name is an entry of a
table that maps it to such a name, so that it moves in one assignment, and a request never meets a mixture.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from budwood.adapters.store import CONFIG, SavedAdapter
from budwood.errors import CorruptError, InputError, did_you_mean
from budwood.model.task import Task
from budwood.serving.engine import Engine
from budwood.serving.http.golden import compare
from budwood.serving.http.tokens import Tenant
from budwood.serving.loaded import Loaded
from budwood.untrusted.files import check_name

LONGEST = 48
"""Characters of a name; the engine's own adds a number."""
HASH = 12
"""Characters of an identity after `@` in a model's name."""


@dataclass(frozen=True)
class Served:
    """An adapter under a name.

    Attributes:
        name: what clients call it; key: what the engine calls it.
        identity: hash of its content and of the base.
        path: its folder, below the root; "": it is another name of an adapter.
        created: when it was loaded, in seconds since 1970.
        compared: whether its golden logits, if it has any, were computed here and were as recorded.
    """

    name: str
    key: str
    saved: SavedAdapter
    identity: str
    path: str
    created: int
    compared: bool = False

    def describe(self) -> dict[str, Any]:
        """Return what /v1/models says about it."""
        config, manifest = self.saved.config, self.saved.manifest
        ranks = [config.get(name) for name in ("r", "target_r", "init_r")]
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "budwood",
            "identity": self.identity, "type": self.saved.adapter_type,
            "rank": next((rank for rank in ranks if isinstance(rank, int)), None),
            "task": manifest.task if manifest else None, "on_messages": manifest.on_messages if manifest else None,
        }  # fmt: skip


class Root:
    """The folder below which every adapter has to be."""

    def __init__(self, folder: Path) -> None:
        """Check the folder.

        Raises:
            InputError: it is not there, or is an adapter itself.
        """
        self.folder = folder.resolve()
        if not self.folder.is_dir():
            raise InputError(f"--adapters {folder}: no such folder.")
        if (self.folder / CONFIG).exists():
            raise InputError(f"--adapters {folder}: is an adapter itself: give the folder that it is in.")

    def find(self, path: str) -> Path:
        """Return the folder of a path below the root; no part of it may be a link, or lead out.

        Raises:
            InputError: it does, or there is no such folder.
        """
        parts = Path(path).parts
        if not parts or path.startswith(("/", "~")) or ".." in parts or not path.isprintable() or len(path) > 512:
            raise InputError(f"path {path[:64]!r}: give the path of a folder below the adapters' root.")
        here = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in parts:
                deeper = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
                os.close(here)
                here = deeper
        except OSError as error:
            raise InputError(f"path {path[:64]!r}: no such folder below the adapters' root, or a link.") from error
        finally:
            os.close(here)
        return self.folder.joinpath(*parts)

    def all(self) -> dict[str, str]:
        """Return the path of every adapter by its name: folders with one, and runs, whose folder `adapter` is one."""
        found = {}
        for entry in sorted(os.scandir(self.folder), key=lambda entry: entry.name):
            if entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
                continue
            for path in (entry.name, f"{entry.name}/adapter"):
                if (self.folder / path / CONFIG).is_file():
                    found[entry.name] = path
                    break
        return found


class Catalog:
    """Names of adapters, and of the base.

    Changes are one at a time, by any thread; `resolve`, `hold` and `visible` are the event loop's.
    """

    def __init__(self, engine: Engine, base_name: str, task: Task, root: Root | None = None) -> None:
        self.engine, self.base_name, self.task, self.root = engine, base_name, task, root
        self.created = int(time.time())
        self._table: dict[str, Served] = {}
        self._changing, self._counting = threading.Lock(), threading.Lock()
        self._uses: Counter[str] = Counter()
        self._retired: set[str] = set()
        self._numbers = itertools.count(1)

    # For requests.

    def all(self) -> list[Served]:
        """Return the adapters."""
        return list(self._table.values())

    def visible(self, tenant: Tenant) -> list[dict[str, Any]]:
        """Return the models that a tenant may use."""
        has_template = bool(getattr(self.engine.tokenizer, "chat_template", None))
        base = {
            "id": self.base_name, "object": "model", "created": self.created, "owned_by": "budwood",
            "identity": self.engine.base.fingerprint, "type": "base", "rank": None, "task": self.engine.task,
            "on_messages": None if has_template else False,
        }  # fmt: skip
        return [base, *(served.describe() for served in self._table.values() if tenant.allows(served.name))]

    def resolve(self, model: str, tenant: Tenant) -> Served | None:
        """Return the adapter of a model's name, which may end with `@` and the first characters of its identity.

        Returns:
            None: the base.

        Raises:
            KeyError: there is no such model, or the tenant may not use it.
        """
        name, at, wanted = model.partition("@")
        served = self._table.get(name)
        if served is not None and tenant.allows(name):
            if not at or len(wanted) >= HASH and served.identity.startswith(wanted):
                return served
        elif model == self.base_name or name == self.base_name and self._is_base(wanted):
            return None
        raise KeyError(model)

    def _is_base(self, wanted: str) -> bool:
        return len(wanted) >= HASH and self.engine.base.fingerprint.startswith(wanted)

    @contextmanager
    def hold(self, served: Served) -> Iterator[None]:
        """Keep an adapter in the engine for a request, though its name may move or go meanwhile."""
        with self._counting:
            self._uses[served.key] += 1
        try:
            yield
        finally:
            with self._counting:
                self._uses[served.key] -= 1
                last = not self._uses[served.key] and served.key in self._retired
                if not self._uses[served.key]:
                    del self._uses[served.key]
                    self._retired.discard(served.key)
            if last:
                self.engine.thread.post(partial(self.engine.unload, served.key))

    def _retire(self, key: str) -> None:
        """Unload an adapter whose name has gone, with the last request that holds it."""
        with self._counting:
            if self._uses[key]:
                self._retired.add(key)
                return
            del self._uses[key]
        self.engine.unload(key)

    # For the administrator.

    def load(
        self, name: str, path: str, verify: str = "auto", replaces: bool = False, pinned: bool = False
    ) -> tuple[Served, str]:
        """Load the adapter in a folder below the root; on any failure everything stays as it was.

        Args:
            name: what clients call it.
            path: its folder, below the root.
            verify: "golden": its golden logits must be there, and be what it computes here; "hash": only its file is
                compared with its record; "auto": golden logits are compared if it has them.
            replaces: whether the name may stand for another adapter, which requests in flight keep.
            pinned: whether it stays in memory, where there is a budget for adapters.

        Returns:
            The adapter, and what the comparison found.

        Raises:
            InputError, CorruptError, ResourceError: it cannot be loaded, or is not what it was.
        """
        self._check_name(name)
        with self._changing:
            return self._load(name, path, verify, replaces, pinned)

    def _load(self, name: str, path: str, verify: str, replaces: bool, pinned: bool) -> tuple[Served, str]:
        if self.root is None:
            raise InputError("the server has no folder of adapters: start it with --adapters DIR.")
        old = self._table.get(name)
        if old is not None and not replaces:
            raise InputError(f"'{name}' is loaded already: reload it, or unload it first.")
        folder = self.root.find(path)
        key = f"{name}.{next(self._numbers)}"
        self.engine.load(key, folder, pinned=pinned)
        try:
            loaded = self.engine.names[key]
            assert loaded.saved is not None
            self.engine.call(partial(_rename, loaded, name))
            if old is not None and old.identity == loaded.identity:
                self.engine.unload(key)
                return old, "unchanged"
            found = (
                "not compared"
                if verify == "hash"
                else compare(self.engine, self.task, key, loaded.saved, verify == "golden")
            )
        except BaseException:
            self.engine.unload(key)
            raise
        served = Served(name, key, loaded.saved, loaded.identity, path, int(time.time()), verify != "hash")
        self._table = {**self._table, name: served}
        if old is not None:
            self._retire(old.key)
        return served, found

    def reload(self, verify: str = "auto") -> dict[str, dict[str, Any]]:
        """Load again the adapters whose folders have changed, and those whose folders are new; names that `alias` gave
        keep what they stand for.

        Returns:
            What happened, by name.
        """
        if self.root is None:
            raise InputError("the server has no folder of adapters: start it with --adapters DIR.")
        done: dict[str, dict[str, Any]] = {}
        served_paths = {one.name: one.path for one in self.all()}
        for name, path in {**self.root.all(), **served_paths}.items():
            if not path:
                continue
            try:
                served, found = self.load(name, path, verify, replaces=True)
                done[name] = {"identity": served.identity, "result": found}
            except (InputError, CorruptError) as error:
                done[name] = {"error": str(error)}
        return done

    def alias(self, name: str, target: str, verify: str = "auto") -> Served:
        """Let a name, new or taken, stand for the adapter of another; requests in flight keep theirs.

        Args:
            verify: as for `load`, unless the adapter was compared when it was loaded.

        Raises:
            InputError: the name is not valid, or there is no such adapter.
            CorruptError: the adapter is not what it was when it was saved.
        """
        self._check_name(name)
        with self._changing:
            served = self._find(target)
            if target == name:
                return served
            if verify == "golden" or verify == "auto" and not served.compared:
                compare(self.engine, self.task, served.key, served.saved, verify == "golden")
                served = replace(served, compared=True)
                self._table = {**self._table, target: served}
            key, old = f"{name}.{next(self._numbers)}", self._table.get(name)
            self.engine.alias(key, served.key)
            moved = replace(served, name=name, key=key, path="", created=int(time.time()))
            self._table = {**self._table, name: moved}
            if old is not None:
                self._retire(old.key)
            return moved

    def unload(self, name: str) -> None:
        """Remove a name; requests in flight end on its adapter.

        Raises:
            InputError: there is no such adapter.
        """
        with self._changing:
            served = self._find(name)
            self._table = {other: one for other, one in self._table.items() if other != name}
            self._retire(served.key)

    def _find(self, name: str) -> Served:
        if name not in self._table:
            raise InputError(f"no adapter '{name[:64]}' is served.{did_you_mean(name, self._table)}")
        return self._table[name]

    def _check_name(self, name: str) -> None:
        if len(check_name(name)) > LONGEST:
            raise InputError(f"adapter name '{name}' has {len(name)} characters: use at most {LONGEST}.")
        if name == self.base_name:
            raise InputError(f"adapter name '{name}' is that of the base: choose another, or start with --name.")


def _rename(loaded: Loaded, name: str) -> None:
    """Let messages call an adapter what clients do."""
    loaded.label = name
    if loaded.memory is not None:
        loaded.memory.live.label = name

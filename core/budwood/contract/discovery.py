"""Finds installed plugins without running them: names, versions, and summaries from metadata and parsed sources."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from budwood.errors import BUG, BudwoodError, InputError, ResourceError, describe, did_you_mean

STRATEGIES = "budwood"
"""Entry point group of strategies; tasks, data formats and others have separate groups below it."""
ABSENT = "budwood.absent"
"""Entry point group of texts: why there is no strategy of a name that users may look for, and what to use instead."""
WORDS = {
    STRATEGIES: "strategy",
    "budwood.tasks": "task",
    "budwood.formats": "data format",
    "budwood.quantizers": "quantiser",
    "budwood.attacks": "attack",
    "budwood.rewards": "reward",
    "budwood.demos": "demo",
    ABSENT: "absent strategy",
}
"""Every entry point group, and the word for its members in messages."""


OWN = "budwood"
"""The distribution of the plugins that come with Budwood."""


class PluginError(ResourceError):
    """A plugin is broken; the message names it, its distribution and the remedy."""


def plugin_fault(owner: str, text: str, unexpected: bool = False) -> BudwoodError:
    """Return the error for a fault of a plugin: a bug in Budwood if the plugin is one of its own.

    Args:
        owner: distribution and version of the plugin, such as "dist 1.2".
        text: what is wrong, with the plugin's name.
        unexpected: an exception that only the plugin's author can explain; `text` lacks its full stop.
    """
    if owner.partition(" ")[0] == OWN:
        return BudwoodError(f"{text.removesuffix('.')}. {BUG}")
    return PluginError(f"{text}. Report it to its author; --debug shows the traceback." if unexpected else text)


@dataclass(frozen=True)
class Installed:
    """An entry point of an installed distribution; nothing has been imported yet."""

    name: str
    value: str
    distribution: str
    version: str

    @property
    def owner(self) -> str:
        """Distribution and version, as shown in messages."""
        return f"{self.distribution} {self.version}"

    @property
    def summary(self) -> str:
        """First line of the object's docstring, parsed from its source without running it."""
        module, _, attribute = self.value.partition(":")
        node = _find_node(module, attribute)
        text = ast.get_docstring(node) if node is not None else None
        return text.splitlines()[0] if text else ""

    def declared(self, attribute: str) -> tuple[str, ...]:
        """Names assigned to a class attribute, parsed from the source without running it; () if that fails."""
        module, _, name = self.value.partition(":")
        node = _find_node(module, name)
        for statement in node.body if isinstance(node, ast.ClassDef) else ():
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == attribute for target in targets):
                try:
                    return tuple(ast.literal_eval(statement.value))  # type: ignore[attr-defined]
                except (ValueError, TypeError):
                    return ()
        return ()

    def load(self) -> Any:
        """Import the object.

        Raises:
            PluginError: it cannot be imported or does not exist.
        """
        module, _, attribute = self.value.partition("[")[0].strip().partition(":")
        try:
            target: Any = importlib.import_module(module)
            for part in filter(None, attribute.split(".")):
                target = getattr(target, part)
        except (Exception, SystemExit) as error:
            cause = describe(error)
            raise PluginError(
                f"plugin '{self.name}' of {self.owner} ({self.value}) cannot be imported: {cause}. "
                f"Repair or update it (pip install -U {self.distribution}), or leave it out of the recipe."
            ) from error
        return target


def installed(group: str = STRATEGIES) -> dict[str, list[Installed]]:
    """Return all entry points of `group` by name; `find` refuses names that several distributions provide."""
    return {name: list(entries) for name, entries in sorted(scan(_path_state()).get(group, {}).items())}


def unknown_groups() -> list[str]:
    """Return unknown entry point groups whose names start like Budwood's."""
    return sorted(scan(_path_state()).keys() - WORDS.keys())


@functools.lru_cache(maxsize=4)
def scan(path: tuple[tuple[str, int | None], ...]) -> dict[str, dict[str, list[Installed]]]:
    """Return Budwood's entry points by group and name.

    Cached, since reading the metadata of all distributions takes 10 ms or more and a command calls this about 20 times.
    `path` is the state of sys.path, so that the cache notices changes.
    """
    result: dict[str, dict[str, list[Installed]]] = {}
    entry_points = metadata.entry_points()
    ours = [group for group in entry_points.groups if group in WORDS or group.startswith(f"{STRATEGIES}.")]
    owners: dict[int, tuple[str, str]] = {}  # each name and version is read from a file
    for group in ours:
        for point in entry_points.select(group=group):
            dist = point.dist
            if id(dist) not in owners:
                owners[id(dist)] = (dist.name or "unknown", dist.version or "0") if dist else ("unknown", "0")
            entry = Installed(point.name, point.value, *owners[id(dist)])
            entries = result.setdefault(group, {}).setdefault(point.name, [])
            if entry not in entries:  # a distribution found twice on sys.path counts once
                entries.append(entry)
    return result


def _path_state() -> tuple[tuple[str, int | None], ...]:
    """Return the entries of sys.path, each with its modification time."""
    return tuple((entry, _modified(entry)) for entry in sys.path)


def _modified(entry: str) -> int | None:
    try:
        return os.stat(entry or ".").st_mtime_ns
    except OSError:
        return None


def find(name: str, group: str = STRATEGIES) -> Installed:
    """Return the one entry point called `name`.

    Raises:
        InputError: no distribution provides it (the message names the closest match), or several do (it names all).
    """
    available, word = installed(group), WORDS[group]
    if name not in available:
        if group == STRATEGIES and (why := absence(name)):
            raise InputError(f"strategy '{name}' is not offered: it {why}.")
        known = ", ".join(available) or "none"
        raise InputError(f"{word} '{name}' is not installed.{did_you_mean(name, available)} Installed: {known}.")
    entries = available[name]
    if len(entries) > 1:
        owners = " and ".join(entry.owner for entry in entries)
        remedy = f"uninstall one of them (pip uninstall {entries[-1].distribution})"
        raise InputError(f"{word} '{name}' is provided by {owners}: {remedy}.")
    return entries[0]


def absence(name: str) -> str:
    """Return why a distribution leaves out the strategy `name`, and what to use instead; "": none says anything.

    Raises:
        PluginError: the text cannot be imported.
    """
    entries = installed(ABSENT).get(name.lower().replace("-", "_"), [])
    return str(entries[0].load()) if entries else ""


def _find_node(module: str, attribute: str, depth: int = 0) -> ast.ClassDef | ast.FunctionDef | None:
    """Find the definition of `attribute` in `module`, following `from x import attribute` through source files."""
    path = _source_of(module)
    if path is None or depth > 3:
        return None
    for node in _statements(path):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            return node
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == attribute for alias in node.names):
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*parts, *filter(None, [node.module])])
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == attribute)
            return _find_node(target, original, depth + 1)
    return None


@functools.cache
def _statements(path: Path) -> list[ast.stmt]:
    try:
        return ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return []


def _source_of(module: str) -> Path | None:
    """Return the source file of a module, without importing it or its parents."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    folders: Iterable[str] = spec.submodule_search_locations or []
    candidates = [Path(f).joinpath(*rest) for f in folders] if rest or folders else []
    for candidate in candidates:
        for path in (candidate / "__init__.py", candidate.with_suffix(".py")):
            if path.is_file():
                return path
    return Path(spec.origin) if spec.origin and not rest and Path(spec.origin).is_file() else None

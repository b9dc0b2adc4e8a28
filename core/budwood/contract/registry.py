"""Composes strategies: checks slots and requirements, resolves their order, and calls their hooks."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

import pluggy

from budwood.contract.calls import Calls, Cost
from budwood.contract.discovery import PluginError
from budwood.contract.hookspecs import HookSpecs
from budwood.contract.loading import EXCLUSIVE, HOOKS, check_hooks
from budwood.contract.strategy import Plugin, Strategy
from budwood.errors import BudwoodError, InputError, describe


class _Manager(pluggy.PluginManager):
    """A pluggy manager that guards hooks. It only reads attributes named like hooks, so it evaluates no properties."""

    def __init__(self, calls: Calls) -> None:
        super().__init__("budwood")
        self._calls = calls
        self.add_hookspecs(HookSpecs)

    def register(self, plugin: Any, name: str | None = None) -> str | None:
        registered = super().register(plugin, name)
        for caller in self.get_hookcallers(plugin) or ():
            for impl in (impl for impl in caller.get_hookimpls() if impl.plugin is plugin):
                guarded = self._calls.guard(plugin, caller.name, impl.function, impl.wrapper)
                impl.function = guarded  # type: ignore[misc]
        return registered

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        return super().parse_hookimpl_opts(plugin, name) if name in HOOKS else None


@dataclass(frozen=True)
class HookCall:
    """One implementation of a hook: the plugin, its name, and whether it wraps the implementations after it."""

    name: str
    plugin: Any
    wraps: bool


class Composition:
    """Compatible strategies in resolved order, and calls of their hooks.

    Raises (on construction):
        InputError: two owners of a slot or an exclusive hook, a missing requirement, a conflict, a cycle in the order.
    """

    def __init__(
        self, strategies: Sequence[Strategy], problems: list[str] | None = None, complete: bool = True
    ) -> None:
        """Compose strategies.

        Args:
            problems: collects incompatibilities instead of raising; a cycle leaves the order unchanged.
            complete: False if missing strategies might provide what others require.
        """
        conflicts = _find_conflicts(strategies, complete)
        self.strategies = _resolve_order(strategies, conflicts)
        if problems is not None:
            problems += conflicts
        elif conflicts:
            raise InputError(" ".join(conflicts), conflicts)
        self._calls = Calls()
        self._manager = _Manager(self._calls)
        self._disabled: set[int] = set()
        # pluggy calls last-in first-out: register in reverse, so that the first in order is called first and outermost.
        for strategy in reversed(self.strategies):
            self._calls.add(strategy)
            if not self._manager.has_plugin(strategy.name):
                self._manager.register(strategy, name=strategy.name)
        self._manager.check_pending()

    def register_core(self, plugin: object, name: str) -> None:
        """Register a part of core, or the task, below the strategies: it is called last, and all of them wrap it.

        Raises:
            PluginError: see `check_hooks`.
        """
        check_hooks(type(plugin), name)
        above = self._manager.list_name_plugin()
        for _, other in above:
            self._manager.unregister(other)
        self._manager.register(plugin, name=f"budwood: {name}")
        for other_name, other in above:
            self._manager.register(other, name=other_name)
        self._manager.check_pending()

    def implements(self, hook: str) -> list[str]:
        """Return the names of the plugins that implement `hook`, in call order."""
        return [call.name for call in self.calls(hook)]

    def calls(self, hook: str) -> list[HookCall]:
        """Return the implementations of `hook`: wrappers, outermost first, then the others in call order."""
        return [HookCall(i.plugin_name, i.plugin, i.wrapper) for i in self._implementations(hook)]

    def receives(self, hook: str, argument: str) -> bool:
        """Return whether an implementation of `hook` takes `argument`."""
        return any(argument in impl.argnames for impl in self._implementations(hook))

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call a hook; return the first result of an exclusive hook, otherwise all results that are not None."""
        self._note_run(arguments)
        return getattr(self._manager.hook, hook)(**arguments)

    def collect(
        self, hook: str, per_plugin: Mapping[str, Callable[[Any], Any]] | None = None, **arguments: Any
    ) -> list[tuple[Any, Any]]:
        """Call a hook on each plugin in order; return the (plugin, result) pairs whose result is not None.

        Args:
            per_plugin: functions from a plugin to its value of an argument.
        """
        self._note_run(arguments)
        pairs = []
        for impl in self._implementations(hook):
            own = {name: value(impl.plugin) for name, value in (per_plugin or {}).items()}
            result = impl.function(*(own[name] if name in own else arguments[name] for name in impl.argnames))
            if result is not None:
                pairs.append((impl.plugin, result))
        return pairs

    def ask(self, hook: str, name: str, **arguments: Any) -> tuple[Any, Any]:
        """Call a hook on the plugin `name` only; return (plugin, result), or (None, None) if it has no such hook."""
        self._note_run(arguments)
        for impl in self._implementations(hook):
            if impl.plugin_name == name:
                return impl.plugin, impl.function(*(arguments[argument] for argument in impl.argnames))
        return None, None

    def chain(self, hook: str, key: str, value: Any, **arguments: Any) -> Any:
        """Pass `value` as argument `key` through each implementer in order; each receives the previous result."""
        results = [result for _, result in self.follow(hook, key, value, **arguments)]
        return results[-1] if results else value

    def follow(self, hook: str, key: str, value: Any, **arguments: Any) -> Iterator[tuple[Any, Any]]:
        """Yield the intermediate results of `chain`, each with its plugin."""
        self._note_run(arguments)
        for impl in self._implementations(hook):
            arguments[key] = value
            value = impl.function(*(arguments[name] for name in impl.argnames))
            yield impl.plugin, value

    def notify(self, event: Any, say: Callable[[str], Any]) -> None:
        """Notify observers; one that fails is reported through `say(text)` once and disabled."""
        for impl in self._implementations("on_event"):
            if id(impl.plugin) in self._disabled:
                continue
            try:
                impl.function(*(event for _ in impl.argnames))
            except Exception as error:
                self._disabled.add(id(impl.plugin))
                cause = error.__cause__ if isinstance(error, PluginError) and error.__cause__ else error
                reason = str(cause) if isinstance(cause, BudwoodError) else describe(cause)
                say(f"{impl.plugin} failed in on_event and is disabled: {reason}")
                if os.environ.get("BUDWOOD_DEBUG", "0") not in ("", "0"):
                    say("".join(traceback.format_exception(cause)).rstrip())

    @property
    def costs(self) -> list[Cost]:
        """The costs so far of all hooks and of core's own parts, most expensive first."""
        return sorted((c for c in self._calls.costs.values() if c.calls), key=lambda cost: -cost.own_seconds)

    @property
    def measures_memory(self) -> bool:
        """Whether memory is measured as well."""
        return self._calls.peak is not None

    def part(self, name: str) -> AbstractContextManager[None]:
        """Measure a part of core that is not a hook, under `name`."""
        return self._calls.part(name)

    def current(self) -> tuple[str, str]:
        """Return the owner and the hook or part whose code runs now; ("", "") outside of all of them."""
        frame = self._calls._frame
        return ("", "") if frame is None else (frame.cost.owner, frame.cost.hook)

    def account(self, name: str, seconds: float) -> None:
        """Add a row of core for time that passed before this composition existed."""
        self._calls.costs["core", name] = Cost("core", name, 1, seconds, seconds)

    def measure(self, peak: Callable[[], int], wait: Callable[[], None] | None) -> None:
        """Measure memory as well from now on, and read the clock after `wait()`.

        Args:
            peak: returns the process's peak memory in bytes.
            wait: returns when the device has finished all queued work; None if the device is synchronous.
        """
        self._calls.peak, self._calls.wait = peak, wait

    def claim(self, name: str, plugin: Any = None, hook: str = "") -> None:
        """Reserve a metric name for a plugin, by default the one whose code is running.

        Raises:
            PluginError: core or another plugin already logs under that name.
        """
        self._calls.claim(name, plugin, hook)

    def culprit(self, error: BaseException) -> Plugin | None:
        """Return the plugin whose code raised an error, or None."""
        return self._calls.culprit(error)

    def _implementations(self, hook: str) -> list[Any]:
        return list(reversed(getattr(self._manager.hook, hook).get_hookimpls()))

    def _note_run(self, arguments: dict[str, Any]) -> None:
        run = arguments.get("run") or getattr(arguments.get("step"), "run", None)
        if run is not None:
            self._calls.run = run


def _owns(strategy: Strategy) -> set[str]:
    return {strategy.name, *strategy.slots, *strategy.provides}


def _find_conflicts(strategies: Sequence[Strategy], complete: bool) -> list[str]:
    """Return why the strategies cannot be combined; requirements are checked only if `complete`."""
    problems = []
    names: dict[str, Strategy] = {}
    owners: dict[str, Strategy] = {}
    for strategy in strategies:
        if strategy.name in names:
            problems.append(f"strategy '{strategy.name}' appears twice in the recipe: leave one out.")
            continue
        names[strategy.name] = strategy
        for slot in strategy.slots:
            if slot in owners:
                problems.append(f"{owners[slot]} and {strategy} both own the slot '{slot}': leave one out.")
            owners[slot] = strategy
    for hook in EXCLUSIVE:
        rivals = [s for s in names.values() if hasattr(getattr(type(s), hook, None), "budwood_impl")]
        problems += [f"{rivals[0]} and {other} both implement '{hook}': leave one out." for other in rivals[1:]]
    for strategy in names.values():
        present = set().union(*(_owns(other) for other in names.values() if other is not strategy))
        missing = [need for need in strategy.requires if need not in present] if complete else []
        problems += [
            f"{strategy} requires '{need}': add a strategy that provides it to the recipe." for need in missing
        ]
        clashes = [name for name in strategy.conflicts if name in present]
        problems += [f"{strategy} conflicts with '{name}': leave one out." for name in clashes]
    return problems


def _resolve_order(strategies: Sequence[Strategy], problems: list[str]) -> list[Strategy]:
    """Sort topologically by `before` and `after`; the recipe's order breaks ties and is kept if there is a cycle."""
    graph: TopologicalSorter[int] = TopologicalSorter({index: () for index in range(len(strategies))})
    for index, strategy in enumerate(strategies):
        for other_index, other in enumerate(strategies):
            if other is strategy:
                continue
            if _owns(other).intersection(strategy.before):
                graph.add(other_index, index)
            if _owns(other).intersection(strategy.after):
                graph.add(index, other_index)
    try:
        graph.prepare()
    except CycleError as error:
        cycle = " before ".join(str(strategies[index]) for index in error.args[1])
        problems.append(f"strategies cannot be ordered: {cycle}. Leave one of them out.")
        return list(strategies)
    order: list[int] = []
    ready: list[int] = []
    while graph.is_active():
        ready = sorted([*ready, *graph.get_ready()])
        order.append(ready.pop(0))
        graph.done(order[-1])
    return [strategies[index] for index in order]

"""From strategies to a composition: slots, requirements and order solved, and the hook calls over them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

import pluggy

from budwood.contract.discovery import PluginError
from budwood.contract.hookspecs import HookSpecs
from budwood.contract.loading import HOOKS, ONE_OWNER, check_hooks
from budwood.contract.strategy import Strategy
from budwood.errors import BudwoodError, InputError, is_out_of_memory, system_error


class _Manager(pluggy.PluginManager):
    """pluggy's, but it looks only at methods named like hooks, so that no property of a plugin is ever read."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        return super().parse_hookimpl_opts(plugin, name) if name in HOOKS else None


@dataclass(frozen=True)
class HookCall:
    """One implementation of a hook: the name under which its plugin stands, and whether it wraps all that follow."""

    name: str
    plugin: Any
    wraps: bool


class Composition:
    """Strategies that fit together, in the solved order, and the hook calls over them.

    Raises (on construction):
        InputError: two owners of a slot or of a hook, a missing requirement, a conflict, a cycle in the order.
    """

    def __init__(
        self, strategies: Sequence[Strategy], problems: list[str] | None = None, complete: bool = True
    ) -> None:
        """Compose.

        Args:
            problems: gathers what does not fit together, in place of an error; a cycle leaves the order as it was.
            complete: no strategy is missing, which might provide what others require.
        """
        found = _find_clashes(strategies, complete)
        self.strategies = _solve_order(strategies, found)
        if problems is not None:
            problems += found
        elif found:
            raise InputError(" ".join(found), found)
        self._manager = _Manager("budwood")
        self._manager.add_hookspecs(HookSpecs)
        self._set_aside: set[int] = set()
        # pluggy calls last-in first-out: registered in reverse, the first in order is called first and wraps outermost.
        for strategy in reversed(self.strategies):
            if not self._manager.has_plugin(strategy.name):
                self._manager.register(strategy, name=strategy.name)
        self._manager.check_pending()

    def register_core(self, plugin: object, name: str) -> None:
        """Add a part of core, or the task, under the strategies: called last and wrapped by all of them.

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
        """Names of the plugins that implement `hook`, in the order in which they are called."""
        return [call.name for call in self.calls(hook)]

    def calls(self, hook: str) -> list[HookCall]:
        """Who implements `hook`: wrappers, outermost first, then the others in the order in which they are called."""
        return [HookCall(i.plugin_name, i.plugin, i.wrapper or i.hookwrapper) for i in self._implementations(hook)]

    def call(self, hook: str, **arguments: Any) -> Any:
        """Call a hook: the first result of a hook with one owner, else the list of results that are not None."""
        try:
            return getattr(self._manager.hook, hook)(**arguments)
        except Exception as error:
            self._name_owner(error, arguments)
            raise

    def collect(self, hook: str, **arguments: Any) -> list[tuple[Any, Any]]:
        """Call a hook on each implementer in order; return (plugin, result) pairs whose result is not None."""
        pairs = []
        for impl in self._implementations(hook):
            result = self._call_one(impl, arguments)
            if result is not None:
                pairs.append((impl.plugin, result))
        return pairs

    def give(self, hook: str, name: str, **arguments: Any) -> None:
        """Call a hook of the plugin called `name` alone, where there is one that implements it."""
        for impl in self._implementations(hook):
            if impl.plugin.name == name:
                self._call_one(impl, arguments)

    def chain(self, hook: str, key: str, value: Any, **arguments: Any) -> Any:
        """Pass `value` as argument `key` through each implementer in order; each receives what the last returned.

        Raises:
            PluginError: one returned None.
        """
        for impl in self._implementations(hook):
            value = self._call_one(impl, {**arguments, key: value})
            if value is None:
                raise PluginError(f"{impl.plugin}: hook '{hook}' returned None; it must return the {key}.")
        return value

    def notify(self, event: Any, say: Callable[[str], Any]) -> None:
        """Tell observers; one that fails is named through `say(text)` once and set aside."""
        for impl in self._implementations("on_event"):
            if id(impl.plugin) in self._set_aside:
                continue
            try:
                impl.function(*(event for _ in impl.argnames))
            except Exception as error:
                self._set_aside.add(id(impl.plugin))
                say(f"{impl.plugin} failed in on_event and is set aside: {type(error).__name__}: {error}")

    def _implementations(self, hook: str) -> list[Any]:
        return list(reversed(getattr(self._manager.hook, hook).get_hookimpls()))

    def _call_one(self, impl: Any, arguments: dict[str, Any]) -> Any:
        try:
            return impl.function(*(arguments[name] for name in impl.argnames))
        except Exception as error:
            self._name_owner(error, arguments)
            raise

    def _name_owner(self, error: Exception, arguments: dict[str, Any]) -> None:
        """Raise a PluginError that names the strategy in whose hook `error` came up.

        Returns where it is none's: Budwood's own errors, what the machine cannot, and core's or the task's hooks.
        """
        if isinstance(error, BudwoodError) or system_error(error) or is_out_of_memory(error):
            return
        owner, hook = None, ""
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        for frame, inner in zip(frames, [*frames[1:], None], strict=True):
            # Right above another hook's caller stands a wrapper that waits at its yield: not where it came up.
            waiting = inner is not None and inner.f_code.co_name == "_multicall"
            if frame.f_code.co_name in HOOKS and not waiting:
                this = frame.f_locals.get("self")
                if isinstance(this, Strategy):
                    owner, hook = this, frame.f_code.co_name
        if owner is None:
            return
        run = arguments.get("run") or getattr(arguments.get("step"), "run", None)
        at = f", step {run.step + 1}" if run is not None and hook not in _BEFORE_STEPS else ""
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PluginError(
            f"{owner}, hook {hook}{at}: {what}. Report it to its author; --debug shows the traceback."
        ) from error


_BEFORE_STEPS = HOOKS[: HOOKS.index("prepare_batch")]


def _owns(strategy: Strategy) -> set[str]:
    return {strategy.name, *strategy.slots, *strategy.provides}


def _find_clashes(strategies: Sequence[Strategy], complete: bool) -> list[str]:
    """What keeps the strategies from being in one recipe; requirements only where none is missing."""
    problems = []
    names: dict[str, Strategy] = {}
    owners: dict[str, Strategy] = {}
    for strategy in strategies:
        if strategy.name in names:
            problems.append(f"strategy '{strategy.name}' stands twice in the recipe: leave one out.")
            continue
        names[strategy.name] = strategy
        for slot in strategy.slots:
            if slot in owners:
                problems.append(f"{owners[slot]} and {strategy} both own the slot '{slot}': leave one out.")
            owners[slot] = strategy
    for hook in ONE_OWNER:
        both = [s for s in names.values() if hasattr(getattr(type(s), hook, None), "budwood_impl")]
        problems += [f"{both[0]} and {other} both implement '{hook}': leave one out." for other in both[1:]]
    for strategy in names.values():
        present = set().union(*(_owns(other) for other in names.values() if other is not strategy))
        missing = [need for need in strategy.requires if need not in present] if complete else []
        problems += [
            f"{strategy} requires '{need}': add a strategy that provides it to the recipe." for need in missing
        ]
        clashes = [name for name in strategy.conflicts if name in present]
        problems += [f"{strategy} conflicts with '{name}': leave one out." for name in clashes]
    return problems


def _solve_order(strategies: Sequence[Strategy], problems: list[str]) -> list[Strategy]:
    """Topological order over `before` and `after`; the recipe's order breaks ties, and stays where there is a cycle."""
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
        problems.append(f"strategies cannot be put in an order: {cycle}. Leave one of them out.")
        return list(strategies)
    order: list[int] = []
    ready: list[int] = []
    while graph.is_active():
        ready = sorted([*ready, *graph.get_ready()])
        order.append(ready.pop(0))
        graph.done(order[-1])
    return [strategies[index] for index in order]

"""From a recipe's names to a composition: import what is named, check the contract, solve slots and order."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

import pluggy
from pydantic import ValidationError

from budwood.contract.discovery import Installed, PluginError, find
from budwood.contract.discovery import installed as installed  # the other half of this module, which loads nothing
from budwood.contract.hookspecs import HookSpecs
from budwood.contract.strategy import API_VERSION, Options, Strategy
from budwood.contract.validation import dotted, first_problem, sentence
from budwood.errors import BudwoodError, InputError, did_you_mean

HOOKS = tuple(name for name, value in vars(HookSpecs).items() if hasattr(value, "how"))
ONE_OWNER = tuple(name for name in HOOKS if getattr(HookSpecs, name).how == "one owner")
CORES_OWN = tuple(name for name in HOOKS if getattr(HookSpecs, name).how == "core's own")
WRAPPABLE = tuple(name for name in HOOKS if getattr(HookSpecs, name).wrappable)


def load_strategy(name: str) -> tuple[type[Strategy], Installed]:
    """Import the strategy `name` and check that it keeps the contract.

    Raises:
        InputError: it is not installed, or two distributions have it.
        PluginError: it fails to import, is not a Strategy, or has a misspelt, unmarked or wrongly declared hook.
    """
    entry = find(name)
    cls = entry.load()
    who = f"strategy '{name}' of {entry.owner}"
    if not (isinstance(cls, type) and issubclass(cls, Strategy)):
        raise PluginError(f"{who}: {entry.value} is not a subclass of budwood.Strategy. Point the entry point at one.")
    if cls.api != API_VERSION:
        raise PluginError(
            f"{who} was written for version {cls.api} of the contract, and this Budwood has {API_VERSION}: "
            f"update it (pip install -U {entry.distribution})."
        )
    for declared in ("slots", "provides", "requires", "conflicts", "before", "after"):
        names = getattr(cls, declared)
        if isinstance(names, str) or not all(isinstance(item, str) for item in names):
            raise PluginError(f"{who}: '{declared}' must be a tuple of names, not {names!r}.")
    if not (isinstance(cls.Options, type) and issubclass(cls.Options, Options)):
        raise PluginError(f"{who}: its Options must be a subclass of budwood.Options, which refuses unknown keys.")
    check_hooks(cls, who)
    return cls, entry


def check_hooks(cls: type, who: str) -> None:
    """Check every hook of a class against the contract; `who` leads messages.

    Raises:
        PluginError: a hook is misspelt, unmarked, takes an unknown argument, or wraps what cannot be wrapped.
    """
    for method, function in inspect.getmembers(cls, callable):
        marks: dict[str, Any] | None = getattr(function, "budwood_impl", None)
        if marks is None:
            if method in HOOKS:
                raise PluginError(
                    f"{who}: method '{method}' is named like a hook; mark it with @hookimpl, or rename it."
                )
            continue
        if method not in HOOKS:
            raise PluginError(f"{who}: there is no hook '{method}'.{did_you_mean(method, HOOKS)}")
        wrapper = marks["wrapper"] or marks["hookwrapper"]
        if wrapper and method not in WRAPPABLE:
            raise PluginError(f"{who}: hook '{method}' cannot be wrapped; only {', '.join(WRAPPABLE)} can.")
        if not wrapper and method in CORES_OWN and issubclass(cls, Strategy):
            raise PluginError(f"{who}: hook '{method}' is not a strategy's own; use @hookimpl(wrapper=True).")
        if marks["tryfirst"] or marks["trylast"]:
            raise PluginError(f"{who}: hook '{method}': declare the order with `before` and `after` of the class.")
        allowed = list(inspect.signature(getattr(HookSpecs, method)).parameters)[1:]
        for argument in list(inspect.signature(function).parameters.values())[1:]:
            if argument.name not in allowed:
                raise PluginError(
                    f"{who}: hook '{method}' has no argument '{argument.name}'."
                    f"{did_you_mean(argument.name, allowed)} It may take {', '.join(allowed)}."
                )
            if argument.default is not argument.empty:
                raise PluginError(f"{who}: hook '{method}': argument '{argument.name}' must have no default.")


def build_strategy(name: str, options: dict[str, Any], where: str | Callable[..., str]) -> Strategy:
    """Import and instantiate a strategy with validated options.

    Args:
        name: under which it is installed.
        options: as written.
        where: leads messages ("recipe.yaml:7"), or gives that for an option's place (`where("rank")`).

    Raises:
        InputError: an option is unknown or out of range.
        PluginError: see `load_strategy`, or it fails to start.
    """
    cls, entry = load_strategy(name)
    try:
        validated = cls.Options.model_validate(options)
    except ValidationError as error:
        place, text = first_problem(error, cls.Options)
        at = where if isinstance(where, str) else where(*place)
        raise InputError(f"{at}: {dotted((name, *place))}: {sentence(text)}") from None
    try:
        return cls(validated, name=name, distribution=entry.owner)
    except BudwoodError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PluginError(
            f"strategy '{name}' of {entry.owner} cannot start: {what}. Report it to its author."
        ) from error


class _Manager(pluggy.PluginManager):
    """pluggy's, but it looks only at methods named like hooks, so that no property of a plugin is ever read."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        return super().parse_hookimpl_opts(plugin, name) if name in HOOKS else None


class Composition:
    """Strategies that fit together, in the solved order, and the hook calls over them.

    Raises (on construction):
        InputError: two owners of a slot or of a hook, a missing requirement, a conflict, a cycle in the order.
    """

    def __init__(self, strategies: Sequence[Strategy]) -> None:
        _check_slots(strategies)
        for hook in ONE_OWNER:
            owners = [s for s in strategies if hasattr(getattr(type(s), hook, None), "budwood_impl")]
            if len(owners) > 1:
                raise InputError(f"{owners[0]} and {owners[1]} both implement '{hook}': leave one out.")
        self.strategies = _solve_order(strategies)
        self._manager = _Manager("budwood")
        self._manager.add_hookspecs(HookSpecs)
        self._set_aside: set[int] = set()
        # pluggy calls last-in first-out: registered in reverse, the first in order is called first and wraps outermost.
        for strategy in reversed(self.strategies):
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
        return [impl.plugin_name for impl in self._implementations(hook)]

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
        if isinstance(error, BudwoodError | OSError | MemoryError) or type(error).__name__ == "OutOfMemoryError":
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


def _check_slots(strategies: Sequence[Strategy]) -> None:
    names: dict[str, Strategy] = {}
    owners: dict[str, Strategy] = {}
    for strategy in strategies:
        if strategy.name in names:
            raise InputError(f"strategy '{strategy.name}' stands twice in the recipe: leave one out.")
        names[strategy.name] = strategy
        for slot in strategy.slots:
            if slot in owners:
                raise InputError(f"{owners[slot]} and {strategy} both own the slot '{slot}': leave one out.")
            owners[slot] = strategy
    for strategy in strategies:
        others = set().union(*(_owns(other) for other in strategies if other is not strategy))
        for missing in (need for need in strategy.requires if need not in others):
            raise InputError(f"{strategy} requires '{missing}': add a strategy that provides it to the recipe.")
        for clash in (name for name in strategy.conflicts if name in others):
            raise InputError(f"{strategy} conflicts with '{clash}': leave one out.")


def _solve_order(strategies: Sequence[Strategy]) -> list[Strategy]:
    """Topological order over `before` and `after`; the recipe's order breaks ties."""
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
        raise InputError(f"strategies cannot be put in an order: {cycle}. Leave one of them out.") from None
    order: list[int] = []
    ready: list[int] = []
    while graph.is_active():
        ready = sorted([*ready, *graph.get_ready()])
        order.append(ready.pop(0))
        graph.done(order[-1])
    return [strategies[index] for index in order]

"""Turns an entry point into a plugin that satisfies the contract: import, check, validate options, instantiate."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from pydantic import BaseModel, ValidationError

from budwood.contract.discovery import (
    STRATEGIES,
    WORDS,
    Installed,
    PluginError,
    absence,
    find,
    installed,
    plugin_fault,
    unknown_groups,
)
from budwood.contract.hookspecs import HookSpecs
from budwood.contract.strategy import API_VERSION, SUPPORTED, Options, Plugin, Strategy
from budwood.contract.validation import dotted, find_problems, sentence
from budwood.errors import BudwoodError, InputError, describe, did_you_mean
from budwood.untrusted.redaction import shorten

HOOKS = tuple(name for name, value in vars(HookSpecs).items() if hasattr(value, "call_style"))
EXCLUSIVE = tuple(name for name in HOOKS if getattr(HookSpecs, name).call_style == "exclusive")
CORE = tuple(name for name in HOOKS if getattr(HookSpecs, name).call_style == "core")
WRAPPABLE = tuple(name for name in HOOKS if getattr(HookSpecs, name).wrappable)
PAIRS = (("state_dict", "load_state_dict"), ("step_values", "step_terms"))
"""Hooks that must be implemented together."""
_BASES = {
    STRATEGIES: "budwood.Strategy",
    "budwood.tasks": "budwood.Task",
    "budwood.formats": "budwood.DataFormat",
    "budwood.quantizers": "budwood.Quantizer",
    "budwood.attacks": "budwood.Attack",
    "budwood.rewards": "budwood.Reward",
}
_RENAMED = {"kind": "adapter_type"}
"""Hook arguments that version 2 of the contract renamed."""


@dataclass(frozen=True)
class PluginStatus:
    """An installed entry point and its problem, if any.

    Attributes:
        kind: strategy, task, data format, quantiser, attack or demo; or its group, if that is not known.
        entry: its name, object, distribution and version.
        problem: one line with its name and the remedy; empty if it works.
    """

    kind: str
    entry: Installed
    problem: str


def check_installed() -> list[PluginStatus]:
    """Import every installed plugin of every group, and return the status of each."""
    return [check_plugin(group, entry) for group, entry in every_installed()]


def every_installed() -> list[tuple[str, Installed]]:
    """Return group and entry point of every installed plugin; those of unknown groups come last."""
    return [(g, entry) for g in (*WORDS, *unknown_groups()) for entries in installed(g).values() for entry in entries]


def check_plugin(group: str, entry: Installed) -> PluginStatus:
    """Import one plugin and return its status."""
    if group in WORDS:
        return PluginStatus(WORDS[group], entry, _problem(entry, group))
    near = did_you_mean(group, WORDS)
    problem = f"plugin '{entry.name}' of {entry.owner}: there is no entry point group '{group}'.{near}"
    return PluginStatus(group, entry, problem)


def _problem(entry: Installed, group: str) -> str:
    try:
        if group == STRATEGIES:
            load_strategy(entry.name)
        elif group in _BASES:
            load(entry.name, group)
        else:
            find(entry.name, group).load()
    except BudwoodError as error:
        return str(error)
    return ""


def load(name: str, group: str) -> tuple[type[Any], Installed]:
    """Import a plugin's class and check the requirements common to all plugins.

    Raises:
        InputError: it is not installed, or two distributions provide it.
        PluginError: it fails to import, is not a subclass of its group's base class, declares an unsupported version of
            the contract or none, lacks a required attribute or method, or its Options are not valid.
    """
    entry = find(name, group)
    cls = entry.load()
    who = f"{WORDS[group]} '{name}' of {entry.owner}"
    if not (isinstance(cls, type) and issubclass(cls, Plugin) and cls.group == group):
        raise PluginError(f"{who}: {entry.value} is not a subclass of {_BASES[group]}. Point the entry point at one.")
    if not isinstance(cls.api, int) or isinstance(cls.api, bool):
        raise PluginError(f"{who}: 'api' must be a version of the contract, such as {API_VERSION}, not {cls.api!r}.")
    supported = SUPPORTED.get(group, (API_VERSION,))
    if 1 not in supported and not any("api" in vars(base) for base in cls.__mro__ if base is not Plugin):
        raise PluginError(
            f"{who}: {entry.value} does not declare a version of the contract: set `api = {API_VERSION}` in the class, "
            f"or ask its author for an update (pip install -U {entry.distribution})."
        )
    if cls.api not in supported:
        behind = entry.distribution if cls.api < API_VERSION else "budwood"
        raise PluginError(
            f"{who} was written for version {cls.api} of the contract, but this Budwood has {API_VERSION}: "
            f"pip install -U {behind}."
        )
    for name in cls.must_declare:
        if not hasattr(cls, name):
            raise PluginError(f"{who}: {entry.value} does not declare '{name}', which is required.")
    for name in cls.must_implement:
        defined = next(vars(base) for base in cls.__mro__ if name in vars(base))
        if "must_implement" in defined:
            raise PluginError(f"{who}: {entry.value} does not implement '{name}', which is required.")
    if hasattr(cls, "Options"):
        _check_options(cls.Options, who, entry.owner)
    return cls, entry


def _check_options(options: Any, who: str, owner: str) -> None:
    if not (isinstance(options, type) and issubclass(options, Options)):
        raise PluginError(f"{who}: its Options must be a subclass of budwood.Options, which refuses unknown keys.")
    try:
        _make_schema(options)
    except Exception as error:  # pydantic raises several types, and a plugin's own types can raise any
        raise plugin_fault(owner, f"{who}: its Options have no schema: {describe(error)}", True) from error


@functools.lru_cache(maxsize=256)  # a command loads a strategy several times
def _make_schema(options: type[Options]) -> None:
    options.model_json_schema()


def load_strategy(name: str) -> tuple[type[Strategy], Installed]:
    """Import the strategy `name` and check it against the contract.

    Raises:
        InputError: it is not installed, or two distributions provide it.
        PluginError: see `load`; or a hook is misspelt, unmarked or wrongly declared, or lacks its counterpart.
    """
    cls, entry = load(name, STRATEGIES)
    who = f"strategy '{name}' of {entry.owner}"
    for declared in ("slots", "provides", "requires", "conflicts", "before", "after", "adapter_types"):
        names = getattr(cls, declared)
        if not isinstance(names, tuple | list | frozenset) or not all(isinstance(item, str) for item in names):
            raise PluginError(f"{who}: '{declared}' must be a tuple of names, not {names!r}.")
    check_hooks(cls, who)
    for pair in PAIRS:
        implemented = [hook for hook in pair if hasattr(cls, hook)]
        if len(implemented) == 1:
            (missing,) = set(pair) - set(implemented)
            raise PluginError(
                f"{who}: hook '{implemented[0]}' has no effect without '{missing}': implement both or neither."
            )
    parameters = inspect.signature(cls.use_adapters).parameters if hasattr(cls, "use_adapters") else ()
    if cls.api > 1 and "names" in parameters and "index" not in parameters:
        raise PluginError(f"{who}: hook 'use_adapters' must take 'index', which maps each row to its adapter.")
    return cls, entry


def adapter_owner(peft_type: str) -> Installed:
    """Find the installed strategy that owns one of PEFT's adapter types.

    The types are usually declared literally in a strategy's source. Strategies are imported only if no source declares
    the type.

    Raises:
        InputError: no strategy owns the type, or several do.
    """
    entries = [entry for same_name in installed().values() for entry in same_name]
    types = {entry: entry.declared("adapter_types") for entry in entries}
    owners = [entry for entry in entries if peft_type in types[entry]]
    owners = owners or [entry for entry in entries if peft_type in _imported_types(entry)]
    if not owners:
        if why := absence(peft_type):
            raise InputError(f"PEFT's adapter type '{peft_type}' is not offered: it {why}.")
        known = sorted({name for names in types.values() for name in names})
        raise InputError(
            f"no installed strategy reads PEFT's adapter type '{shorten(peft_type)}'.{did_you_mean(peft_type, known)} "
            "Install one that does; see `budwood plugins`."
        )
    if len(owners) > 1:
        names = " and ".join(f"strategy '{entry.name}' of {entry.owner}" for entry in owners)
        raise InputError(
            f"PEFT's adapter type '{peft_type}' is owned by {names}: uninstall one of them "
            f"(pip uninstall {owners[-1].distribution})."
        )
    return owners[0]


def _imported_types(entry: Installed) -> Sequence[str]:
    """Import a strategy and return its adapter types; version 1 declares none, so its name in capitals."""
    try:
        cls, _ = load_strategy(entry.name)
    except BudwoodError:  # broken, or provided by two distributions: owns nothing
        return ()
    return tuple(cls.adapter_types) or ((entry.name.upper(),) if cls.api == 1 else ())


def check_hooks(cls: type, who: str) -> None:
    """Check every hook of a class against the contract; `who` prefixes messages.

    Raises:
        PluginError: a hook is misspelt, unmarked, not a plain method, takes an unknown argument, or wraps a hook that
            cannot be wrapped.
    """
    members = {name: member for base in reversed(cls.__mro__) for name, member in vars(base).items()}
    for name, member in sorted(members.items()):
        function = getattr(member, "__func__", member)  # unwraps a staticmethod or a classmethod
        marks = getattr(member, "budwood_impl", None) or getattr(function, "budwood_impl", None)
        if isinstance(marks, dict):
            problem = _hook_problem(name, member, marks, issubclass(cls, Strategy))
        elif name not in HOOKS:
            continue
        elif callable(function):
            problem = f"method '{name}' is named like a hook; mark it with @hookimpl, or rename it."
        else:
            kind = type(member).__name__
            problem = f"'{name}' is named like a hook but is of type {kind}, not a method with @hookimpl; rename it."
        if problem:
            raise PluginError(f"{who}: {problem}")


def _hook_problem(name: str, member: Any, marks: dict[str, Any], of_strategy: bool) -> str:
    """Return what is wrong with a method marked as a hook; empty if nothing is."""
    if name not in HOOKS:
        return f"there is no hook '{name}'.{did_you_mean(name, HOOKS)}"
    hook = f"hook '{name}'"
    if not isinstance(member, FunctionType):
        return f"{hook} must be a plain method with self, not a {type(member).__name__}."
    plain = inspect.unwrap(member)
    if inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain):
        return f"{hook} must not be async."
    if marks["hookwrapper"]:
        return f"{hook}: hookwrapper is pluggy's old style; use @hookimpl(wrapper=True)."
    if marks["wrapper"] and name not in WRAPPABLE:
        return f"{hook} cannot be wrapped; only {', '.join(WRAPPABLE)} can."
    if marks["wrapper"] and not inspect.isgeneratorfunction(member):
        return f"{hook} is a wrapper, so it must yield once, where the wrapped call should run."
    if not marks["wrapper"] and name in CORE and of_strategy:
        return f"{hook} is implemented by core; a strategy can only wrap it, with @hookimpl(wrapper=True)."
    if not marks["wrapper"] and inspect.isgeneratorfunction(plain):
        return f"{hook} has a yield, which only @hookimpl(wrapper=True) allows; return the result instead."
    if marks["tryfirst"] or marks["trylast"]:
        return f"{hook}: declare the order with the class's `before` and `after`."
    if marks["specname"]:
        return f"{hook}: name the method '{marks['specname']}' instead of using specname."
    return _argument_problem(hook, getattr(HookSpecs, name), list(inspect.signature(member).parameters.values()))


def _argument_problem(hook: str, spec: Any, given: list[inspect.Parameter]) -> str:
    allowed = list(inspect.signature(spec).parameters)[1:]
    if not given or given[0].name in allowed:
        return f"{hook} must take self first, then any of {', '.join(allowed)}."
    for argument in given[1:]:
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            return f"{hook} cannot take {argument}; name the arguments that it uses: any of {', '.join(allowed)}."
        if argument.name in _RENAMED and _RENAMED[argument.name] in allowed:
            return f"{hook}: argument '{argument.name}' was renamed in version 2; use '{_RENAMED[argument.name]}'."
        if argument.name not in allowed:
            near = did_you_mean(argument.name, allowed)
            return f"{hook} has no argument '{argument.name}'.{near} It may take {', '.join(allowed)}."
        if argument.default is not argument.empty:
            return f"{hook}: argument '{argument.name}' must have no default."
        if argument.kind is argument.KEYWORD_ONLY:
            return f"{hook}: argument '{argument.name}' must not be keyword-only; leave out the *."
    return ""


def create(name: str, group: str) -> Any:
    """Import, check and instantiate a task, a data format or a quantiser.

    Raises:
        InputError: see `load`.
        PluginError: see `load`; or it fails to start.
    """
    return start(*load(name, group))


def start(cls: type[Any], entry: Installed, **arguments: Any) -> Any:
    """Instantiate a loaded plugin class and set its name and distribution.

    Raises:
        PluginError: its `__init__` fails, or does not call that of the base class.
    """
    who = f"{WORDS[cls.group]} '{entry.name}' of {entry.owner}"
    try:
        if issubclass(cls, Strategy):
            plugin: Any = cls(**arguments, name=entry.name, distribution=entry.owner)
            if not isinstance(getattr(plugin, "options", None), BaseModel) or plugin.name != entry.name:
                raise TypeError("its __init__ does not call super().__init__(options, name, distribution)")
        else:
            plugin = cls(**arguments)
            plugin.distribution = entry.owner
            plugin.name = getattr(plugin, "name", entry.name)
    except BudwoodError:
        raise
    except (Exception, SystemExit) as error:
        raise plugin_fault(entry.owner, f"{who} cannot start: {describe(error)}", True) from error
    return plugin


def build_strategy(name: str, options: dict[str, Any], where: str | Callable[..., str]) -> Strategy:
    """Import and instantiate a strategy with validated options.

    Args:
        name: the name under which it is installed.
        options: as written in the recipe.
        where: prefix of messages ("recipe.yaml:7"), or a function that returns it for an option (`where("rank")`).

    Raises:
        InputError: options are unknown or out of range; the message names all of them.
        PluginError: see `load_strategy`, or it fails to start.
    """
    cls, entry = load_strategy(name)

    def message(place: tuple[str | int, ...], text: str) -> str:
        prefix = where if isinstance(where, str) else where(*place)
        return f"{prefix}: {dotted((name, *place))}: {sentence(text)}"

    strategy: Strategy = start(cls, entry, options=validate_options(cls, entry, options, message))
    return strategy


def build_task(name: str, options: dict[str, Any], where: str = "") -> Any:
    """Import and instantiate a task with validated options; see `build_plugin`."""
    return build_plugin(name, "budwood.tasks", options, where) if options else create(name, "budwood.tasks")


def build_plugin(name: str, group: str, options: dict[str, Any], where: str = "") -> Any:
    """Import and instantiate a plugin with validated options, such as a reward that a strategy's options name.

    Args:
        where: prefix of messages, such as "recipe.yaml:7: ".

    Raises:
        InputError: see `load`; or options are unknown or out of range: the message names all of them.
        PluginError: see `load`; or it fails to start.
    """
    cls, entry = load(name, group)

    def message(place: tuple[str | int, ...], text: str) -> str:
        return f"{where}{dotted((name, *place))}: {sentence(text)}"

    return start(cls, entry, options=validate_options(cls, entry, options, message))


def validate_options(
    cls: type[Any], entry: Installed, options: dict[str, Any], message: Callable[[tuple[str | int, ...], str], str]
) -> Any:
    """Return an instance of the class's Options; `message(place, text)` formats a problem.

    Raises:
        InputError: options are unknown or out of range; the message names all of them.
        PluginError: a validator of the Options fails, or they cannot be written to the run's manifest.
    """
    try:
        validated = cls.Options.model_validate(options)
        validated.model_dump(mode="json")
    except ValidationError as error:
        problems = [message(*problem) for problem in find_problems(error, cls.Options)]
        raise InputError(" ".join(problems), problems) from None
    except BudwoodError:
        raise
    except (Exception, SystemExit) as error:
        who = f"{WORDS[cls.group]} '{entry.name}' of {entry.owner}"
        raise plugin_fault(entry.owner, f"{who}: its Options fail: {describe(error)}", True) from error
    return validated

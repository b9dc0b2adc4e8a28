"""Guards hook calls: attributes errors to their plugin, measures costs, and checks results."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NoReturn

from budwood.contract.discovery import PluginError
from budwood.contract.loading import HOOKS
from budwood.contract.results import find_problem
from budwood.contract.strategy import Plugin, Strategy
from budwood.errors import BudwoodError, describe, is_out_of_memory, system_error

_BEFORE_STEPS = HOOKS[: HOOKS.index("next_examples")]
_IN_STEP = HOOKS[HOOKS.index("next_examples") : HOOKS.index("after_optimizer_step") + 1]
_NUMBERS = (
    "kind", "step", "epoch", "loss", "gradient_norm", "learning_rate", "skipped", "tokens", "tokens_per_second",
    "best_step",
)  # fmt: skip
"""Names of the numbers that core logs itself."""


@dataclass
class Cost:
    """The cost so far of one owner's hook.

    Attributes:
        owner: name of a strategy, "task NAME", or "core".
        hook: the hook, or one of core's own parts.
        calls: number of calls.
        seconds: wall-clock time including everything that ran inside: other hooks, replays, what a wrapper surrounds.
            A call inside another call of the same row counts once.
        own_seconds: excluding other rows' calls inside it; over all rows, these add up to the time spent in rows.
        peak_growth: bytes by which the process's peak memory grew, also excluding the calls inside.
    """

    owner: str
    hook: str
    calls: int = 0
    seconds: float = 0.0
    own_seconds: float = 0.0
    peak_growth: int = 0
    depth: int = 0
    """Calls in progress."""

    def record(self, memory: bool) -> dict[str, Any]:
        """Return the row for manifest.json; memory is null if it was not measured."""
        return {
            "owner": self.owner,
            "hook": self.hook,
            "calls": self.calls,
            "seconds": round(self.seconds, 6),
            "own_seconds": round(self.own_seconds, 6),
            "peak_growth_bytes": self.peak_growth if memory else None,
        }


class _Frame:
    """A timed stretch of one row: a call, or a wrapper's part before or after its yield."""

    __slots__ = ("cost", "grown", "inside", "outer", "peak", "started")

    def __init__(self, cost: Cost, outer: _Frame | None) -> None:
        self.cost, self.outer, self.inside, self.grown, self.started, self.peak = cost, outer, 0.0, 0, 0.0, 0


class Calls:
    """The guarded hook calls of one composition, and their costs.

    Attributes:
        costs: by (owner, hook), in order of the first call.
        run: the run that the calls belong to, once a call has passed it.
        peak: returns the process's peak memory in bytes, if that is measured.
        wait: blocks until the device has finished all queued work, so that times are those of the work.
    """

    def __init__(self) -> None:
        self.costs: dict[tuple[str, str], Cost] = {}
        self.run: Any = None
        self.peak: Callable[[], int] | None = None
        self.wait: Callable[[], None] | None = None
        self._strategies: dict[str, Strategy | None] = {}
        self._numbers: dict[str, tuple[Plugin, str]] = {}
        """Whose a logged number is, and the hook that gave it first, by its name."""
        self._asked: dict[tuple[int, str], tuple[Callable[..., Any], list[str]]] = {}
        self._frame: _Frame | None = None

    def add(self, strategy: Strategy) -> None:
        """Register a strategy: attribute errors in its package to it, if it is the only one there."""
        package = type(strategy).__module__.partition(".")[0]
        alone = self._strategies.get(package, strategy) is strategy
        self._strategies[package] = strategy if alone else None
        strategy._calls = self

    def guard(self, plugin: Any, hook: str, function: Callable[..., Any], wrapper: bool = False) -> Callable[..., Any]:
        """Wrap `function`, the plugin's implementation of `hook`: attribute errors, measure cost, check the result."""
        if isinstance(plugin, Strategy):
            self.add(plugin)
        cost = self._cost(plugin, hook)

        def call(*arguments: Any, **named: Any) -> Any:
            started = self._begin(cost)
            frame = self._enter(cost)
            try:
                result = function(*arguments, **named)
            except (Exception, SystemExit) as error:
                self._raise(error, plugin, hook)
            finally:
                self._leave(frame)
                self._end(cost, started)
            self._check(plugin, hook, result, False)
            return result

        def surround(*arguments: Any) -> Generator[None, Any, Any]:
            started, failed, received = self._begin(cost), None, None
            inner = function(*arguments)
            try:
                frame = self._enter(cost)
                try:
                    next(inner)
                except StopIteration:
                    self._refuse(plugin, hook, "never reaches its yield, so the call that it wraps would not run.")
                except (Exception, SystemExit) as error:
                    self._raise(error, plugin, hook)
                finally:
                    self._leave(frame)
                try:
                    received = yield
                except GeneratorExit:
                    inner.close()
                    raise
                except BaseException as error:
                    failed = error
                frame = self._enter(cost)
                try:
                    if failed is None:
                        inner.send(received)
                    else:
                        inner.throw(failed)
                except StopIteration as done:
                    result = done.value
                except (Exception, SystemExit) as error:
                    if error is failed:  # raised by the call that it wraps
                        raise
                    self._raise(error, plugin, hook)
                else:
                    inner.close()
                    self._refuse(plugin, hook, "yields a second time; the call that it wraps runs once.")
                finally:
                    self._leave(frame)
            finally:
                failed = None  # breaks a reference cycle with this frame, which keeps every tensor below it alive
                self._end(cost, started)
            self._check(plugin, hook, result, True)
            return result

        return surround if wrapper else call

    def asked(self, owner: Strategy, hook: str, method: Callable[..., Any]) -> tuple[Callable[..., Any], list[str]]:
        """Return the guarded method of an owner and its argument names, cached."""
        key = (id(owner), hook)  # unique, because the cached method keeps the owner alive
        if key not in self._asked:
            self._asked[key] = (self.guard(owner, hook, method), list(inspect.signature(method).parameters))
        return self._asked[key]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure a part of core that is not a hook."""
        cost = self.costs.setdefault(("core", name), Cost("core", name))
        started, frame = self._begin(cost), self._enter(cost)
        try:
            yield
        finally:
            self._leave(frame)
            self._end(cost, started)

    def culprit(self, error: BaseException) -> Plugin | None:
        """Return the plugin whose code raised an error, whoever called that code, or None."""
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        for frame, inner in zip(reversed(frames), [None, *reversed(frames[1:])], strict=True):
            if inner is not None and inner.f_code.co_name == "surround" and inner.f_code.co_filename == __file__:
                continue  # a wrapper that waits at its yield
            if (plugin := self._in_frame(frame)) is not None:
                return plugin
        return None

    def claim(self, name: str, plugin: Any = None, hook: str = "") -> None:
        """Note that a number is a plugin's: by default, of the one whose code is running.

        Raises:
            PluginError: a number of core or of another plugin has that name; both are named.
        """
        if plugin is None:
            plugin, hook = self._running()
        if plugin is None and name not in _NUMBERS:
            return
        where = self._where(plugin, plugin, hook)
        if name in _NUMBERS:
            raise PluginError(f"{where}: '{name}' is a number of core's own: choose another name.")
        owner, origin = self._numbers.setdefault(name, (plugin, hook))
        if owner is not plugin:
            raise PluginError(f"{where}: '{name}' is also a number of {owner}, hook {origin}: rename one of them.")

    def _running(self) -> tuple[Plugin | None, str]:
        """The plugin whose code is running, and the hook of its that core called."""
        python: Any = sys._getframe(1)
        while python is not None and (plugin := self._in_frame(python)) is None:
            python = python.f_back
        if python is None:
            return None, ""
        frame = self._frame
        while frame is not None and frame.cost.owner != _owner_name(plugin):
            frame = frame.outer
        return plugin, frame.cost.hook if frame is not None else ""

    def _in_frame(self, frame: Any) -> Plugin | None:
        """The plugin whose code a Python frame runs."""
        this = frame.f_locals.get("self")
        if isinstance(this, Plugin):
            return this
        return self._strategies.get(str(frame.f_globals.get("__name__")).partition(".")[0])

    def _cost(self, plugin: Any, hook: str) -> Cost:
        name = _owner_name(plugin)
        return self.costs.setdefault((name, hook), Cost(name, hook))

    def _begin(self, cost: Cost) -> float:
        cost.calls += 1
        cost.depth += 1
        return perf_counter()

    def _end(self, cost: Cost, started: float) -> None:
        cost.depth -= 1
        if cost.depth == 0:
            cost.seconds += perf_counter() - started

    def _enter(self, cost: Cost) -> _Frame:
        frame = self._frame = _Frame(cost, self._frame)
        if self.wait is not None:
            self.wait()
        if self.peak is not None:
            frame.peak = self.peak()
        frame.started = perf_counter()
        return frame

    def _leave(self, frame: _Frame) -> None:
        if self.wait is not None:
            self.wait()
        cost, outer = frame.cost, frame.outer
        elapsed = perf_counter() - frame.started
        cost.own_seconds += elapsed - frame.inside
        self._frame = outer
        if outer is not None:
            outer.inside += elapsed
        if self.peak is not None:
            grown = self.peak() - frame.peak
            cost.peak_growth += grown - frame.grown
            if outer is not None:
                outer.grown += grown

    def _raise(self, error: BaseException, plugin: Any, hook: str) -> NoReturn:
        """Re-raise an error from a hook as a PluginError that names the strategy.

        Budwood's own errors are raised unchanged. Resource errors keep their type; a strategy's get a note.
        """
        __tracebackhide__ = True
        if isinstance(error, BudwoodError):
            raise error
        owner = self.culprit(error) or plugin
        if not isinstance(owner, Plugin):
            raise error
        where = self._where(owner, plugin, hook)
        if type(error).__name__ == "GoneError":  # of contract.examples, which imports torch
            raise PluginError(f"{where}: {error}.") from error
        if system_error(error) or is_out_of_memory(error):
            if isinstance(owner, Strategy) and not noted(error):
                error.add_note(f"in {where}")
            raise error
        raise PluginError(
            f"{where}: {describe(error)}. Report it to its author; --debug shows the traceback."
        ) from error

    def _check(self, plugin: Any, hook: str, result: Any, wrapper: bool) -> None:
        problem = find_problem(hook, result, wrapper)
        if problem:
            self._refuse(plugin, hook, problem)

    def _refuse(self, plugin: Any, hook: str, problem: str) -> NoReturn:
        raise PluginError(f"{self._where(plugin, plugin, hook)}: {problem}")

    def _where(self, owner: Any, plugin: Any, hook: str) -> str:
        """Return "strategy 'x' (dist 1.0), hook before_clip, step 8", with the outer hook if it ran inside another."""
        who = f"{plugin}" if isinstance(plugin, Plugin) else "core"
        text = f"{owner}, hook {hook}" if owner is plugin or owner is None else f"{owner}, in hook {hook} of {who}"
        step = getattr(self.run, "step", None)
        if step is None or hook in _BEFORE_STEPS:
            return text
        return f"{text}, step {step + 1}" if hook in _IN_STEP else f"{text}, after step {step}"


def _owner_name(plugin: Any) -> str:
    """The name of a row of costs."""
    if not isinstance(plugin, Plugin):
        return "core"
    name = str(getattr(plugin, "name", ""))
    return name if isinstance(plugin, Strategy) else f"task {name}"


def noted(error: BaseException) -> str:
    """Return " in strategy 'x' (dist 1.0), hook …" for an error that kept its type; empty if no strategy raised it."""
    return next((f" {note}" for note in getattr(error, "__notes__", ()) if note.startswith("in strategy ")), "")


@contextmanager
def attribute_errors(plugin: Plugin, doing: str) -> Iterator[None]:
    """Attribute errors raised outside of hooks to a plugin; `doing` is the method."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, BudwoodError) or system_error(error) or is_out_of_memory(error):
            raise
        raise PluginError(
            f"{plugin}, {doing}: {describe(error)}. Report it to its author; --debug shows the traceback."
        ) from error


def ask_owner(owner: Strategy, hook: str, **arguments: Any) -> Any:
    """Call one strategy's hook with those of the arguments that it takes; return its result.

    Raises:
        PluginError: names the strategy: it has no such hook, or raised an error that is not Budwood's own.
    """
    method = getattr(owner, hook, None)
    if method is None:
        raise PluginError(f"{owner} has no hook '{hook}', which an adapter's owner must have. Report it to its author.")
    guarded, taken = (owner._calls or Calls()).asked(owner, hook, method)
    return guarded(**{name: value for name, value in arguments.items() if name in taken})

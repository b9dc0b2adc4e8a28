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

from budwood.contract.discovery import OWN, WORDS, PluginError, plugin_fault
from budwood.contract.loading import HOOKS
from budwood.contract.results import find_problem
from budwood.contract.strategy import Plugin, Strategy
from budwood.errors import BudwoodError, describe, is_out_of_memory, system_error

_BEFORE_STEPS = HOOKS[: HOOKS.index("next_examples")]
_IN_STEP = HOOKS[HOOKS.index("next_examples") : HOOKS.index("after_optimizer_step") + 1]
_CORE_METRICS = (
    "kind", "step", "epoch", "loss", "gradient_norm", "learning_rate", "skipped", "tokens", "tokens_per_second",
    "best_step",
)  # fmt: skip
"""Metrics that core logs itself."""


@dataclass
class Cost:
    """The cost so far of one owner's hook.

    Attributes:
        owner: name of a strategy, "task NAME", or "core".
        hook: the hook, or one of core's own parts.
        calls: number of calls.
        seconds: wall-clock time including everything that ran inside: other hooks, replays, wrapped calls. A call
            nested in another call of the same row is not counted again.
        own_seconds: excluding nested calls of other rows; the sum over all rows is the total time spent in rows.
        peak_growth: growth of the process's peak memory in bytes, also excluding nested calls.
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
    """A timed interval of one row: a call, or a wrapper's part before or after its yield."""

    __slots__ = ("cost", "inner_growth", "inner_seconds", "outer", "peak", "started")

    def __init__(self, cost: Cost, outer: _Frame | None) -> None:
        self.cost, self.outer, self.started, self.peak = cost, outer, 0.0, 0
        self.inner_seconds, self.inner_growth = 0.0, 0


class Calls:
    """The guarded hook calls of one composition, and their costs.

    Attributes:
        costs: by (owner, hook), in the order of first calls.
        run: the current run, known once a call has passed it.
        peak: returns the process's peak memory in bytes; None if it is not measured.
        wait: blocks until the device has finished all queued work, so that times include it.
    """

    def __init__(self) -> None:
        self.costs: dict[tuple[str, str], Cost] = {}
        self.run: Any = None
        self.peak: Callable[[], int] | None = None
        self.wait: Callable[[], None] | None = None
        self._strategies: dict[str, Strategy | None] = {}
        self._metric_owners: dict[str, tuple[Plugin, str]] = {}
        """Owner of each logged metric, and the hook that logged it first, by name."""
        self._methods: dict[tuple[int, str], tuple[Callable[..., Any], list[str]]] = {}
        self._frame: _Frame | None = None

    def add(self, strategy: Strategy) -> None:
        """Register a strategy: errors in its package are attributed to it, if no other strategy is in that package."""
        package = type(strategy).__module__.partition(".")[0]
        only = self._strategies.get(package, strategy) is strategy
        self._strategies[package] = strategy if only else None
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
                    self._refuse(plugin, hook, "never reaches its yield, so the wrapped call would not run.")
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
                    if error is failed:  # raised by the wrapped call
                        raise
                    self._raise(error, plugin, hook)
                else:
                    inner.close()
                    self._refuse(plugin, hook, "yields a second time; the wrapped call runs only once.")
                finally:
                    self._leave(frame)
            finally:
                failed = None  # breaks a reference cycle with this frame, which would keep every tensor below it alive
                self._end(cost, started)
            self._check(plugin, hook, result, True)
            return result

        return surround if wrapper else call

    def guarded(self, owner: Strategy, hook: str, method: Callable[..., Any]) -> tuple[Callable[..., Any], list[str]]:
        """Return an owner's guarded method and its argument names, cached."""
        key = (id(owner), hook)  # unique, because the cached method keeps the owner alive
        if key not in self._methods:
            self._methods[key] = (self.guard(owner, hook, method), list(inspect.signature(method).parameters))
        return self._methods[key]

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
        """Return the plugin whose code raised an error, regardless of its caller, or None."""
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        for frame, inner in zip(reversed(frames), [None, *reversed(frames[1:])], strict=True):
            if inner is not None and inner.f_code.co_name == "surround" and inner.f_code.co_filename == __file__:
                continue  # a wrapper suspended at its yield
            if (plugin := self._in_frame(frame)) is not None:
                return plugin
        return None

    def raised_in_core(self, error: BaseException, skip: int = 0) -> bool:
        """Return whether core's code raised an error, called by a plugin; a library's code counts as its caller's.

        Args:
            skip: number of outermost frames that do not count.
        """
        for frame, _ in reversed([*traceback.walk_tb(error.__traceback__)][skip:]):
            if self._in_frame(frame) is not None:
                return False
            module = str(frame.f_globals.get("__name__"))
            if module.startswith(f"{OWN}.") and not module.startswith(f"{OWN}.contract."):
                return True
        return False

    def claim(self, name: str, plugin: Any = None, hook: str = "") -> None:
        """Reserve a metric name for a plugin, by default the one whose code is running.

        Raises:
            PluginError: core or another plugin already logs under that name; the message names both.
        """
        if plugin is None:
            plugin, hook = self._running()
        if plugin is None and name not in _CORE_METRICS:
            return
        where = self._where(plugin, plugin, hook)
        if name in _CORE_METRICS:
            raise PluginError(f"{where}: '{name}' is one of core's own metrics: choose another name.")
        owner, origin = self._metric_owners.setdefault(name, (plugin, hook))
        if owner is not plugin:
            raise PluginError(f"{where}: '{name}' is also logged by {owner}, hook {origin}: rename one of them.")

    def _running(self) -> tuple[Plugin | None, str]:
        """Return the plugin whose code is running, and the hook through which core called it."""
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
        """Return the plugin whose code a Python frame runs, or None."""
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
        cost.own_seconds += elapsed - frame.inner_seconds
        self._frame = outer
        if outer is not None:
            outer.inner_seconds += elapsed
        if self.peak is not None:
            growth = self.peak() - frame.peak
            cost.peak_growth += growth - frame.inner_growth
            if outer is not None:
                outer.inner_growth += growth

    def _raise(self, error: BaseException, plugin: Any, hook: str) -> NoReturn:
        """Re-raise an error from a hook as a PluginError that names the strategy.

        Budwood's own errors are raised unchanged. Resource errors keep their type; those of a strategy get a note.
        """
        __tracebackhide__ = True
        if isinstance(error, BudwoodError):
            raise error
        owner = self.culprit(error) or plugin
        if not isinstance(owner, Plugin):
            raise error
        where = self._where(owner, plugin, hook)
        if type(error).__name__ == "RemovedError":  # from contract.examples, which imports torch
            raise PluginError(f"{where}: {error}.") from error
        if system_error(error) or is_out_of_memory(error):
            if isinstance(owner, Strategy) and not noted(error):
                error.add_note(f"in {where}")
            raise error
        raise _unexpected(owner, where, error, self.raised_in_core(error)) from error

    def _check(self, plugin: Any, hook: str, result: Any, wrapper: bool) -> None:
        problem = find_problem(hook, result, wrapper)
        if problem:
            self._refuse(plugin, hook, problem)

    def _refuse(self, plugin: Any, hook: str, problem: str) -> NoReturn:
        raise plugin_fault(_distribution(plugin), f"{self._where(plugin, plugin, hook)}: {problem}")

    def _where(self, owner: Any, plugin: Any, hook: str) -> str:
        """Return "strategy 'x' (dist 1.0), hook before_clip, step 8", with the outer hook if it ran inside another."""
        who = f"{plugin}" if isinstance(plugin, Plugin) else "core"
        text = f"{owner}, hook {hook}" if owner is plugin or owner is None else f"{owner}, in hook {hook} of {who}"
        step = getattr(self.run, "step", None)
        if step is None or hook in _BEFORE_STEPS:
            return text
        return f"{text}, step {step + 1}" if hook in _IN_STEP else f"{text}, after step {step}"


def _owner_name(plugin: Any) -> str:
    """Return the owner shown in a row of costs."""
    if not isinstance(plugin, Plugin):
        return "core"
    name = str(getattr(plugin, "name", ""))
    return name if isinstance(plugin, Strategy) else f"task {name}"


def noted(error: BaseException) -> str:
    """Return " in strategy 'x' (dist 1.0), hook …" for an error that kept its type; empty if no strategy raised it."""
    return next((f" {note}" for note in getattr(error, "__notes__", ()) if note.startswith("in strategy ")), "")


@contextmanager
def attribute_errors(plugin: Plugin, method: str) -> Iterator[None]:
    """Attribute errors raised in a plugin's `method`, which is not a hook, to the plugin."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, BudwoodError) or system_error(error) or is_out_of_memory(error):
            raise
        # The first two frames are this function's and that of the block.
        raise _unexpected(plugin, f"{plugin}, {method}", error, Calls().raised_in_core(error, skip=2)) from error


def _distribution(plugin: Any) -> str:
    """Return the distribution and version of a plugin; of what core itself brings, its own."""
    own = type(plugin).__module__.partition(".")[0] == OWN
    return OWN if own else str(getattr(plugin, "distribution", ""))


def _unexpected(owner: Plugin, where: str, error: BaseException, in_core: bool) -> BudwoodError:
    """Return the error for an unexpected exception in a plugin's hook: whose code raised it is to blame for it."""
    text, distribution = f"{where}: {describe(error)}", _distribution(owner)
    if in_core and distribution.partition(" ")[0] != OWN:
        return BudwoodError(
            f"{text}, raised in Budwood's own code. Either the {WORDS[owner.group]} calls it wrongly, or this is a bug "
            "in Budwood; run again with --debug and report what it shows."
        )
    return plugin_fault(distribution, text, True)


def ask_owner(owner: Strategy, hook: str, **arguments: Any) -> Any:
    """Call one strategy's hook with the arguments that it takes, and return the result.

    Raises:
        PluginError: the strategy has no such hook, or raised an error that is not one of Budwood's own.
    """
    method = getattr(owner, hook, None)
    if method is None:
        raise plugin_fault(_distribution(owner), f"{owner} has no hook '{hook}', which an adapter owner needs", True)
    call, accepted = (owner._calls or Calls()).guarded(owner, hook, method)
    return call(**{name: value for name, value in arguments.items() if name in accepted})

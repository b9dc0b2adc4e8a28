"""Processes of a run begin and end together: what one of them refuses or dies of ends all, with one line on the first.

They talk through a key-value store that torchrun's agent (or the first process) serves, beside the group in which
training exchanges tensors: a process that waits in a collective cannot be told anything there. A thread of each process
looks at the store, and ends its process if the main thread cannot.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from budwood.errors import BudwoodError, Interrupted, PeerError, ResourceError
from budwood.parallel.failures import OtherEndedError, lives, of_others, ranks_text, reason, text_of
from budwood.parallel.processes import Processes
from budwood.parallel.store import JOIN, open_store, serves

Say = Callable[[str], None]

POLL = 0.25
"""Seconds between two looks at the store, and at the processes of this machine."""
LOOK = 0.03
"""Seconds between two looks of a process that waits for an answer."""
GRACE, SAVING = 3.0, 25.0
"""Seconds that a main thread has to end by itself, and in which the others answer; the same after a signal, when the
first process saves. torchrun kills what runs 30 s after it."""
PATIENCE = 15.0
"""Seconds until the first process says whom it waits for."""
SILENCE = 120.0
"""Seconds without a sign of life after which a process counts as gone: its machine, or the network, has failed."""

SIGNALS = (130, 143)
"""Exit codes of a process that a signal ended."""
CONTINUE = "the same command with --resume continues the run"
KILLED = f"was killed or crashed (was memory short?); {CONTINUE}"
SILENT = f"gave no sign of life for {SILENCE:.0f} s; {CONTINUE}"

_current: Together | None = None
_opened = 0
"""Number of runs that this process began with others; part of the keys, which are never removed."""


@contextlib.contextmanager
def together(say: Say = lambda text: None, world: Processes | None = None) -> Iterator[Together | None]:
    """Let all processes of a run end if one of them fails inside the context, or is killed. Yields None if it is one.

    A second context inside the first one has no effect of its own.

    Args:
        say: reports whom the first process waits for.
        world: the processes; None: as the environment describes them.

    Raises:
        PeerError: another process failed or was killed; it has the exit code of the failure. A process other than the
            first raises it for failures of its own too, which the first process reports.
        ResourceError: the other processes cannot be reached, or do not appear.
    """
    global _current
    world = world or Processes.from_environment()
    if world.size == 1 or _current is not None:
        yield _current
        return
    bond = Together(world)
    bond.meet(say)
    _current = bond
    try:
        yield bond
    except (Exception, KeyboardInterrupt) as error:
        if getattr(error, "exit_code", 1) == 0:  # only help was asked for
            raise
        outcome = bond.verdict(error)
        if outcome is error:
            raise
        raise outcome from error
    else:
        bond.done()
    finally:
        _current = None
        bond.stop()


class Together:
    """This process's view of the others, through the store; see `together`."""

    def __init__(self, world: Processes) -> None:
        global _opened
        self.world, self.hosts = world, [""] * world.size
        _opened += 1
        self._keys = f"run/{_opened}"
        self._store, self._ended = open_store(self.world.rank, self._keys), threading.Event()
        self._pids: dict[int, int] = {}
        """Process numbers of the other processes of this machine."""
        self._known: dict[str, Any] | None = None
        """The alarm, once it is known."""
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._watching = threading.Thread(target=self._watch, name="together", daemon=True)

    def meet(self, say: Say) -> None:
        """Wait until every process is here, learn their hosts, and begin to watch them."""
        mine = {"host": self.world.host, "pid": os.getpid(), "node": self.world.node, "size": self.world.size}
        self._store.set(f"hello/{self.world.rank}", json.dumps(mine))
        started, told = time.monotonic(), False
        while missing := [rank for rank in range(self.world.size) if not self._store.check([f"hello/{rank}"])]:
            waited = time.monotonic() - started
            if waited > JOIN:
                text = f"{ranks_text(missing)} did not start within {JOIN:.0f} s: all processes end."
                raise PeerError(text, ResourceError.exit_code, reported=not self.world.first and 0 not in missing)
            if waited > PATIENCE and not told and self.world.first:
                say(f"waiting for {ranks_text(missing)} of {self.world.size}: is the run started on every machine?")
                told = True
            time.sleep(LOOK)
        for rank in range(self.world.size):
            other = json.loads(self._store.get(f"hello/{rank}"))
            self.hosts[rank] = other["host"]
            if rank != self.world.rank and (other["node"], other["host"]) == (self.world.node, self.world.host):
                self._pids[rank] = other["pid"]
        self._watching.start()

    def share(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what `make` returns in the first process, a JSON value; the others wait for it.

        The processes need not have joined their group.
        """
        if self.world.first:
            value = make()
            self._store.set(f"share/{name}", json.dumps(value))
            return value
        self._wait(f"share/{name}")
        return json.loads(self._store.get(f"share/{name}"))

    @contextlib.contextmanager
    def one_per_machine_first(self, name: str) -> Iterator[None]:
        """Let the first process of each machine complete the context before its others enter it.

        What it leaves in the machine's caches is then there for them.
        """
        key = f"turn/{name}/{self.world.node}"
        if self.world.local_rank > 0:
            self._wait(key)
        yield
        if self.world.local_rank == 0:
            self._store.set(key, "")

    def wait_for_all(self, name: str) -> None:
        """Wait until all processes are here, and end if one of them cannot come."""
        self._store.set(f"{name}/{self.world.rank}", "")
        for rank in range(self.world.size):
            self._wait(f"{name}/{rank}")

    def _wait(self, key: str) -> None:
        while not self._store.check([key]):
            if self._alarm(self._store):
                raise OtherEndedError
            time.sleep(LOOK)

    def done(self) -> None:
        """Say that this process has finished its run; the one that serves the store stays until all have."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"done/{self.world.rank}", "")
            if serves(self.world.rank):
                self._all(self._store, "done", 10 * GRACE)

    def stop(self) -> None:
        """Stop watching."""
        self._ended.set()
        self._watching.join(GRACE)

    def name(self, rank: int) -> str:
        """Return how messages name a process."""
        return f"rank {rank} on {self.hosts[rank] or 'an unknown machine'}"

    def verdict(self, error: BaseException) -> BaseException:
        """Return what this process raises for an error of its own, after all processes know of it.

        The first process reports every failure; the others are silent if it does.
        """
        handlers = {}
        if threading.current_thread() is threading.main_thread():  # the agent's signal says nothing new
            handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
        self._ended.set()
        try:
            return self._verdict(error)
        except RuntimeError as failure:  # the store is gone, and with it the first process or its machine
            if self._known is not None:  # the first process has printed it, and ended
                return PeerError(self._line(self._known), self._known["code"], reported=True)
            code = getattr(error, "exit_code", ResourceError.exit_code if of_others(error) else 1)
            return PeerError(self._lost(failure), code, not self._speaks())
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _verdict(self, error: BaseException) -> BaseException:
        store, rank, signalled = self._store, self.world.rank, isinstance(error, KeyboardInterrupt | Interrupted)
        store.set(f"here/{rank}", "")
        alarm = self._alarm(store)
        if alarm is None and (signalled or of_others(error)):
            alarm = self._roll_call(store, error)
        if alarm is None:
            alarm = self._raise_alarm(store, rank, getattr(error, "exit_code", 1), text_of(error))
        # The others must know before a connection ends, which they would take for the failure.
        self._all(store, "here", GRACE, alarm["rank"])
        if not self.world.first:
            reported = self._reported(store, SAVING if signalled else 2 * GRACE)
            return PeerError(self._line(alarm), alarm["code"], reported)
        self._say_so(store)
        found_too = isinstance(error, BudwoodError) and not signalled and not of_others(error)  # what all found
        if alarm["rank"] == 0 or found_too or (signalled and alarm["code"] in SIGNALS):
            return error
        return PeerError(self._line(alarm), alarm["code"])

    def _say_so(self, store: Any) -> None:
        """Tell the others that the first process prints the line, and let them read it before the store is gone."""
        store.set("said", "")
        if serves(self.world.rank):
            time.sleep(4 * LOOK)

    def _reported(self, store: Any, seconds: float) -> bool:
        """Return whether another process prints the line: the first one, or else the lowest that is alive."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if store.check(["said"]):
                return True
            time.sleep(LOOK)
        return any(store.check([f"here/{rank}"]) for rank in range(1, self.world.rank))

    def _roll_call(self, store: Any, error: BaseException) -> dict[str, Any] | None:
        """Find out which process is gone; None if all answer and a signal ended this one."""
        store.set("roll", "")
        missing = self._gone(store) or self._all(store, "here", GRACE)
        alarm = self._alarm(store)
        if alarm is None and missing:
            return self._raise_alarm(store, missing[0], ResourceError.exit_code, KILLED)
        if alarm is None and of_others(error):
            text = f"lost the connection to another process ({reason(error)})"
            return self._raise_alarm(store, self.world.rank, ResourceError.exit_code, text)
        return alarm

    def _all(self, store: Any, what: str, seconds: float, but: int = -1) -> list[int]:
        """Wait until every process has said `what`, one excepted; returns those that have not."""
        end = time.monotonic() + seconds
        others = [rank for rank in range(self.world.size) if rank != but]
        while True:
            missing = [r for r in others if not store.check([f"{what}/{r}"]) and not store.check([f"done/{r}"])]
            if not missing or time.monotonic() > end:
                return missing
            time.sleep(LOOK)

    def _gone(self, store: Any) -> list[int]:
        """Return the processes of this machine that ended without a word."""
        dead = [rank for rank, pid in self._pids.items() if not lives(pid)]
        return [rank for rank in dead if not any(store.check([f"{what}/{rank}"]) for what in ("done", "here"))]

    def _lost(self, error: BaseException) -> str:
        return f"the first process ({self.hosts[0]}), or its launcher, has ended ({reason(error)}); {CONTINUE}"

    def _speaks(self) -> bool:
        """Whether this process prints the line if the first one cannot be asked: the lowest other one of a machine."""
        if self.world.first or (0 in self._pids and lives(self._pids[0])):
            return self.world.first
        return self.world.rank == min(rank for rank in (*self._pids, self.world.rank) if rank)

    def _line(self, alarm: dict[str, Any]) -> str:
        return f"{self.name(alarm['rank'])}: {alarm['text']}"

    def _alarm(self, store: Any) -> dict[str, Any] | None:
        if not store.check(["alarm"]):
            return None
        self._known = json.loads(store.get("alarm"))
        return self._known

    def _raise_alarm(self, store: Any, rank: int, code: int, text: str) -> dict[str, Any]:
        """Record what ends the run, unless another process was faster; returns what is recorded."""
        alarm = json.dumps({"rank": rank, "code": code, "text": text})
        recorded: dict[str, Any] = json.loads(store.compare_set("alarm", "", alarm))
        self._known = recorded
        return recorded

    def _watch(self) -> None:
        """Look for an alarm and for processes that are gone, until this process ends."""
        try:
            store = open_store(self.world.rank, self._keys)
            self._look(store)
        except Exception as error:  # the store is gone: so is whoever served it
            if self._ended.wait(GRACE):
                return
            if self._known is not None:
                self._end("", self._known["code"], prints=False)
            self._end(self._lost(error), ResourceError.exit_code, self._speaks())

    def _look(self, store: Any) -> None:
        rank, beats, looked = self.world.rank, 0, 0.0
        seen: dict[int, tuple[int, float]] = {}
        while not self._ended.wait(POLL):
            beats, now = beats + 1, time.monotonic()
            if store.check(["roll"]):
                store.set(f"here/{rank}", "")
            if beats % 8 == 0:
                store.set(f"beat/{rank}", str(beats))
            if self.world.first and now - looked > SILENCE / 8:
                late, looked = now - looked > SILENCE / 2, now  # this process itself did not run
                for silent in self._silent(store, seen, now, late):
                    self._raise_alarm(store, silent, ResourceError.exit_code, SILENT)
            for gone in self._gone(store):
                self._raise_alarm(store, gone, ResourceError.exit_code, KILLED)
            if self._parent is not None and os.getppid() != self._parent:
                self._raise_alarm(store, rank, ResourceError.exit_code, f"its launcher has ended; {CONTINUE}")
            if (alarm := self._alarm(store)) is not None:
                store.set(f"here/{rank}", "")
                if self._ended.wait(SAVING if alarm["code"] in SIGNALS else GRACE):  # the main thread has noticed
                    return
                if self.world.first:
                    self._say_so(store)
                self._end(self._line(alarm), alarm["code"], self.world.first or not self._reported(store, 2 * GRACE))

    def _silent(self, store: Any, seen: dict[int, tuple[int, float]], now: float, late: bool) -> list[int]:
        """Return the processes whose count has not changed for too long."""
        silent = []
        for rank in range(1, self.world.size):
            key = f"beat/{rank}"
            count = int(store.get(key)) if store.check([key]) else 0
            if late or count != seen.get(rank, (-1, 0.0))[0]:
                seen[rank] = (count, now)
            elif now - seen[rank][1] > SILENCE and not store.check([f"done/{rank}"]):
                silent.append(rank)
        return silent

    def _end(self, text: str, code: int, prints: bool) -> None:
        """End this process, whose main thread waits for others that will not come."""
        with contextlib.suppress(OSError, ValueError):
            if prints:
                line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
                print(f"error: {line}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(code)


def share(name: str, make: Callable[[], Any]) -> Any:
    """Return what `make` returns in the first process of the run, a JSON value."""
    return make() if _current is None else _current.share(name, make)


def one_per_machine_first(name: str) -> contextlib.AbstractContextManager[None]:
    """Let the first process of each machine complete a context before its others enter it; see `Together`."""
    return contextlib.nullcontext() if _current is None else _current.one_per_machine_first(name)


def wait_for_all(name: str) -> None:
    """Wait until all processes of the run are here, unlike in a collective even if one of them fails before."""
    if _current is not None:
        _current.wait_for_all(name)

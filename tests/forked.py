"""Commands of this Python in processes forked from one that has imported the libraries, which takes them seconds.

A test that uses the fixture `forked` starts processes with `subprocess` as ever, and so does what it calls: arguments,
streams, environment, working folder, path of imports, signals and exit code are those of a new process. What is not:
the libraries have been imported, with the environment of the first test that forks. A test of what a process imports,
or of how it starts, has to start a new one.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import process, reduction
from multiprocessing.forkserver import _forkserver as server
from pathlib import Path
from typing import Any
from unittest import mock

from budwood.testing.processes import forkserver, without_main

PYTHON = sys.executable
BUDWOOD = Path(PYTHON).with_name("budwood")
"""The installed command."""


_Popen = subprocess.Popen


class Popen(_Popen):
    """A process, forked if its command is `python [-P] (-c CODE | -m MODULE | FILE)` of this Python, or `budwood`."""

    _process: Any = None

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others):  # type: ignore[no-untyped-def]
        words = _words(args)
        if words is None or executable is not None:
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others)  # type: ignore[misc]
        _, _, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = others[:9]
        new_session = others[14]
        assert not shell
        streams = [_Descriptor(at if at >= 0 else number) for number, at in enumerate((p2cread, c2pwrite, errwrite))]
        passed = {number: _Descriptor(number) for number in pass_fds}
        environment = dict(os.environ if env is None else env)
        given = (words, streams, passed, str(cwd or os.getcwd()), environment, _shared(), new_session, preexec_fn)
        self._process = forkserver().Process(target=_become, args=given, daemon=True)
        try:
            with without_main(), mock.patch.object(sys, "path", _shared()[1]):  # this module is of no package
                self._process.start()
        finally:
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]
        self.pid, self._child_created = self._process.pid, True

    def _internal_poll(self, *given: Any, **named: Any) -> int | None:
        if self._process is None:
            return super()._internal_poll(*given, **named)  # type: ignore[misc]
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._process is None:
            return super()._wait(timeout)  # type: ignore[misc]
        self._process.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode


def _words(command: Any) -> list[str] | None:
    """Return the arguments of Python if this can fork the command."""
    if isinstance(command, str | bytes | os.PathLike):
        return None
    first, *words = map(os.fspath, command)
    if first == str(BUDWOOD):
        return [first, *words]
    if first != PYTHON or not words:
        return None
    options = words[1:] if words[0] == "-P" else words
    return words if options and (options[0] in ("-c", "-m") or not options[0].startswith("-")) else None


@contextmanager
def forking() -> Iterator[None]:
    """Fork processes that `subprocess` would start anew."""
    with mock.patch.object(subprocess, "Popen", Popen):
        yield


def once_anew() -> Callable[..., subprocess.Popen]:
    """Return a Popen that starts the first process anew, as a user's, and forks the others."""
    first = iter([_Popen])
    return lambda *args, **named: next(first, Popen)(*args, **named)


class _Descriptor:
    """An open file, which a process gets under another number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _detach, (reduction.DupFd(self.number),)


def _detach(duplicate: Any) -> int:
    return duplicate.detach()


@functools.cache
def _shared() -> tuple[dict[str, Any], list[str], list[str]]:
    """Return what finds the process that forks, where this process imports from, and where a new one would."""
    forkserver()
    server.ensure_running()
    found = {
        name: value for name, value in vars(server).items() if name in ("_forkserver_address", "_forkserver_authkey")
    }
    command = [PYTHON, "-P", "-c", "import json, sys; print(json.dumps(sys.path))"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with _Popen(command, env=environment, stdout=subprocess.PIPE) as started:
        return found, list(sys.path), json.loads(started.communicate()[0])


def _become(
    words: list[str], streams: list[int], passed: dict[int, int], folder: str, environment: dict[str, str],
    shared: tuple[dict[str, Any], list[str], list[str]], new_session: bool, prepare: Callable[[], None] | None,
) -> None:  # fmt: skip
    """Be the process of a command."""
    global _shared
    gc.freeze()
    vars(server).update(shared[0], ensure_running=lambda: None)  # the processes of this one are forked as it was
    _shared, subprocess.Popen = lambda: shared, Popen  # type: ignore[assignment,misc]
    process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    if new_session:
        os.setsid()
    moved = {to: fcntl.fcntl(at, fcntl.F_DUPFD, 256) for to, at in [*enumerate(streams), *passed.items()]}
    for to, at in moved.items():
        os.dup2(at, to, inheritable=True)
    for number in (*streams, *passed.values(), *moved.values()):
        if number not in moved:
            os.close(number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    _open_streams(environment.get("PYTHONIOENCODING"))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if prepare is not None:
        prepare()
    sys.path[:] = [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *shared[2]]
    importlib.invalidate_caches()
    if "OMP_NUM_THREADS" in environment:  # which was read when torch was imported
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        _run(words, folder)
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # multiprocessing would skip them


def _open_streams(encoding: str | None) -> None:
    name, _, errors = (encoding or "").partition(":")
    for number, stream in enumerate(("stdin", "stdout", "stderr")):
        opened = open(  # noqa: SIM115 - until the process ends
            number, "w" if number else "r", encoding=name or None, closefd=False,
            buffering=1 if number == 2 or (number and os.isatty(number)) else -1,
            errors="backslashreplace" if number == 2 else errors or "strict",
        )  # fmt: skip
        setattr(sys, stream, opened)
        setattr(sys, f"__{stream}__", opened)


def _run(words: Sequence[str], folder: str) -> None:
    """Do what Python does with its arguments."""
    safe = words[0] == "-P"
    first, *others = words[safe:]
    if first == "-m":
        sys.path[:0] = [] if safe else [folder]
        sys.argv = ["-m", *others[1:]]
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[:0] = [] if safe else [""]
        sys.argv = ["-c", *others[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(others[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path[:0] = [] if safe else [str(Path(first).resolve().parent)]
        sys.argv = [first, *others]
        runpy.run_path(first, run_name="__main__")

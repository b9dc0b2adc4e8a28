"""One exception for each exit code. The message is one plain line: file, line or field, what is wrong, the remedy."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable

from budwood.untrusted.redaction import redact


class BudwoodError(Exception):
    """Base of every error that a user meets; `exit_code` is what the command ends with."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))


class InputError(BudwoodError):
    """What the user gave is wrong: recipe, data, options, names. `problems`: all that were found."""

    exit_code = 2

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(map(redact, problems)) or (str(self),)


class ResourceError(BudwoodError):
    """The machine cannot: memory, disk, device, a missing library, no network."""

    exit_code = 3


class CorruptError(BudwoodError):
    """An artifact on disk is not what it claims to be."""

    exit_code = 4


class DivergedError(BudwoodError):
    """Training ran into a loss or gradient that is not finite, or changed nothing."""

    exit_code = 5


class Interrupted(BudwoodError):
    """The run was stopped by a signal: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device or the host has no memory left, whoever's allocator said it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower() if isinstance(error, RuntimeError) and not isinstance(error, BudwoodError) else ""
    return any(words in text for words in ("can't allocate memory", "out of memory", "alloc_failed"))


def system_error(error: BaseException) -> OSError | None:
    """What the system said where `error` is its refusal to read or write, also as safetensors words it; else None."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"I/O error: .*\(os error (\d+)\)", str(error)) if "Safetensor" in type(error).__name__ else None
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def describe(error: BaseException) -> str:
    """Return "KeyError: 'x'": the type and the first line of the text of an exception that anybody may have raised."""
    try:
        text = str(error).strip()
    except Exception:  # a message that cannot be made is no reason to lose the type
        text = ""
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest of `choices`, or an empty string when none is near."""
    choices = list(choices)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    near = near or [c for c in choices if "".join(word[:1] for word in re.split("[_-]", c)) == name]  # lr, wd
    return f" Did you mean '{near[0]}'?" if near else ""

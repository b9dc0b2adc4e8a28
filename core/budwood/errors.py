"""One exception per exit code. A message is one plain line: file, line or field, what is wrong, and the remedy."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable

from budwood.untrusted.redaction import redact

BUG = "This is a bug; run again with --debug and report what it shows."


class BudwoodError(Exception):
    """Base class of every error shown to the user; `exit_code` is the command's exit code, by itself that of a bug."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))


class InputError(BudwoodError):
    """The user's input is wrong: recipe, data, options, names. `problems` lists every problem."""

    exit_code = 2

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(map(redact, problems)) or (str(self),)


class ResourceError(BudwoodError):
    """The machine lacks something: memory, disk space, a device, a library, a network."""

    exit_code = 3


class CorruptError(BudwoodError):
    """An artifact on disk is not what it claims to be."""

    exit_code = 4


class DivergedError(BudwoodError):
    """Training hit a non-finite loss or gradient, or changed nothing."""

    exit_code = 5


class Interrupted(BudwoodError):
    """A signal stopped the run: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class PeerError(BudwoodError):
    """Another process of the run failed, or the first process reports the failure of this one.

    Attributes:
        reported: whether another process prints the message.
    """

    def __init__(self, message: str, exit_code: int, reported: bool = False) -> None:
        super().__init__(message)
        self.exit_code, self.reported = exit_code, reported


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` means that the device or host is out of memory, whichever allocator raised it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower() if isinstance(error, RuntimeError) and not isinstance(error, BudwoodError) else ""
    return any(words in text for words in ("can't allocate memory", "out of memory", "alloc_failed"))


def system_error(error: BaseException) -> OSError | None:
    """Return the OSError behind a failed read or write, even if safetensors wrapped it; None for any other error."""
    if isinstance(error, OSError):
        return error
    match = re.search(r"I/O error: .*\(os error (\d+)\)", str(error)) if "Safetensor" in type(error).__name__ else None
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None


def unreadable(name: object, error: OSError) -> BudwoodError:
    """Return the error for something that cannot be read: the name is no name of a file, or the machine fails."""
    is_name = error.errno in (errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL)
    return (InputError if is_name else ResourceError)(f"{name}: cannot be read: {error.strerror or error}.")


def describe(error: BaseException) -> str:
    """Return "KeyError: 'x'": the type and the first line of the message of any exception."""
    try:
        text = str(error).strip()
    except Exception:  # a broken __str__ must not hide the type
        text = ""
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, with the next if it ends in a colon; its type without any."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first.rstrip()} {rest[0].strip()}" if rest and first.rstrip().endswith(":") else first


def plural(count: int, noun: str, plural_noun: str = "") -> str:
    """Return "1 step" or "1,200 steps"; `plural_noun` is the plural if it is not `noun` and "s"."""
    return f"{count:,} {noun if count == 1 else plural_noun or f'{noun}s'}"


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest of `choices` in any case, or an empty string if none is close."""
    choices = list(choices)
    lower = {choice.lower(): choice for choice in reversed(choices)}
    near = [choice for choice in choices if choice.lower() == name.lower()][:1]
    near = near or [lower[close] for close in difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)]
    near = near or [c for c in choices if "".join(word[:1] for word in re.split("[_-]", c)) == name]  # lr, wd
    return f" Did you mean '{near[0]}'?" if near else ""

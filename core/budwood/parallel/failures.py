"""What a failure of a process says about the others."""

from __future__ import annotations

from pathlib import Path

from budwood.errors import BUG, BudwoodError, describe, first_line


class OtherEndedError(Exception):
    """Another process has raised the alarm while this one waited for it."""


def of_others(error: BaseException) -> bool:
    """Whether an error only says that another process is gone: a broken connection of the group or the store."""
    link: BaseException | None = error
    seen: list[BaseException] = []
    while link is not None and link not in seen:
        if isinstance(link, OtherEndedError):
            return True
        broken = ("gloo", "Connection closed by peer", "NCCL", "Connection reset by peer", "Broken pipe")
        if isinstance(link, RuntimeError) and not isinstance(link, BudwoodError):
            module = type(link).__module__.startswith("torch")  # torch.distributed's DistError and its kinds
            if any(word in str(link) for word in broken) or (module and type(link).__name__.startswith("Dist")):
                return True
        seen.append(link)
        link = link.__cause__ or link.__context__
    return False


def lives(pid: int) -> bool:
    """Whether a process of this machine runs; one that ended but was not waited for does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return not Path("/proc/self").exists()  # without /proc, connections tell
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def ranks_text(ranks: list[int]) -> str:
    """Return ranks as a message names them."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def text_of(error: BaseException) -> str:
    """Return an error's message as the first process prints it."""
    if isinstance(error, BudwoodError):
        return str(error)
    if hasattr(error, "format_message"):  # the command line's
        return str(error.format_message())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted."
    if isinstance(error, OSError):
        return f"{error.filename or 'system error'}: {error.strerror or error}."
    return f"unexpected {describe(error)}. {BUG}"


def reason(error: BaseException) -> str:
    """Return what broke a connection, without the library's file names."""
    return first_line(error).rpartition("] ")[2][:120]

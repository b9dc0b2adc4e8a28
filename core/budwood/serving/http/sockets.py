"""Where a server listens. The addresses are taken before the base loads, so that one that is taken is known at once."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from budwood.errors import InputError
from budwood.serving.http.settings import Address, Limits, Settings

UNREAD = 1 << 17
"""Bytes that the system keeps of what a client has not read; it would take some megabytes."""
LINGER = 5
"""Seconds after which the system drops a connection that the server has closed, and whose client does not read."""


@dataclass(frozen=True)
class Sockets:
    """The sockets of a server.

    Attributes:
        clients: where clients connect; admin: where the administrator does, None: nowhere.
        places: both addresses, with the port that the system chose if it was to choose one.
    """

    clients: socket.socket
    admin: socket.socket | None
    places: list[str]

    @property
    def port(self) -> int:
        """The port for clients."""
        return int(self.clients.getsockname()[1])


@contextlib.contextmanager
def bound(settings: Settings) -> Iterator[Sockets]:
    """Take a server's addresses, and give them back.

    Raises:
        InputError: an address is taken or invalid.
    """
    with contextlib.ExitStack() as stack:
        made = []
        for address in (settings.address, settings.admin):
            if address is not None:
                made.append((bind(address, settings.limits), address))
                stack.callback(made[-1][0].close)
                if address.path:
                    stack.callback(Path(address.path).unlink, missing_ok=True)
        places = [
            str(address if address.path else Address(address.host, one.getsockname()[1])) for one, address in made
        ]
        yield Sockets(made[0][0], made[1][0] if len(made) > 1 else None, places)


def bind(address: Address, limits: Limits) -> socket.socket:
    """Return a socket that is bound to an address, and does not listen yet.

    Raises:
        InputError: it is taken or invalid.
    """
    try:
        if address.path:
            return _bind_to_path(Path(address.path))
        family, _, _, _, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # or what a client leaves unread would keep its connection for ever
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limits.slow_reader + LINGER) * 1000)
        made.bind(place)
        return made
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen at {address}: {reason}. Choose another address or port.") from error


def _bind_to_path(path: Path) -> socket.socket:
    """Return a Unix socket that only this user can connect to; a socket that is left over is replaced."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise InputError(f"{path}: is not a socket: choose another path.")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                path.unlink()
            else:
                raise InputError(f"{path}: another server listens there: choose another path.")
    made = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        made.bind(str(path))
    finally:
        os.umask(mask)
    return made

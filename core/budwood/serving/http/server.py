"""Runs the server: listens, watches the engine, and ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import uvicorn

from budwood.errors import InputError, ResourceError
from budwood.serving.http.app import admin_app, clients_app
from budwood.serving.http.errors import ApiError
from budwood.serving.http.service import Service, log
from budwood.serving.http.settings import Address, Limits

WATCH = 0.25
"""Seconds between two looks at the engine's thread."""
CLOSING = 3
"""Seconds that connections have to close after the last answer."""


class _Server(uvicorn.Server):
    """A server whose signals are ours: uvicorn would stop listening before the requests in flight have ended."""

    on_signal: Callable[[], None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end."""
        if self.on_signal is not None:
            self.on_signal()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals, if this is the server that ends with them."""
        if self.on_signal is None:
            yield
            return
        with super().capture_signals():
            yield


def run(service: Service, started: Callable[[list[str]], None]) -> None:
    """Serve until a signal.

    Args:
        service: what is served.
        started: called with the addresses, once they are listened at.

    Raises:
        InputError: an address is taken or invalid.
        ResourceError: the engine has ended.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # broken requests and clients that leave
    listening = listen(service.settings.address, service.limits)
    try:
        admin = listen(service.settings.admin, service.limits) if service.settings.admin is not None else None
        asyncio.run(_serve(service, listening, admin, started))
    finally:
        listening.close()
        if service.settings.admin is not None and service.settings.admin.path:
            with contextlib.suppress(OSError):
                os.unlink(service.settings.admin.path)
    if not service.alive:
        raise ResourceError("the engine has ended, so the server ends; start it again.")


async def _serve(
    service: Service, listening: socket.socket, admin: socket.socket | None, started: Callable[[list[str]], None]
) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    signals = 0

    def end() -> None:
        nonlocal signals
        signals += 1
        service.ending = True
        loop.call_soon_threadsafe(ended.set)
        if signals > 1:
            loop.call_soon_threadsafe(service.abort_all, _shutting_down())

    server = _Server(_config(clients_app(service), service.limits))
    server.on_signal = end
    servers = [(server, listening)]
    if admin is not None:
        servers.append((_Server(_config(admin_app(service), service.limits)), admin))
    tasks = [asyncio.create_task(one.serve([listener])) for one, listener in servers]
    try:
        while not all(one.started for one, _ in servers):
            await asyncio.sleep(0.01)
            for task in tasks:
                if task.done():
                    task.result()
        started([_shown(service.settings.address, listening), *([str(service.settings.admin)] if admin else [])])
        await _until(service, ended)
        await _drain(service)
    finally:
        for one, _ in servers:
            one.should_exit = True
        await asyncio.gather(*tasks)


async def _until(service: Service, ended: asyncio.Event) -> None:
    """Return once the server is to end, or the engine has ended."""
    while not ended.is_set() and service.alive:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), WATCH)


async def _drain(service: Service) -> None:
    """Let the requests in flight end, and end the rest with an error."""
    if not service.alive:
        log.error("the engine has ended: no request is taken any more")
        service.abort_all(ApiError(503, "The engine has ended.", code="engine"))
    elif service.calls:
        log.info("shutting down: %d requests in flight have %g s", len(service.calls), service.limits.drain)
    end = asyncio.get_running_loop().time() + service.limits.drain
    while service.calls and service.alive and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.05)
    service.abort_all(_shutting_down())
    for _ in range(20 * CLOSING):
        if not service.calls:
            return
        await asyncio.sleep(0.05)


def _shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="shutdown", retry_after=5)


def _config(app: object, limits: Limits) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http="h11", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        proxy_headers=False, h11_max_incomplete_event_size=limits.header, limit_concurrency=limits.connections,
        timeout_keep_alive=30, timeout_graceful_shutdown=CLOSING,
    )  # fmt: skip


def listen(address: Address, limits: Limits) -> socket.socket:
    """Return a socket that listens at an address.

    Raises:
        InputError: it is taken or invalid.
    """
    try:
        if address.path:
            return _listen_at_path(Path(address.path))
        family, _, _, _, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # or what a client leaves unread would keep its connection for ever
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limits.slow_reader * 1000))
        made.bind(place)
        made.listen(2048)
        return made
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen at {address}: {reason}. Choose another address or port.") from error


def _listen_at_path(path: Path) -> socket.socket:
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
    made.listen(16)
    return made


def _shown(address: Address, listening: socket.socket) -> str:
    return str(Address(address.host, listening.getsockname()[1])) if not address.path else address.path

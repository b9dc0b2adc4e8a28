"""Runs the server: listens, watches the engine, and ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from budwood.errors import ResourceError
from budwood.serving.http.app import admin_app, clients_app
from budwood.serving.http.errors import ApiError
from budwood.serving.http.service import Service, log
from budwood.serving.http.settings import Limits
from budwood.serving.http.sockets import Sockets

WATCH = 0.1
"""Seconds between two looks at whether the server is to end."""
CLOSING = 3
"""Seconds that connections have to close after the last answer."""


class _Protocol(H11Protocol):
    """A connection that ends if the headers of a request do not arrive in time."""

    seconds: float
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a request."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.seconds, transport.close)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._end_timer()
        elif self._timer is None and self.conn.trailing_data[0]:  # the beginning of a further request
            self._timer = self.loop.call_later(self.seconds, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._end_timer()
        super().connection_lost(exc)

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


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


def run(service: Service, sockets: Sockets, started: Callable[[], None]) -> None:
    """Serve until a signal.

    Args:
        service: what is served.
        sockets: where; see `bound`.
        started: called once requests are taken.

    Raises:
        ResourceError: the engine has ended.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # broken requests and clients that leave
    asyncio.run(_serve(service, sockets, started))
    if not service.alive:
        raise ResourceError("the engine has ended, so the server ends; start it again.")


async def _serve(service: Service, sockets: Sockets, started: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()

    def end() -> None:
        if service.ending:  # the second signal
            loop.call_soon_threadsafe(service.abort_all, _shutting_down())
        service.ending = True

    server = _Server(_config(clients_app(service), service.limits))
    server.on_signal = end
    servers = [(server, sockets.clients)]
    if sockets.admin is not None:
        servers.append((_Server(_config(admin_app(service), service.limits)), sockets.admin))
    tasks = [asyncio.create_task(one.serve([listener])) for one, listener in servers]
    try:
        while not all(one.started for one, _ in servers):
            await asyncio.sleep(0.01)
            for task in tasks:
                if task.done():
                    task.result()
        warming = asyncio.ensure_future(service.work(service.prompts.warm))
        started()
        while service.alive and not service.ending:
            await asyncio.sleep(WATCH)
        await _drain(service)
        warming.cancel()
    finally:
        for one, _ in servers:
            one.should_exit = True
        await asyncio.gather(*tasks)


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
    protocol = type("_Protocol", (_Protocol,), {"seconds": limits.body_seconds})
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=protocol, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        proxy_headers=False, h11_max_incomplete_event_size=limits.header, limit_concurrency=limits.connections,
        timeout_keep_alive=30, timeout_graceful_shutdown=CLOSING,
    )  # fmt: skip

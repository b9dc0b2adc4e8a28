"""Around every request: who asks, from where, what is noted about it, and that what it holds is freed.

A plain ASGI application: starlette's middleware of functions would hide from the handlers that a client has left.
"""

from __future__ import annotations

import secrets
import traceback
from collections.abc import MutableMapping
from typing import Any

from sse_starlette.sse import SendTimeoutError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from budwood.serving.http.errors import ApiError, from_error
from budwood.serving.http.generation import GoneError
from budwood.serving.http.service import Record, Service, log

GONE = 499
"""Status, in log and metrics only, of a request whose client has left."""
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; connect-src 'self'; img-src 'self' data:; style-src 'self'; "
     b"script-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
]  # fmt: skip
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
QUIET = ("/health", "/ready", "/metrics")
"""Paths that are asked every few seconds, and neither logged nor counted."""


class Guard:
    """The ASGI application around that of the routes."""

    def __init__(self, app: ASGIApp, service: Service, admin: bool) -> None:
        self.app, self.service, self.admin = app, service, admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        record = Record(f"req-{secrets.token_hex(8)}", _route(scope, self.admin))
        scope.setdefault("state", {})["record"] = record

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode()), *HEADERS]
            await send(message)

        request = Request(scope, receive)
        try:
            with record.stack:
                try:
                    self._enter(request, record)
                    await self.app(scope, receive, noted)
                except (ClientDisconnect, GoneError):
                    record.outcome = "disconnect"
                    record.status = record.status or GONE
                except SendTimeoutError:
                    record.outcome = "slow_reader"
                except Exception as error:
                    if not isinstance(error, ApiError):
                        log.error("%s %s", record.id, "".join(traceback.format_exception(error)))
                    if not record.status:
                        await respond(from_error(error))(scope, receive, noted)
        finally:
            self._finish(scope, record)

    def _enter(self, request: Request, record: Record) -> None:
        """Refuse a request of a web page elsewhere, or without a token, or above its rate.

        Raises:
            ApiError: the request may not pass.
        """
        service, path = self.service, request.url.path
        authorization = request.headers.get("authorization", "")
        if self.admin:
            if not service.tokens.is_admin(authorization):
                raise _no_token("the administrator's token")
            return
        host = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
        address = service.settings.address
        if not service.tokens.needed and address.is_local and host not in (*LOCAL_HOSTS, address.host):
            # Otherwise the page of any site could let its name resolve to this machine, and ask.
            raise ApiError(403, f"The host '{host[:64]}' is not this machine: use localhost.", code="host")
        if path.startswith("/v1/"):
            tenant = service.tokens.tenant(authorization)
            if tenant is None:
                raise _no_token("a token")
            record.tenant = tenant
            service.check_ready()
            service.admission.count_request(tenant)
        elif path == "/metrics" and service.tokens.needed and not service.tokens.is_admin(authorization):
            raise _no_token("the administrator's token")

    def _finish(self, scope: MutableMapping[str, Any], record: Record) -> None:
        if scope["path"] in QUIET:
            return
        if not record.status:
            record.status, record.outcome = GONE, record.outcome or "disconnect"
        elif record.status == 200 and not record.outcome and record.unfinished:
            record.outcome = "disconnect"
        self.service.report(record)


def respond(error: ApiError) -> JSONResponse:
    """Return an error as OpenAI's clients read it."""
    return JSONResponse(error.body, error.status, error.headers)


def _no_token(what: str) -> ApiError:
    text = f"This server needs {what}: send it in the header 'Authorization: Bearer TOKEN'."
    return ApiError(401, text, code="invalid_api_key")


def _route(scope: Scope, admin: bool) -> str:
    """Return the route of a request, of which there are few: its path would let clients make any number of metrics."""
    path = str(scope["path"])
    for known in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/admin"):
        if path == known or path.startswith(known + "/"):
            return known
    return "/" if path == "/" else "admin" if admin else "other"

"""Reads the body of a request: small, in time, JSON that is one object, not deep, without half characters."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request

from budwood.errors import CorruptError
from budwood.serving.http.errors import ApiError
from budwood.serving.http.settings import Limits
from budwood.untrusted.formats import parse_object


async def read_body(request: Request, limits: Limits) -> dict[str, Any]:
    """Return the JSON object in a request's body.

    Raises:
        ApiError: it is none, too large, too deep, or takes too long to arrive.
        ClientDisconnect: the client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a web page of another site cannot send
        raise ApiError(415, "Send the request as JSON, with the header 'content-type: application/json'.")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and (len(stated) > 15 or int(stated) > limits.body):
        raise _too_large(limits)
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.body:
                    raise _too_large(limits)
                parts.append(part)
    except TimeoutError as error:
        raise ApiError(408, f"The request's body did not arrive within {limits.body_seconds:g} s.") from error
    data = b"".join(parts)
    return await asyncio.to_thread(parse, data, limits) if len(data) > 1 << 16 else parse(data, limits)


def parse(data: bytes, limits: Limits) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ApiError: it is none, is nested too deeply, or holds text that is not Unicode.
    """
    try:
        value = parse_object(data, "The request's body")
    except CorruptError as error:
        raise ApiError(400, str(error)) from error
    level: list[Any] = [value]
    for _ in range(limits.depth):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict):
                below += item
                below += item.values()
            elif isinstance(item, list):
                below += item
        if not below:
            return value
        level = below
    raise ApiError(400, f"The request's body is nested more than {limits.depth} levels deep.")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, "The request's body has half of a surrogate pair, which is no character.") from error


def _too_large(limits: Limits) -> ApiError:
    return ApiError(413, f"The request's body is larger than {limits.body:,} bytes.")

"""What the administrator can do: load, reload, alias and unload adapters. Nothing is uploaded: folders below the root
are named."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from budwood.errors import BudwoodError, CorruptError, InputError
from budwood.serving.http.body import read_body
from budwood.serving.http.errors import ApiError
from budwood.serving.http.schema import read
from budwood.serving.http.service import Service, log

Verify = Literal["auto", "golden", "hash"]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Load(_Body):
    """Load an adapter: its name, its folder below the root (None: called as it), and what is compared."""

    name: str = Field(min_length=1, max_length=64)
    path: str | None = Field(None, min_length=1, max_length=512)
    verify: Verify = "auto"
    replace: bool = False
    pinned: bool = False


class Alias(_Body):
    """Let a name stand for the adapter of another."""

    target: str = Field(min_length=1, max_length=64)
    verify: Verify = "auto"


class Reload(_Body):
    """Load again what has changed below the root."""

    verify: Verify = "auto"


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the administrator's routes."""
    catalog = service.catalog

    async def body(request: Request) -> dict[str, Any]:
        return await read_body(request, service.limits)

    @app.get("/admin/adapters")
    async def adapters() -> Response:
        return JSONResponse({"adapters": [one.describe() for one in catalog.all()]})

    @app.post("/admin/adapters")
    async def load(request: Request) -> Response:
        asked = read(Load, await body(request))
        path = asked.path or asked.name
        served, found = await change(catalog.load, asked.name, path, asked.verify, asked.replace, asked.pinned)
        return JSONResponse({**served.describe(), "golden": found})

    @app.delete("/admin/adapters/{name}")
    async def unload(name: str) -> Response:
        await change(catalog.unload, name)
        return JSONResponse({"id": name, "deleted": True})

    @app.put("/admin/adapters/{name}")
    async def alias(name: str, request: Request) -> Response:
        asked = read(Alias, await body(request))
        return JSONResponse((await change(catalog.alias, name, asked.target, asked.verify)).describe())

    @app.post("/admin/reload")
    async def reload(request: Request) -> Response:
        asked = read(Reload, await body(request))
        done = await change(catalog.reload, asked.verify) if catalog.root is not None else {}
        if service.tokens.path is not None:
            await change(service.tokens.reload)
        return JSONResponse({"adapters": done}, 422 if any("error" in one for one in done.values()) else 200)


async def change(function: Any, *arguments: Any) -> Any:
    """Carry out a change in a thread of its own, and log it.

    Raises:
        ApiError: it failed, and everything is as it was.
    """
    name = f"{function.__name__} {' '.join(map(str, arguments))}"
    try:
        result = await asyncio.to_thread(function, *arguments)
    except BudwoodError as error:
        log.warning("admin: %s: %s", name, error)
        status = 422 if isinstance(error, CorruptError) else 409 if isinstance(error, InputError) else 503
        raise ApiError(status, str(error), code=type(error).__name__) from error
    log.info("admin: %s", name)
    return result

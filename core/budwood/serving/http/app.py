"""The two web applications: the clients', and the administrator's."""

from __future__ import annotations

import mimetypes
from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from budwood.serving.http import admin, embeddings, generation
from budwood.serving.http.errors import ApiError, from_error
from budwood.serving.http.middleware import GONE, Guard, respond
from budwood.serving.http.service import Record, Service

PAGE = Path(__file__).with_name("page")


def clients_app(service: Service) -> ASGIApp:
    """Return the application for clients."""
    app = _new()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await generation.chat(service, request, _record(request))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await generation.completions(service, request, _record(request))

    @app.post("/v1/embeddings")
    async def embed(request: Request) -> Response:
        return await embeddings.embed(service, request, _record(request))

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": service.catalog.visible(_record(request).tenant)})

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> Response:
        tenant = _record(request).tenant
        served = service.resolve(name, tenant)
        return JSONResponse(service.catalog.visible(tenant)[0] if served is None else served.describe())

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        problem = service.problem
        return JSONResponse({"status": problem or "ok"}, 503 if problem else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    files = {path.name: path.read_bytes() for path in PAGE.glob("*.*") if path.is_file()} if PAGE.is_dir() else {}

    @app.get("/{name}")
    @app.get("/")
    async def page(name: str = "index.html") -> Response:
        if name not in files:
            raise HTTPException(404)
        return Response(files[name], media_type=mimetypes.guess_type(name)[0] or "application/octet-stream")

    return Guard(app, service, admin=False)


def admin_app(service: Service) -> ASGIApp:
    """Return the application for the administrator."""
    app = _new()
    admin.add_routes(app, service)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return Guard(app, service, admin=True)


def _new() -> FastAPI:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        if error.status >= 500:
            _record(request).outcome = error.code or "failed"
        return respond(error)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        texts = {404: "There is no such path on this server.", 405: "This path has no such method."}
        return respond(ApiError(error.status_code, texts.get(error.status_code, str(error.detail)), code="path"))

    @app.exception_handler(ClientDisconnect)
    @app.exception_handler(generation.GoneError)
    async def gone(request: Request, error: Exception) -> Response:
        _record(request).outcome = "disconnect"
        return Response(status_code=GONE)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return respond(from_error(error))  # starlette raises it again, so that it is logged

    return app


def _record(request: Request) -> Record:
    record: Record = request.state.record
    return record

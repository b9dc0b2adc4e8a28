"""/v1/embeddings."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from budwood.serving.http.body import read_body
from budwood.serving.http.errors import ApiError
from budwood.serving.http.schema import Embedding, read
from budwood.serving.http.service import Record, Service


async def embed(service: Service, request: Request, record: Record) -> Response:
    """Answer a request to /v1/embeddings."""
    body = read(Embedding, await read_body(request, service.limits))
    served = service.resolve(body.model, record.tenant)
    record.adapter = "base" if served is None else served.name
    raise ApiError(400, f"model: '{body.model}' gives no embeddings, but text.", param="model")

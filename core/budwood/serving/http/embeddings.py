"""/v1/embeddings, for tasks whose answer to a text is a vector."""

from __future__ import annotations

import base64
import sys
from functools import partial
from typing import Any

import numpy as np
import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from budwood.contract.calls import attribute_errors
from budwood.data.encoder import Encoder
from budwood.errors import InputError
from budwood.model.limits import positions_of
from budwood.serving.http.body import read_body
from budwood.serving.http.catalog import Served
from budwood.serving.http.errors import ApiError
from budwood.serving.http.schema import Embedding, read
from budwood.serving.http.service import Record, Service

BATCH = 16
"""Texts that are computed between two steps of the engine."""


async def embed(service: Service, request: Request, record: Record) -> Response:
    """Answer a request to /v1/embeddings."""
    body = read(Embedding, await read_body(request, service.limits))
    served = service.resolve(body.model, record.tenant)
    if served is not None:
        record.stack.enter_context(service.catalog.hold(served))
    record.adapter = "base" if served is None else served.name
    if not service.task.responds():
        raise ApiError(400, f"model: '{body.model}' gives text, no embeddings.", param="model")
    texts = body.inputs
    if not texts or len(texts) > service.limits.inputs:
        raise ApiError(400, f"input: give 1 to {service.limits.inputs} texts.", param="input")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ApiError(400, "input: each must be a text that is not empty; token ids are not taken.", param="input")
    record.stack.enter_context(service.admission.hold(record.tenant, 1))
    vectors, record.prompt_tokens = await service.work(partial(_vectors, service, served, [str(t) for t in texts]))
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": record.prompt_tokens, "total_tokens": record.prompt_tokens}
    return JSONResponse({"object": "list", "model": body.model, "data": data, "usage": usage})


def _vectors(service: Service, served: Served | None, texts: list[str]) -> tuple[list[list[float]], int]:
    """Return the vector of each text, and the number of tokens; a worker's.

    Raises:
        ApiError: a text is too long, or the task's answer is no vector.
    """
    engine = service.engine
    lengths = [len(ids) for ids in Encoder(engine.tokenizer).whole(texts)]
    longest = min(engine.tokenizer.model_max_length, positions_of(engine.model) or sys.maxsize)
    if max(lengths) > longest:
        text = f"input: a text has {max(lengths):,} tokens, and the base takes {longest:,}."
        raise ApiError(400, text, param="input")
    answers: list[Any] = []
    try:
        for start in range(0, len(texts), BATCH):
            compute = partial(_respond, service, texts[start : start + BATCH])
            answers += engine.with_adapter(None if served is None else served.key, compute)
    except InputError as error:
        raise ApiError(400, str(error), param="input") from error
    if not all("vector" in answer for answer in answers):
        raise ApiError(400, f"model: the task {engine.task} gives no embeddings.", param="model")
    return [answer["vector"] for answer in answers], sum(lengths)


def _respond(service: Service, texts: list[str]) -> list[Any]:
    task, base = service.task, service.engine.base
    narrow = base.dtype in (torch.bfloat16, torch.float16)
    kind = torch.device(base.device).type
    with torch.no_grad(), torch.autocast(kind, base.dtype, enabled=narrow), attribute_errors(task, "respond"):
        found: list[Any] = task.respond(service.engine.model, service.engine.tokenizer, texts, ())
    return found


def _encoded(vector: list[float], how: str | None) -> list[float] | str:
    """Return a vector as numbers, or as base64 of little-endian fp32."""
    if how != "base64":
        return vector
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()

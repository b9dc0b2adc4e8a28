"""/v1/chat/completions and /v1/completions."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from sse_starlette import EventSourceResponse
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from budwood.errors import describe
from budwood.model.sampling import Sampling
from budwood.serving.http.answers import DONE, Choice, Format, Part, event
from budwood.serving.http.body import read_body
from budwood.serving.http.calls import Call, usage
from budwood.serving.http.catalog import Served
from budwood.serving.http.errors import ApiError, from_error
from budwood.serving.http.logprobs import LogProbs
from budwood.serving.http.prompts import Prompt
from budwood.serving.http.schema import Chat, Completion, Generation, check, read
from budwood.serving.http.service import Record, Service, log
from budwood.serving.http.tools import CallReader
from budwood.serving.requests import Twins

COMPLETION_TOKENS = 16
"""Tokens of an answer of /v1/completions by default, as in OpenAI's API."""


class GoneError(Exception):
    """The client went away."""


@dataclass(frozen=True)
class Target:
    """What answers: the base (none), an adapter, or the weighted sum of several, the heaviest first."""

    served: tuple[Served, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def adapter(self) -> str | dict[str, float] | None:
        """The adapter as the engine takes it."""
        if self.weights:
            return {one.key: weight for one, weight in zip(self.served, self.weights, strict=True)}
        return self.served[0].key if self.served else None

    @property
    def label(self) -> str:
        """Its name in metrics and in the log."""
        return "blend" if self.weights else self.served[0].name if self.served else "base"


async def chat(service: Service, request: Request, record: Record) -> Response:
    """Answer a request to /v1/chat/completions."""
    body = read(Chat, await read_body(request, service.limits))
    check(body, service.limits)
    target = _target(service, body, record)
    limit = body.max_completion_tokens or body.max_tokens or service.limits.max_tokens
    with_tools = bool(body.tools) and body.tool_choice != "none"

    def prompts() -> list[Prompt]:
        return [service.prompts.chat(body, [one.saved for one in target.served])]

    return await _answer(service, request, record, body, target, prompts, limit, with_tools)


async def completions(service: Service, request: Request, record: Record) -> Response:
    """Answer a request to /v1/completions."""
    body = read(Completion, await read_body(request, service.limits))
    check(body, service.limits)
    target = _target(service, body, record)
    limit = body.max_tokens or COMPLETION_TOKENS

    def prompts() -> list[Prompt]:
        return [service.prompts.text(prompt, [one.saved for one in target.served]) for prompt in body.prompts]

    return await _answer(service, request, record, body, target, prompts, limit, False)


def _target(service: Service, body: Generation, record: Record) -> Target:
    if body.adapters is None:
        served = service.resolve(body.model, record.tenant)
        target = Target(() if served is None else (served,))
    else:
        if service.resolve(body.model, record.tenant) is not None:
            text = f"model: must be the base, '{service.catalog.base_name}', if adapters are given."
            raise ApiError(400, text, param="model")
        parts = []
        for name, weight in body.adapters.items():
            served = service.resolve(name, record.tenant)
            if served is None:
                raise ApiError(400, "adapters: the base has no weight; it is always there.", param="adapters")
            parts.append((served, weight))
        parts.sort(key=lambda part: -abs(part[1]))
        target = Target(tuple(part[0] for part in parts), tuple(part[1] for part in parts))
    for one in target.served:
        record.stack.enter_context(service.catalog.hold(one))
    record.adapter = target.label
    record.prompt_field = "messages" if isinstance(body, Chat) else "prompt"
    return target


async def _answer(
    service: Service, request: Request, record: Record, body: Generation, target: Target,
    prompts: Any, limit: int, with_tools: bool,
) -> Response:  # fmt: skip
    if not service.engine.model.can_generate():
        text = f"model: the server's task is {service.engine.task}, which generates no text."
        raise ApiError(400, text, param="model")
    count = body.n or 1
    rows = count * (len(body.prompts) if isinstance(body, Completion) else 1)
    record.stack.enter_context(service.admission.hold(record.tenant, rows))
    call = Call(body.log_probs is not None, partial(_explain, service, target))
    record.stack.enter_context(service.flight(call, record))
    made: list[Prompt] = await service.work(partial(_submit, service, call, record, body, target, prompts, limit))
    record.prompt_tokens = sum(len(prompt.ids) for prompt in made)
    form, warnings = made[0].calls, []
    if with_tools and form is None:
        warnings.append("tools: this model's chat template writes no calls as JSON, so they stay in the text.")
    names = [tool.function.name for tool in (body.tools or ())] if isinstance(body, Chat) else []
    choices = [
        Choice(
            index, isinstance(body, Chat), LogProbs(service.token_text) if body.log_probs is not None else None,
            CallReader(form, names) if with_tools and form is not None else None,
        )
        for index in range(rows)
    ]  # fmt: skip
    identity = target.served[0].identity if target.served else service.engine.base.fingerprint
    fingerprint = "blend" if target.weights else identity[:12]
    layout = Format(isinstance(body, Chat), body.model, fingerprint, body.usage_in_stream, warnings)
    if body.stream:
        stream = _stream(record, call, choices, layout)
        return EventSourceResponse(stream, ping=15, sep="\n", send_timeout=service.limits.slow_reader)
    parts = await _until_gone(request, _collect(record, call, choices))
    return JSONResponse(layout.whole(parts, usage(record.prompt_tokens, list(call.generated.values()))))


def _submit(
    service: Service, call: Call, record: Record, body: Generation, target: Target, prompts: Any, limit: int
) -> list[Prompt]:
    """Render, tokenise and submit; a worker's."""
    made: list[Prompt] = prompts()
    seed = secrets.randbits(63) if body.seed is None else body.seed
    for number, prompt in enumerate(made, 1):
        twins = Twins()
        for sample in range(body.n or 1):
            sampling = Sampling(
                limit, 1.0 if body.temperature is None else body.temperature, body.top_p or 1.0, body.top_k or 0,
                seed=(seed, sample), stop=body.stops, stop_ids=prompt.stop_ids,
                log_probs=body.log_probs is not None, top_log_probs=body.log_probs or 0,
            )  # fmt: skip
            where = "the prompt" if len(made) == 1 else f"prompt {number}"
            ask = partial(
                service.engine.submit, prompt.ids, target.adapter, sampling, tenant=record.tenant.name,
                template=prompt.template, stream=bool(body.stream), where=where, twins=twins,
            )  # fmt: skip
            try:
                call.submit(ask)
            except Exception as error:
                told = _explain(service, target, error)
                if told.status == 400:
                    told.param = "adapters" if told.message.startswith("adapters:") else record.prompt_field
                raise told from error
    return made


def _explain(service: Service, target: Target, error: Exception) -> ApiError:
    """Return what a client is told about an error of the engine."""
    names = service.engine.names
    if any(one.key in names and names[one.key].quarantined for one in target.served):
        return ApiError(500, str(error), code="quarantined")
    found = from_error(error)
    if any(str(one.saved.directory) in found.message for one in target.served):  # it left the memory, and is gone
        found = ApiError(503, "The adapter cannot be read any more; the server's log says why.", code="adapter")
    if found.status >= 500:
        log.error("adapter %s: %s", target.label, describe(error))
    if found.status == 429:
        found.retry_after = service.admission.retry_after
    return found


async def _collect(record: Record, call: Call, choices: list[Choice]) -> list[list[Part]]:
    parts: list[list[Part]] = [[] for _ in choices]
    async for piece in call.pieces():
        record.heard(piece)
        parts[piece.index].append(choices[piece.index].add(piece))
    return parts


async def _stream(record: Record, call: Call, choices: list[Choice], layout: Format) -> AsyncIterator[bytes]:
    record.unfinished = True
    for choice in choices:
        if (first := layout.first(choice.index)) is not None:
            yield first
    try:
        async for piece in call.pieces():
            record.heard(piece)
            for chunk in layout.chunks(piece.index, choices[piece.index].add(piece)):
                yield chunk
    except ApiError as error:
        record.outcome = error.code or "failed"
        yield event(error.body)
    else:
        record.unfinished = False
        if (last := layout.last(usage(record.prompt_tokens, list(call.generated.values())))) is not None:
            yield last
    yield DONE


async def _until_gone(request: Request, work: Any) -> Any:
    """Return a coroutine's result.

    Raises:
        GoneError: the client went away first.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""What all parts of the server share: the engine, its names, who may ask, what is counted, and whether it is ending."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from budwood.contract.loading import create
from budwood.model.task import Task
from budwood.serving.engine import Engine
from budwood.serving.http.calls import Call, Piece
from budwood.serving.http.catalog import Catalog, Root, Served
from budwood.serving.http.errors import ApiError, no_model
from budwood.serving.http.limits import Admission
from budwood.serving.http.logprobs import TokenText
from budwood.serving.http.metrics import Metrics
from budwood.serving.http.prompts import Prompts
from budwood.serving.http.settings import Settings
from budwood.serving.http.tokens import ANYONE, Tenant, Tokens

Result = TypeVar("Result")
log = logging.getLogger("budwood.serve")
STUCK = 120
"""Seconds of a step after which the server is not ready: no step of a machine that keeps up takes as long."""
WORKERS = 2
"""Threads that render and tokenize."""


@dataclass(eq=False)
class Record:
    """What the log and the metrics say about a request: never its text.

    Attributes:
        adapter: the served name, "base" or "blend"; "" if there is none.
        outcome: how it ended, if not by itself.
        prompt_field: what the request calls its prompt.
        unfinished: whether an answer has begun and not ended.
        stack: what is held for the request, and freed at its end, however it ends.
    """

    id: str
    route: str
    start: float = field(default_factory=time.monotonic)
    tenant: Tenant = ANYONE
    adapter: str = ""
    status: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first: float | None = None
    outcome: str = ""
    unfinished: bool = False
    prompt_field: str = "prompt"
    stack: ExitStack = field(default_factory=ExitStack)

    def heard(self, piece: Piece) -> None:
        """Note a piece of an answer."""
        self.first = self.first or time.monotonic()
        if piece.end is not None:
            self.generated_tokens += len(piece.end.tokens) + (piece.end.end_token is not None)


class Service:
    """The state of a server.

    Attributes:
        calls: requests in flight.
        ending: whether new requests are refused, since the server ends.
    """

    def __init__(
        self, engine: Engine, settings: Settings, tokens: Tokens | None = None, root: Root | None = None,
        task: Task | None = None,
    ) -> None:  # fmt: skip
        """Prepare a server; the task is the engine's, if it has options."""
        self.engine, self.settings, self.limits = engine, settings, settings.limits
        self.task: Task = task or create(engine.task, "budwood.tasks")
        self.tokens = tokens or Tokens()
        self.catalog = Catalog(engine, settings.base_name, self.task, root)
        self.prompts = Prompts(engine.base)
        self.token_text = TokenText(engine.tokenizer)
        self.admission = Admission(self.limits, engine.scheduler.max_rows)
        self.metrics = Metrics(engine)
        self.calls: set[Call] = set()
        self.ending = False
        self._thread: threading.Thread | None = None
        self._workers = ThreadPoolExecutor(WORKERS, "budwood-prompts")

    async def work(self, function: Callable[[], Result]) -> Result:
        """Run a function in one of the threads for prompts."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, function)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread, once started, still runs."""
        if self._thread is None:
            self._thread = self.engine.thread.current
        return self._thread is None or self._thread.is_alive()

    @property
    def problem(self) -> str:
        """Why the server takes no requests; "": it does."""
        if not self.alive:
            return "the engine has ended"
        if self.engine.stats().step_seconds > STUCK:
            return f"a step of the engine has taken more than {STUCK} s"
        return "the server is shutting down" if self.ending else ""

    def check_ready(self) -> None:
        """Refuse a request that the server does not take any more.

        Raises:
            ApiError: it ends, or the engine has ended.
        """
        if problem := self.problem:
            raise ApiError(503, f"No request is taken: {problem}.", code="unavailable", retry_after=5)

    def resolve(self, model: str, tenant: Tenant) -> Served | None:
        """Return the adapter of a model's name; None: the base.

        Raises:
            ApiError: there is none, or the tenant may not use it.
        """
        try:
            return self.catalog.resolve(model, tenant)
        except KeyError as error:
            raise no_model(model) from error

    @contextmanager
    def flight(self, call: Call, record: Record) -> Iterator[None]:
        """Keep a call among those in flight until its deadline; at the end, its rows are cancelled."""
        limit = self.limits.deadline
        late = ApiError(504, f"The answer took longer than {limit:g} s.", code="deadline")
        left = limit - (time.monotonic() - record.start)
        timer = asyncio.get_running_loop().call_later(left, call.abort, late)
        self.calls.add(call)
        try:
            yield
        finally:
            timer.cancel()
            self.calls.discard(call)
            record.generated_tokens += call.unfinished_tokens()
            call.close()

    def abort_all(self, error: ApiError) -> None:
        """End all requests in flight with an error."""
        for call in list(self.calls):
            call.abort(error)

    def report(self, record: Record) -> None:
        """Count a request, and log it in one line."""
        tenant, adapter = record.tenant.name, record.adapter
        seconds = time.monotonic() - record.start
        self.metrics.requests.labels(record.route, str(record.status), adapter, tenant).inc()
        if record.outcome:
            self.metrics.cancelled.labels(record.outcome, adapter, tenant).inc()
        if adapter:
            self.metrics.prompt_tokens.labels(adapter, tenant).inc(record.prompt_tokens)
            self.metrics.generated_tokens.labels(adapter, tenant).inc(record.generated_tokens)
            if record.first is not None:
                self.metrics.first.labels(adapter, tenant).observe(record.first - record.start)
            if record.status == 200 and not record.outcome:
                self.metrics.seconds.labels(adapter, tenant).observe(seconds)
        log.info(
            "%s %s %d tenant=%s adapter=%s prompt=%d generated=%d seconds=%.3f%s", record.id, record.route,
            record.status, tenant or "-", adapter or "-", record.prompt_tokens, record.generated_tokens, seconds,
            f" {record.outcome}" if record.outcome else "",
        )  # fmt: skip

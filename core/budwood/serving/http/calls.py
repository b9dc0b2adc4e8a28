"""One request's rows in the engine, heard in the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from budwood.model.decoding import Generated
from budwood.serving.http.errors import ApiError, from_error
from budwood.serving.requests import Answer


@dataclass(frozen=True)
class Piece:
    """A piece of one answer's text, or its end.

    Attributes:
        index: of the answer in the request.
        text: the piece; "" at the end.
        end: the whole answer, at its end.
        tokens, log_probs, top: those of the whole answer so far, if log-probabilities are asked for.
    """

    index: int
    text: str
    end: Generated | None = None
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    top: list[dict[int, float]] = field(default_factory=list)


class Call:
    """The rows of one request. Submitted by any thread; heard, ended and aborted by the event loop's.

    Attributes:
        answers: one a row; generated: the whole answers of those that have ended.
        aborted: why the server ended it; None: it did not.
    """

    def __init__(self, log_probs: bool, explain: Callable[[Exception], ApiError] = from_error) -> None:
        """Prepare it; `explain` returns what a client is told about an error of the engine."""
        self.answers: list[Answer] = []
        self.generated: dict[int, Generated] = {}
        self.aborted: ApiError | None = None
        self._log_probs, self._explain = log_probs, explain
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, str | None] | ApiError] = asyncio.Queue()
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, ask: Callable[..., Answer]) -> None:
        """Add a row: `ask` submits it with a listener. Any thread's, before `pieces`."""
        index = len(self.answers)
        answer = ask(listener=lambda piece: self._post((index, piece)))
        with self._lock:
            self.answers.append(answer)
            closed = self._closed
        if closed:  # the client left meanwhile
            answer.cancel()

    def _post(self, event: tuple[int, str | None] | ApiError) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the pieces of all answers as they come, until all have ended.

        Raises:
            ApiError: a row failed, or the server ended the request.
        """
        while len(self.generated) < len(self.answers):
            event = await self._events.get()
            if isinstance(event, ApiError):
                raise event
            index, piece = event
            answer = self.answers[index]
            if piece is not None:
                yield Piece(index, piece, None, *(answer.so_far() if self._log_probs else ()))
                continue
            try:
                end = answer.result(timeout=0)
            except Exception as error:
                raise self._explain(error) from error
            if self.aborted is not None:
                raise self.aborted
            self.generated[index] = end
            yield Piece(index, "", end, end.tokens, end.log_probs, end.top_log_probs)

    def abort(self, error: ApiError) -> None:
        """End it with an error."""
        self.aborted = error
        self._events.put_nowait(error)
        self.close()

    def unfinished_tokens(self) -> int:
        """Return the number of tokens of the answers that have not ended."""
        return sum(len(a.so_far()[0]) for index, a in enumerate(self.answers) if index not in self.generated)

    def close(self) -> None:
        """Cancel the rows that have not ended."""
        with self._lock:
            self._closed = True
            answers = list(self.answers)
        for answer in answers:
            answer.cancel()


def usage(prompt_tokens: int, generated: list[Generated]) -> dict[str, Any]:
    """Return the numbers of tokens of a request."""
    completion = sum(len(answer.tokens) + (answer.end_token is not None) for answer in generated)
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion, "total_tokens": prompt_tokens + completion,
    }  # fmt: skip

"""A request to the engine, what it asks for, and its answer."""

from __future__ import annotations

import math
import queue
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from budwood.errors import BudwoodError, InputError, describe
from budwood.model.decoding import Generated, Gumbel, TextWriter
from budwood.model.sampling import Sampling, is_number

if TYPE_CHECKING:
    from torch import Tensor

    from budwood.serving.loaded import Loaded


def check_weights(weights: Mapping[str, float]) -> None:
    """Check the weights of a blend.

    Raises:
        InputError: there are none, or one is not a finite number.
    """
    if not weights:
        raise InputError("adapters: names no adapter.")
    for name, weight in weights.items():
        if not is_number(weight) or not math.isfinite(weight):
            raise InputError(f"adapters: {weight!r} of '{str(name)[:64]}' is not a finite weight.")


class Answer:
    """The answer to one request, readable while it is generated, by one thread.

    Iterating yields pieces of the text, complete characters, as they become final.
    """

    def __init__(self, cancel: Callable[[Answer], None], listener: Callable[[str | None], None] | None = None) -> None:
        self._cancel, self._listener = cancel, listener
        self.cancelled = False
        self._events: queue.SimpleQueue[str | Generated | BaseException] = queue.SimpleQueue()
        self._end: Generated | BaseException | None = None
        self.row: weakref.ref[Row] | None = None

    def so_far(self) -> tuple[list[int], list[float], list[dict[int, float]]]:
        """Return copies of a row's tokens, and their log-probabilities if requested; empty once it has ended."""
        row = self.row() if self.row is not None else None
        if row is None:
            return [], [], []
        return list(row.writer.tokens), list(row.writer.log_probs), list(row.writer.top_log_probs)

    def __iter__(self) -> Iterator[str]:
        while (piece := self.next_piece()) is not None:
            yield piece

    def next_piece(self, timeout: float | None = None) -> str | None:
        """Return the next piece; None: the answer has ended.

        Raises:
            TimeoutError: there was none within `timeout` seconds.
            BudwoodError: the request failed.
        """
        if self._end is None:
            try:
                event = self._events.get(timeout=timeout)
            except queue.Empty as error:
                raise TimeoutError(f"no text within {timeout} s") from error
            if isinstance(event, str):
                return event
            self._end = event
        if isinstance(self._end, BaseException):
            raise self._end
        return None

    def result(self, timeout: float | None = None) -> Generated:
        """Return the whole answer; one that was cancelled ends where it was.

        Raises:
            TimeoutError: it did not end within `timeout` seconds.
            BudwoodError: the request failed.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while self.next_piece(None if end is None else max(0.0, end - time.monotonic())) is not None:
            pass
        assert isinstance(self._end, Generated)
        return self._end

    def cancel(self) -> None:
        """End the request before the next step; without effect if it has ended."""
        self.cancelled = True
        self._cancel(self)

    def put(self, event: str | Generated | BaseException) -> None:
        """Add an event; the engine's."""
        self._events.put(event)
        listener = self._listener
        if listener is not None:
            self._listener = None  # one that raises is not called again
            listener(event if isinstance(event, str) else None)
            self._listener = listener


@dataclass(eq=False)
class Twins:
    """Requests for several answers to one prompt, which one of them computes.

    Attributes:
        loaded: their adapter, known with the first of them.
        logits: those after the prompt [V], once computed.
    """

    loaded: Loaded | None = None
    logits: Tensor | None = None
    _known: bool = False

    def of(self, loaded: Loaded | None) -> Twins | None:
        """Return itself for the rows of one adapter; None for others: a name may move while requests are made."""
        if not self._known:
            self.loaded, self._known = loaded, True
        return self if loaded is self.loaded else None


@dataclass(eq=False)
class Row:
    """A request in the engine.

    Attributes:
        ids: the prompt's tokens, then those generated.
        prompt: number of tokens of the prompt.
        loaded: its adapter, which stays usable until the row ends; None: the base.
        kept: number of leading tokens whose keys and values are in the cache.
        namespace: what its cached prefixes are stored under.
        number: how many requests came before it.
        twins: those that ask for other answers to its prompt.
    """

    ids: list[int]
    prompt: int
    sampling: Sampling
    loaded: Loaded | None
    answer: Answer
    writer: TextWriter
    tenant: str = ""
    namespace: bytes = b""
    kept: int = 0
    number: int = 0
    twins: Twins | None = None
    noise: Gumbel | None = None

    def __post_init__(self) -> None:
        self.answer.row = weakref.ref(self)
        if not self.sampling.greedy:
            self.noise = Gumbel([self.sampling.seed])

    @property
    def todo(self) -> int:
        """Number of tokens to compute before the next one can be sampled."""
        return len(self.ids) - self.kept

    @property
    def new(self) -> bool:
        """Whether nothing of its answer is there yet."""
        return len(self.ids) == self.prompt

    def finish(self) -> None:
        """Send the result."""
        self.answer.put(self.writer.result())

    def fail(self, error: BaseException) -> None:
        """Send an error in place of a result."""
        if not isinstance(error, BudwoodError):
            cause, error = error, BudwoodError(f"the request failed: {describe(error)}.")
            error.__cause__ = cause
        self.answer.put(error)


class QueueFullError(BudwoodError):
    """As many requests wait as the engine lets; try again later."""

    exit_code = 3

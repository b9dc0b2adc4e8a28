"""A request to the engine, what it asks for, and its answer."""

from __future__ import annotations

import math
import queue
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from budwood.errors import BudwoodError, InputError
from budwood.model.decoding import Generated, Gumbel, TextWriter

if TYPE_CHECKING:
    from budwood.serving.loaded import Loaded


@dataclass(frozen=True)
class Sampling:
    """What a request asks for.

    Attributes:
        max_new_tokens: largest number of tokens of the answer.
        temperature: 0 selects the most probable token; above 0, tokens are sampled.
        top_p: sample from the smallest set of most probable tokens with at least this total probability.
        top_k: sample from this number of most probable tokens; 0: from all.
        seed: seed of the samples; any value that can be hashed. Equal requests with equal seeds get equal answers.
        stop: texts that end the answer; they are not part of it.
        stop_ids: tokens that end it, beside the end-of-sequence tokens.
        log_probs: return the log-probability of each token at the temperature (1 if greedy), over all tokens.
        top_log_probs: return those of so many most probable tokens too.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: Hashable = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    log_probs: bool = False
    top_log_probs: int = 0

    def check(self, vocabulary: int) -> None:
        """Refuse values out of range.

        Raises:
            InputError: the message names the field.
        """
        if not _is_int(self.max_new_tokens) or self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {self.max_new_tokens!r} is not a whole number of at least 1.")
        if not _is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature: {self.temperature!r} is not finite and at least 0.")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p!r} is not above 0 and at most 1.")
        if not _is_int(self.top_k) or self.top_k < 0:
            raise InputError(f"top_k: {self.top_k!r} is not a whole number of at least 0; use 0 for all tokens.")
        if not _is_int(self.top_log_probs) or not 0 <= self.top_log_probs <= vocabulary:
            raise InputError(f"top_log_probs: {self.top_log_probs!r} is not between 0 and {vocabulary}.")
        if isinstance(self.stop, str) or not all(isinstance(text, str) for text in self.stop):
            raise InputError("stop: must be a list of texts.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_weights(weights: Mapping[str, float]) -> None:
    """Check the weights of a blend.

    Raises:
        InputError: there are none, or one is not a finite number.
    """
    if not weights:
        raise InputError("adapters: names no adapter.")
    for name, weight in weights.items():
        if not _is_number(weight) or not math.isfinite(weight):
            raise InputError(f"adapters: {weight!r} of '{str(name)[:64]}' is not a finite weight.")


class Answer:
    """The answer to one request, readable while it is generated, by one thread.

    Iterating yields pieces of the text, complete characters, as they become final.
    """

    def __init__(self, cancel: Callable[[Answer], None], listener: Callable[[str | None], None] | None = None) -> None:
        self._cancel, self._listener = cancel, listener
        self._events: queue.SimpleQueue[str | Generated | BaseException] = queue.SimpleQueue()
        self._end: Generated | BaseException | None = None
        self.row: weakref.ref[Row] | None = None

    def so_far(self) -> tuple[list[int], list[float], list[dict[int, float]]]:
        """Return copies of a row's tokens, and their log-probabilities if requested; empty once it has ended."""
        row = self.row() if self.row is not None else None
        if row is None:
            return [], [], []
        return list(row.writer.tokens), list(row.writer.log_probs), list(row.top)

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
class Row:
    """A request in the engine.

    Attributes:
        ids: the prompt's tokens, then those generated.
        prompt: number of tokens of the prompt.
        loaded: its adapter, which stays usable until the row ends; None: the base.
        kept: number of leading tokens whose keys and values are in the cache.
        namespace: what its cached prefixes are stored under.
        number: how many requests came before it.
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
    noise: Gumbel | None = None
    top: list[dict[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answer.row = weakref.ref(self)
        if self.sampling.temperature > 0:
            self.noise = Gumbel([self.sampling.seed])

    @property
    def todo(self) -> int:
        """Number of tokens to compute before the next one can be sampled."""
        return len(self.ids) - self.kept

    def finish(self) -> None:
        """Send the result."""
        self.answer.put(self.writer.result(self.top))

    def fail(self, error: BaseException) -> None:
        """Send an error in place of a result."""
        self.answer.put(error)


class QueueFullError(BudwoodError):
    """As many requests wait as the engine lets; try again later."""

    exit_code = 3


class ContextFullError(InputError):
    """A prompt leaves no room for an answer in the base's context."""

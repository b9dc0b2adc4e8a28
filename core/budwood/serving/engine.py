"""The live engine: one thread owns a model and its adapters; any number of threads ask it.

Everything that touches the model is a command, carried out by that thread between two steps. A step computes the next
token of every row in flight, and part of the prompts of those that joined; rows join and leave at any step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from budwood.adapters.live_table import STACK_BYTES, LiveTable
from budwood.adapters.store import SavedAdapter
from budwood.errors import InputError, did_you_mean
from budwood.model.base import Base
from budwood.model.decoding import TextWriter, end_tokens
from budwood.model.limits import answer_limit, check_tokens, embeddings_of, positions_of
from budwood.model.quantizers.room import keep_dequantized
from budwood.serving.kv import available
from budwood.serving.loaded import Loaded, Loader
from budwood.serving.prefix import PrefixCache, namespace
from budwood.serving.requests import Answer, QueueFullError, Row, Sampling, Twins, check_weights
from budwood.serving.residents import Residents, Wait
from budwood.serving.scheduler import Scheduler
from budwood.serving.stats import Stats, stats_of
from budwood.serving.thread import CommandThread
from budwood.untrusted.files import check_name

Result = TypeVar("Result")


class Engine:
    """A model, its adapters, and the thread that owns both.

    A name is an alias of an adapter's content: it can be moved while requests are in flight, which end on what they
    began with. An adapter leaves the memory with the last request that uses it.
    """

    def __init__(
        self,
        base: Base,
        task: str = "causal-lm",
        *,
        max_rows: int = 32,
        step_tokens: int | None = None,
        kv_bytes: int | None = None,
        stack_bytes: int = STACK_BYTES,
        prefix_bytes: int = 0,
        adapter_bytes: int | None = None,
        max_waiting: int | None = None,
    ) -> None:
        """Take over a base, which nothing else may use from then on.

        Args:
            base: a loaded base.
            task: name of the task that the adapters were trained for.
            max_rows: largest number of rows that are computed at once.
            step_tokens: largest number of tokens of prompts in a step; None: 256 on the CPU, otherwise 2048.
            kv_bytes: memory for keys and values; None: a quarter of what is available.
            stack_bytes: memory for copies of adapters that share decoding steps.
            prefix_bytes: memory for the keys and values of prompts, for later prompts that begin alike; 0: none.
            adapter_bytes: memory for adapters: those unused for the longest leave it, and are read from their folders
                again for the next request; None: no limit.
            max_waiting: largest number of requests that wait for a row; None: no limit.
        """
        self.base, self.task = base, task
        self.model: Any = base.model.eval().requires_grad_(False)
        self.tokenizer = base.tokenizer
        device = torch.device(base.device)
        keep_dequantized(self.model, available(device), base.dtype)  # before the table, which calls their forward
        self.table = LiveTable(self.model, stack_bytes)
        self.loader = Loader(base, task, self.table)
        self.names: dict[str, Loaded] = {}
        self.default: Loaded | None = None
        self.max_waiting = max_waiting
        self.residents = Residents(self, self.loader, adapter_bytes)
        self.switching = threading.Lock()  # held to change `default`, and to let an adapter leave
        self._context = positions_of(self.model)
        kv_bytes = available(device) // 4 if kv_bytes is None else kv_bytes
        step_tokens = step_tokens or (256 if device.type == "cpu" else 2048)
        self.prefixes = PrefixCache(prefix_bytes)
        self.scheduler = Scheduler(self, max_rows, step_tokens, kv_bytes)
        self.thread = CommandThread(self, self.table.close)

    def step(self) -> bool:
        """Compute the next token of every row; return whether there is more to do. The thread's."""
        return self.scheduler.step()

    # For any thread.

    def call(self, function: Callable[[], Result]) -> Result:
        """Run a function on the engine's thread between two steps, and return its result or raise its error."""
        return self.thread.call(function)

    def load(
        self, name: str, directory: str | Path, *, allow_other_base: bool = False, pinned: bool = False
    ) -> SavedAdapter:
        """Load an adapter under a new name. See `AdapterPool.load`."""
        check_name(name)
        self._check_new(name)
        saved = self.loader.read(directory, allow_other_base)

        def add() -> SavedAdapter:
            self._check_new(name)
            loaded = self.loader.add(name, saved)
            loaded.allow_other_base, loaded.pinned = allow_other_base, pinned
            self.residents.enter(loaded)
            self.residents.hold(loaded)
            self.names[name] = loaded
            assert loaded.saved is not None
            return loaded.saved

        return self.call(add)

    def _check_new(self, name: str) -> None:
        if name in self.names:
            raise InputError(f"adapter '{name}' is already loaded: unload it first, or choose another name.")

    def unload(self, name: str) -> None:
        """Remove a name; its adapter leaves the memory once no request and no other name uses it.

        Raises:
            InputError: no adapter has this name.
            PluginError: the adapter's owner left modules on the model.
        """

        def remove() -> None:
            with self.switching:
                loaded = self.find(name)
                del self.names[name]
            if self.default is loaded:
                self.set_default(None)
            self.residents.release(loaded)

        self.call(remove)

    def alias(self, name: str, target: str) -> None:
        """Let a name, new or taken, stand for the adapter that `target` stands for.

        Raises:
            InputError: the name is invalid, or no adapter is called `target`.
        """
        check_name(name)

        def move() -> None:
            loaded, old = self.find(target), self.names.get(name)
            if old is not None and old is self.default:
                self.residents.fetch(loaded)
            with self.switching:
                self.residents.hold(loaded)
                self.names[name] = loaded
                orphan = old is not None and old is self.default and old not in self.names.values()
            if orphan:
                self.set_default(loaded)
            if old is not None:
                self.residents.release(old)

        self.call(move)

    def merge(self, name: str) -> None:
        """Merge an adapter into the base's weights, and remove its name. See `AdapterPool.merge`."""
        loaded = self.find(name)

        def merge() -> None:
            if self.find(name) is not loaded or len(self.names) > 1:
                raise InputError(f"other adapters are loaded: unload them before merging '{name}'.")
            if self.scheduler.rows or self.scheduler.queued or self.residents.requests[loaded]:
                raise InputError(f"requests are in flight: wait for their answers before merging '{name}'.")
            self.loader.merge(loaded)
            del self.names[name]
            self.residents.order.pop(loaded)
            self.residents.release(loaded)
            self.prefixes.clear()  # they are the unmerged base's
            self.scheduler.forward.forget_plans()

        self._with([loaded], merge)

    def use(self, name: str | None) -> None:
        """Let an adapter, or the base, compute forward passes of the model outside of requests."""
        with self.switching:
            loaded = None if name is None else self.find(name)
            memory = None if loaded is None else loaded.memory
            if self.loader.selected is None and (loaded is None or (memory is not None and memory.attached is None)):
                self._point_to(loaded)  # two assignments, which no step reads
                return

        self._with(  # by then the name may have moved, or be gone
            [] if loaded is None else [loaded], lambda: self.set_default(None if name is None else self.find(name))
        )

    def with_adapter(self, name: str | None, function: Callable[[], Result]) -> Result:
        """Run a function on the engine's thread, with one adapter, or the base, computing the model's forward."""
        loaded = None if name is None else self.find(name)

        def run() -> Result:
            self.loader.select(loaded)
            self.table.plan = self.table.base if loaded is None else loaded.plan
            try:
                return function()
            finally:
                self.table.plan = None
                self.loader.select(self.default)

        return self._with([] if loaded is None else [loaded], run)

    def _with(self, adapters: list[Loaded], function: Callable[[], Result]) -> Result:
        """Run a function on the engine's thread once adapters are in memory."""
        if self.thread.current is threading.current_thread():
            for loaded in adapters:
                self.residents.fetch(loaded)
            return function()
        future: Future[Result] = Future()

        def ready(error: BaseException | None) -> None:
            try:
                if error is not None:
                    raise error
                future.set_result(function())
            except BaseException as problem:
                future.set_exception(problem)

        self.thread.post(lambda: self.residents.want(Wait(adapters, ready)))
        return future.result()

    def submit(
        self,
        prompt: Sequence[int],
        adapter: str | Mapping[str, float] | None = None,
        sampling: Sampling | None = None,
        *,
        tenant: str = "",
        template: str = "",
        stream: bool = True,
        listener: Callable[[str | None], None] | None = None,
        where: str = "prompt",
        twins: Twins | None = None,
    ) -> Answer:
        """Ask for the continuation of a prompt; returns at once.

        Args:
            prompt: token ids.
            adapter: name of an adapter, weights of several whose sum answers, or None for the base.
            sampling: what is asked for.
            tenant: who asks; tenants take turns, and share no cached prefixes.
            template: what rendered the prompt; likewise.
            stream: whether the answer yields pieces of its text.
            listener: called on the engine's thread with each piece, and with None at the end; it must not block.
            where: what messages call the prompt.
            twins: requests of the same prompt and adapter that are given the same object share its computation.

        Raises:
            InputError: an unknown adapter, a token id without an embedding, an empty prompt, or an option out of range.
            ContextFullError: the prompt fills the context.
            QueueFullError: as many requests wait as `max_waiting` lets.
        """
        sampling = sampling or Sampling()
        if not self.model.can_generate():
            raise InputError(f"the pool's task is {self.task}, which generates no text.")
        if self.max_waiting is not None and self.scheduler.waiting + self.thread.waiting >= self.max_waiting:
            raise QueueFullError(f"{self.max_waiting} requests wait already: try again later.")
        self._parts(adapter)
        ids, weights = list(prompt), [*map(float, adapter.values())] if isinstance(adapter, Mapping) else []
        sampling.check(self.check_tokens(ids, adapter if isinstance(adapter, str) else None, where))
        limit = answer_limit(len(ids), sampling.max_new_tokens, self._context, where)
        ends, stop = end_tokens(self.model, self.tokenizer, sampling.stop)
        ends |= dict.fromkeys(sampling.stop_ids, "eos")
        answer = Answer(self._cancel, listener)
        send = (lambda _, piece: answer.put(piece)) if stream or listener is not None else None
        writer = TextWriter(self.tokenizer, limit, ends, stop, 0, send)
        row = Row(ids, len(ids), sampling, None, answer, writer, tenant)

        def join(error: BaseException | None = None) -> None:
            try:
                if error is not None:
                    raise error
                if parts:
                    row.loaded = self.residents.blend(parts) if weights else parts[0][0]
                if row.loaded is not None:
                    if row.loaded.quarantined:
                        raise InputError(row.loaded.quarantined)
                    self.residents.hold(row.loaded, request=True)
                identity = "" if row.loaded is None else row.loaded.identity
                row.namespace = namespace(identity, tenant, template)
                row.twins = None if twins is None else twins.of(row.loaded)
            except BaseException as problem:
                row.fail(problem)
            else:
                self.scheduler.add(row)

        parts: list[tuple[Loaded, float]] = []

        def ask() -> None:
            try:
                parts[:] = zip(self._parts(adapter), weights or [1.0], strict=False)
                room = self.residents.room_of(parts) if weights else 0
            except BaseException as error:
                row.fail(error)
            else:
                self.residents.want(Wait([loaded for loaded, _ in parts], join, room, row))

        self.thread.post(ask)
        return answer

    def samples(
        self,
        count: int,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        listener: Callable[[int, str | None], None] | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Ask for several answers to a prompt, which is computed once; number i has the seed (sampling.seed, i).

        Args:
            listener: called as that of `submit`, with the number of the answer first.
            options: see `submit`.
        """
        twins, answers = Twins(), []
        try:
            for number in range(count):
                own = None if listener is None else partial(listener, number)
                seeded = replace(sampling, seed=(sampling.seed, number))
                answers.append(self.submit(prompt, sampling=seeded, twins=twins, listener=own, **options))
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        return answers

    def stats(self) -> Stats:
        """Return the state of the engine; at once, also in the middle of a step."""
        return stats_of(self)

    def find(self, name: str) -> Loaded:
        """Return the adapter of a name.

        Raises:
            InputError: no adapter has this name.
        """
        if name not in self.names:
            known = ", ".join(self.names) or "none"
            raise InputError(
                f"no adapter '{name[:64]}' is loaded.{did_you_mean(name, list(self.names))} Loaded: {known}."
            )
        return self.names[name]

    # For the engine's thread.

    def set_default(self, loaded: Loaded | None) -> None:
        """Let an adapter, or the base, compute forward passes outside of requests."""
        if loaded is not None:
            self.residents.fetch(loaded)
        with self.switching:
            self._point_to(loaded)
        self.loader.select(loaded)

    def _point_to(self, loaded: Loaded | None) -> None:
        self.default = loaded
        self.table.default = self.table.base if loaded is None else loaded.plan

    def _parts(self, adapter: str | Mapping[str, float] | None) -> list[Loaded]:
        """Return the adapters that answer a request.

        Raises:
            InputError: one is unknown or quarantined, or a blend of them is not possible.
        """
        if isinstance(adapter, Mapping):
            check_weights(adapter)
        parts = [self.find(name) for name in ([adapter] if isinstance(adapter, str) else adapter or ())]
        for loaded in parts:
            if loaded.quarantined:
                raise InputError(loaded.quarantined)
            if loaded.unblendable and isinstance(adapter, Mapping):
                raise InputError(f"adapters: {loaded.unblendable}, so it cannot be blended.")
        return parts

    def _cancel(self, answer: Answer) -> None:
        self.thread.post(lambda: self.scheduler.cancel(answer))

    def check_tokens(self, prompt: Sequence[int], adapter: str | None, where: str) -> int:
        """Check that the model, with an adapter that may bring rows for new tokens, has an embedding of every token.

        Returns:
            The number of embeddings.

        Raises:
            InputError: there is no such adapter, or a value is not a token id; the message names it.
        """
        count = embeddings_of(self.model) or 0
        if adapter is not None:
            count = max(count, self.find(adapter).embeddings)
        check_tokens(prompt, count, self.tokenizer, self.base.name, where)
        return count

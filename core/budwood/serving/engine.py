"""The live engine: one thread owns a model and its adapters; any number of threads ask it.

Everything that touches the model is a command, carried out by that thread between two steps. A step computes the next
token of every row in flight, and part of the prompts of those that joined; rows join and leave at any step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from budwood.adapters.live_table import STACK_BYTES, LiveTable
from budwood.adapters.store import SavedAdapter
from budwood.errors import InputError, did_you_mean
from budwood.model.base import Base
from budwood.model.decoding import TextWriter, end_tokens
from budwood.model.limits import embeddings_of, no_embedding, positions_of
from budwood.serving.loaded import Loaded, Loader
from budwood.serving.prefix import PrefixCache, namespace
from budwood.serving.requests import Answer, ContextFullError, QueueFullError, Row, Sampling, check_weights
from budwood.serving.scheduler import Scheduler
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
            max_waiting: largest number of requests that wait for a row; None: no limit.
        """
        self.base, self.task = base, task
        self.model: Any = base.model.eval().requires_grad_(False)
        self.tokenizer = base.tokenizer
        device = torch.device(base.device)
        self.table = LiveTable(self.model, stack_bytes)
        self.loader = Loader(base, task, self.table)
        self.names: dict[str, Loaded] = {}
        self.default: Loaded | None = None
        self.max_waiting = max_waiting
        self._uses: dict[Loaded, int] = {}
        self._blends: dict[tuple[tuple[str, float], ...], Loaded] = {}
        self._context = positions_of(self.model)
        kv_bytes = _available(device) // 4 if kv_bytes is None else kv_bytes
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

    def load(self, name: str, directory: str | Path, *, allow_other_base: bool = False) -> SavedAdapter:
        """Load an adapter under a new name. See `AdapterPool.load`."""
        check_name(name)
        if name in self.names:
            raise InputError(f"adapter '{name}' is already loaded: unload it first, or choose another name.")
        saved = self.loader.read(directory, allow_other_base)

        def add() -> SavedAdapter:
            if name in self.names:
                raise InputError(f"adapter '{name}' is already loaded: unload it first, or choose another name.")
            self.names[name] = loaded = self.loader.add(name, saved)
            self._uses[loaded] = 1
            assert loaded.saved is not None
            return loaded.saved

        return self.call(add)

    def unload(self, name: str) -> None:
        """Remove a name; its adapter leaves the memory once no request and no other name uses it.

        Raises:
            InputError: no adapter has this name.
            PluginError: the adapter's owner left modules on the model.
        """

        def remove() -> None:
            self.find(name)
            if self.default is self.names[name]:
                self._set_default(None)
            self.release(self.names.pop(name))

        self.call(remove)

    def alias(self, name: str, target: str) -> None:
        """Let a name, new or taken, stand for the adapter that `target` stands for.

        Raises:
            InputError: the name is invalid, or no adapter is called `target`.
        """
        check_name(name)

        def move() -> None:
            loaded, old = self.find(target), self.names.get(name)
            self.hold(loaded)
            self.names[name] = loaded
            if old is not None:
                if self.default is old and old not in self.names.values():
                    self._set_default(loaded)
                self.release(old)

        self.call(move)

    def merge(self, name: str) -> None:
        """Merge an adapter into the base's weights, and remove its name. See `AdapterPool.merge`."""

        def merge() -> None:
            if self.scheduler.rows or self.scheduler.waiting:
                raise InputError(f"requests are in flight: wait for their answers before merging '{name}'.")
            self.loader.merge(self.find(name))
            loaded = self.names.pop(name)
            del self._uses[loaded]
            self.prefixes.clear()  # they are the unmerged base's
            self.scheduler.forward.forget_plans()

        self.call(merge)

    def use(self, name: str | None) -> None:
        """Let an adapter, or the base, compute forward passes of the model outside of requests."""
        loaded = None if name is None else self.find(name)
        if self.loader.selected is None and (loaded is None or loaded.attached is None):
            self.default = loaded  # two assignments, which no step reads
            self.table.default = self.table.base if loaded is None else loaded.plan
        else:
            self.call(lambda: self._set_default(loaded))

    def with_adapter(self, name: str | None, function: Callable[[], Result]) -> Result:
        """Run a function on the engine's thread, with one adapter, or the base, computing the model's forward."""

        def run() -> Result:
            loaded = None if name is None else self.find(name)
            self.loader.select(loaded)
            self.table.plan = self.table.base if loaded is None else loaded.plan
            try:
                return function()
            finally:
                self.table.plan = None
                self.loader.select(self.default)

        return self.call(run)

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
        if isinstance(adapter, Mapping):
            check_weights(adapter)
        loaded = self.find(adapter) if isinstance(adapter, str) else None
        ids = list(prompt)
        sampling.check(self.check_tokens(ids, adapter if isinstance(adapter, str) else None, where))
        if not ids:
            raise InputError(f"{where} is empty.")
        if self._context is not None and len(ids) >= self._context:
            raise ContextFullError(
                f"{where} has {len(ids)} tokens; the base's context holds {self._context} with the answer."
            )
        ends, stop = end_tokens(self.model, self.tokenizer, sampling.stop)
        ends |= dict.fromkeys(sampling.stop_ids, "eos")
        limit = min(sampling.max_new_tokens, (self._context or len(ids) + sampling.max_new_tokens) - len(ids))
        answer = Answer(self._cancel, listener)
        send = (lambda _, piece: answer.put(piece)) if stream or listener is not None else None
        writer = TextWriter(self.tokenizer, limit, ends, stop, 0, send)
        row = Row(ids, len(ids), sampling, loaded, answer, writer, tenant)

        def join() -> None:
            try:
                row.loaded = self._blend(adapter) if isinstance(adapter, Mapping) else self._current(adapter)
                if row.loaded is not None:
                    if row.loaded.quarantined:
                        raise InputError(row.loaded.quarantined)
                    self.hold(row.loaded)
                identity = "" if row.loaded is None else row.loaded.identity
                row.namespace = namespace(identity, tenant, template)
            except BaseException as error:
                row.fail(error)
            else:
                self.scheduler.add(row)

        self.thread.post(join)
        return answer

    def samples(self, count: int, prompt: Sequence[int], sampling: Sampling, **options: Any) -> list[Answer]:
        """Ask for several answers to a prompt; number i has the seed (sampling.seed, i). See `submit`."""
        return [
            self.submit(prompt, sampling=replace(sampling, seed=(sampling.seed, number)), **options)
            for number in range(count)
        ]

    # For the engine's thread.

    def find(self, name: str) -> Loaded:
        """Return the adapter of a name.

        Raises:
            InputError: no adapter has this name.
        """
        if name not in self.names:
            known = ", ".join(self.names) or "none"
            raise InputError(f"no adapter '{name[:64]}' is loaded.{did_you_mean(name, self.names)} Loaded: {known}.")
        return self.names[name]

    def hold(self, loaded: Loaded) -> None:
        """Count a use of an adapter."""
        self._uses[loaded] = self._uses.get(loaded, 0) + 1

    def release(self, loaded: Loaded) -> None:
        """End a use of an adapter; with the last one it leaves the memory."""
        self._uses[loaded] -= 1
        if self._uses[loaded]:
            return
        del self._uses[loaded]
        self._blends = {key: blend for key, blend in self._blends.items() if blend is not loaded}
        self.scheduler.forward.forget_plans()
        self.loader.remove(loaded)
        for part in loaded.parts:
            self.release(part)

    def _set_default(self, loaded: Loaded | None) -> None:
        self.default = loaded
        self.table.default = self.table.base if loaded is None else loaded.plan
        self.loader.select(loaded)

    def _current(self, adapter: str | None) -> Loaded | None:
        return None if adapter is None else self.find(adapter)

    def _blend(self, weights: Mapping[str, float]) -> Loaded:
        parts = [(self.find(name), float(weight)) for name, weight in weights.items()]
        key = tuple(sorted((loaded.identity, weight) for loaded, weight in parts))
        if key not in self._blends:
            made = self._blends[key] = self.loader.blend(parts)
            self._uses[made] = 0
            for loaded, _ in parts:
                self.hold(loaded)
        return self._blends[key]

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
            modules = self.find(adapter).live.modules.values()
            count = max([count, *(getattr(module, "num_embeddings", 0) for module in modules)])
        for token in prompt:
            if type(token) is int and token >= count:
                raise InputError(f"{where} uses {no_embedding(token, count, self.tokenizer, self.base.name)}")
            if type(token) is not int or token < 0:
                raise InputError(
                    f"{where}: {token!r} is not a token id of the base '{self.base.name}', which are 0 to {count - 1}."
                )
        return count


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)

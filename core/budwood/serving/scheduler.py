"""Which rows a step computes: who joins, who leaves, who waits for memory, and who fails."""

from __future__ import annotations

import time
import traceback
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from budwood.adapters.live_rows import UnmixableError
from budwood.errors import BUG, BudwoodError, InputError, ResourceError, describe, is_out_of_memory
from budwood.model.streaming import release_memory
from budwood.serving.fixed import answer_in_batches
from budwood.serving.forward import Forward
from budwood.serving.prefix import BLOCK
from budwood.serving.requests import Answer, Row
from budwood.serving.sampling import choose
from budwood.serving.stats import BLEND

if TYPE_CHECKING:
    from budwood.serving.engine import Engine
    from budwood.serving.loaded import Loaded

PADDING = 0.75
"""Prompts share a pass if the shortest has at least this share of the longest's tokens."""


class Scheduler:
    """The rows of an engine. Rows whose prompts are computed come first, so that decoding reads the first slots.

    Attributes:
        rows: the rows in flight; row i is in slot i of the cache.
        unsupported: why the base's rows are answered in fixed batches; None: they join and leave at any step.
        steps: number of steps so far.
        preempted: number of rows that had to make room, and were computed again.
        quarantines: number of adapters that were quarantined.
        tokens: numbers of tokens of prompts and of answers, by the adapter's identity and the tenant.
        began: when the step in progress began, in seconds of the monotonic clock; None: none is.
    """

    def __init__(self, engine: Engine, max_rows: int, step_tokens: int, kv_bytes: int) -> None:
        self.engine: Engine = weakref.proxy(engine)  # which would otherwise, and with it the model, end late
        self.max_rows, self.step_tokens = max_rows, step_tokens
        self.forward = Forward(engine.model, engine.table, kv_bytes)
        self.rows: list[Row] = []
        self.steps = self.preempted = self.quarantines = self._count = 0
        self.tokens: dict[tuple[str, str], tuple[int, int]] = {}
        self.began: float | None = None
        self.unsupported: str | None = None
        self._checked = self._unmixable = False
        self._queues: OrderedDict[str, deque[Row]] = OrderedDict()  # by tenant, the next in turn first

    @property
    def queued(self) -> int:
        """Number of requests that wait for a row."""
        return sum(map(len, list(self._queues.values())))

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a row, or for an adapter."""
        return self.queued + len(self.engine.residents.waits)

    def add(self, row: Row, first: bool = False) -> None:
        """Let a row wait for its turn."""
        if not first:
            row.number = self._count = self._count + 1
        waiting = self._queues.setdefault(row.tenant, deque())
        if first:
            waiting.appendleft(row)
            self._queues.move_to_end(row.tenant, last=False)
        else:
            waiting.append(row)

    def cancel(self, answer: Answer) -> None:
        """End a request, waiting or in flight; its slot is free for the next step."""
        if (row := self.engine.residents.cancel(answer)) is not None:
            self.end(row, row.writer.cancel)
            return
        for tenant, waiting in self._queues.items():
            for row in waiting:
                if row.answer is answer:
                    waiting.remove(row)
                    if not waiting:
                        del self._queues[tenant]
                    self.end(row, row.writer.cancel)
                    return
        for row in self.rows:
            if row.answer is answer:
                self._leave(row)
                self.end(row, row.writer.cancel)
                return

    def step(self) -> bool:
        """Compute the next token of every row, and parts of prompts; return whether there is more to do."""
        if not self.rows and not self.queued:
            return False
        self.began = time.monotonic()
        try:
            with torch.no_grad(), self.engine.base.autocast():
                if not self._checked:
                    self.engine.loader.select(None)
                    self.unsupported, self._checked = self.forward.unsupported(), True
                if self.unsupported is not None:
                    queue = [row for rows in self._queues.values() for row in rows]
                    self._queues.clear()
                    answer_in_batches(self.engine, queue)
                else:
                    self._admit()
                    decoding = [row for row in self.rows if row.todo == 1 and row.kept]
                    self._compute(decoding, 1)
                    self._prefill(self.step_tokens - len(decoding))
        except BaseException as problem:  # a bug: no row may wait for ever
            error = BudwoodError(f"the engine failed: {describe(problem)}. {BUG}")
            error.__cause__ = problem
            for row in [*self.rows, *(row for rows in self._queues.values() for row in rows)]:
                self.end(row, None, error)
            self.rows.clear()
            self._queues.clear()
            self.forward.cache.free()
        self.steps += 1
        self.began = None
        if not self.rows and not self.queued:
            self.forward.cache.free()
            self.engine.loader.select(self.engine.default)
            return False
        return True

    def count(self, row: Row, prompt: int, answer: int) -> None:
        """Count tokens of a request."""
        key = ("" if row.loaded is None else BLEND if row.loaded.parts else row.loaded.identity), row.tenant
        before = self.tokens.get(key, (0, 0))
        self.tokens[key] = before[0] + prompt, before[1] + answer

    # Joining and leaving.

    def _admit(self) -> None:
        """Let waiting rows join, tenants in turn, while there is memory for them."""
        while len(self.rows) < self.max_rows and (tenant := next(iter(self._queues), None)) is not None:
            row = self._queues[tenant][0]
            if self.rows and not self.forward.cache.fits(
                len(self.rows) + 1, max(len(r.ids) for r in (*self.rows, row)) + BLOCK
            ):
                return
            self._queues[tenant].popleft()
            if self._queues[tenant]:
                self._queues.move_to_end(tenant)
            else:
                del self._queues[tenant]
            self.rows.append(row)
            try:
                if row.twins is None or not row.new or not self._continue_twins(row):
                    self._reuse(row, len(self.rows) - 1)
            except Exception:  # a lack of memory, for one
                release_memory()
                row.kept = 0

    def _continue_twins(self, row: Row) -> bool:
        """Let a new row, and others like it, begin with the prompt of a twin in flight; return whether there is one."""
        twin = next((r for r in self.rows if r.twins is row.twins and r.kept >= row.prompt), None)
        if twin is None or row.twins is None or row.twins.logits is None:
            return False
        logits = row.twins.logits
        for other in self._copy_to_twins(twin):
            self._take(other, logits, int(logits.argmax(-1)))
        return True

    def _copy_to_twins(self, done: Row) -> list[Row]:
        """Copy the keys and values of a prompt to the slots of new twins, and return these."""
        new = [row for row in self.rows if row.twins is done.twins and row.new and row.kept < row.prompt]
        if new:
            self.forward.cache.reserve(len(self.rows), done.prompt)
        for row in new:
            self.forward.cache.move(self.rows.index(done), self.rows.index(row), done.prompt)
        for row in new:  # all, or none if one fails
            row.kept = row.prompt
        return new

    def _reuse(self, row: Row, slot: int) -> None:
        """Copy what is kept of a row's beginning to its slot."""
        cache, blocks = self.forward.cache, self.engine.prefixes.find(row.namespace, row.ids)
        if not blocks:
            return
        cache.reserve(slot + 1, len(row.ids))
        for number, block in enumerate(blocks):
            cache.write(slot, number * BLOCK, block)
        row.kept = len(blocks) * BLOCK

    def _keep(self, row: Row, slot: int) -> None:
        """Keep the blocks of a prompt that was just computed."""
        prefixes = self.engine.prefixes
        try:
            for start, key in prefixes.missing(row.namespace, row.ids[: row.prompt]):
                prefixes.add(key, self.forward.cache.read(slot, start, start + BLOCK))
        except Exception:  # a lack of memory, for one: a prompt that is not kept does no harm
            prefixes.clear()
            release_memory()

    def _leave(self, row: Row) -> None:
        """Free a row's slot; rows that are decoded stay in the first slots."""
        rows, hole = list(self.rows), self.rows.index(row)
        decoding = sum(r.todo == 1 and r.kept > 0 for r in rows)
        for edge in (decoding - 1, len(rows) - 1):
            if hole < edge:
                rows[hole] = rows[edge]
                self.forward.cache.move(edge, hole, rows[hole].kept)
                hole = edge
        del rows[hole]
        self.rows = rows

    def end(self, row: Row, last: Callable[[], None] | None, error: BaseException | None = None) -> None:
        """Send the result or the error of a row that is in no list any more, and release its adapter."""
        try:
            if last is not None:
                last()
            row.finish() if error is None else row.fail(error)
        except BaseException as problem:  # a row that never ends would be waited for
            row.fail(problem)
        if row.loaded is not None:
            try:
                self.engine.residents.release(row.loaded, request=True)
            except Exception:  # of an owner that detaches its adapter; nobody waits for it
                traceback.print_exc()

    # Computing.

    def _prefill(self, budget: int) -> None:
        """Compute up to `budget` tokens of prompts, those of several rows in one pass if their lengths are alike."""
        rows, computing = [], set()
        for row in self.rows:
            if row.todo > 1 or not row.kept:
                if row.twins is None or not row.new or row.twins not in computing:  # which it waits for
                    rows.append(row)
                if row.twins is not None:
                    computing.add(row.twins)
        first = True
        while rows and (budget > 0 or first):
            count, start = rows[0].todo, rows[0].kept
            group = [rows.pop(0)]
            if start or count > budget:
                count = min(count, max(budget, 1) if not first else max(budget, BLOCK))
            else:
                while rows and not rows[0].kept and self._alike(group, rows[0], budget):
                    group.append(rows.pop(0))
                count = max(row.todo for row in group)
            # Rows of one adapter are neighbours, so that it computes them as one part of the batch.
            order: dict[object, int] = {}
            for row in group:
                order.setdefault(row.loaded, len(order))
            group.sort(key=lambda row: order[row.loaded])
            self._compute(group, count)
            budget -= count * len(group)
            first = False

    def _alike(self, group: list[Row], row: Row, budget: int) -> bool:
        lengths = [r.todo for r in (*group, row)]
        return max(lengths) * len(lengths) <= budget and min(lengths) >= PADDING * max(lengths)

    def _compute(self, rows: list[Row], count: int) -> None:
        """Compute the next `count` tokens of rows, and sample after those that are complete.

        An exception is traced to its row by halving, and that row alone fails. A lack of memory makes the youngest row
        wait. Rows with attached adapters, and those that a module cannot tell apart, are computed by adapter.
        """
        rows = [row for row in rows if row in self.rows]
        if not rows:
            return
        attached = {row.loaded for row in rows if row.loaded is not None and row.loaded.attached is not None}
        if self._unmixable and len(adapters := {row.loaded for row in rows}) > 1:
            self._by_adapter(rows, count, adapters)
            return
        if attached and len({row.loaded if row.loaded in attached else None for row in rows}) > 1:
            self._by_adapter(rows, count, attached)
            return
        kept = [row.kept for row in rows]
        try:
            if not self._make_room(rows, count):
                self._compute(rows, count)
                return
            self.engine.loader.select(rows[0].loaded if attached else None)
            slots = {id(row): slot for slot, row in enumerate(self.rows)}
            logits = self.forward.run(rows, [slots[id(row)] for row in rows], count)
            values, tokens = logits.max(-1)  # NaN is larger than any number here
            largest = torch.where(values.isfinite(), tokens, -1).tolist()  # one read of the device
            finite = [token >= 0 for token in largest]
            taken = [(row, logits[i], largest[i]) for i, row in enumerate(rows) if finite[i] and not row.todo]
            for row, after, token in list(taken):
                if row.twins is not None:
                    if row.new:
                        row.twins.logits = after.clone()
                    if row.twins.logits is not None:
                        taken += [(twin, row.twins.logits, token) for twin in self._copy_to_twins(row)]
        except Exception as error:
            for row, before in zip(rows, kept, strict=True):
                row.kept = before
            for row in self.rows:
                if not row.todo:  # a twin that got its prompt in vain
                    row.kept = 0
            self._recover(rows, count, error)
            return
        for i, row in enumerate(rows):
            if not finite[i]:
                self._reject(row)
        for row, after, token in taken:
            self._take(row, after, token)

    def _recover(self, rows: list[Row], count: int, error: Exception) -> None:
        adapters = {row.loaded for row in rows}
        if isinstance(error, UnmixableError) and len(adapters) > 1:
            self._unmixable = True
            self._by_adapter(rows, count, adapters)
        elif is_out_of_memory(error) and len(self.rows) > 1:
            release_memory()
            self._preempt()
            self._compute(rows, count)
        elif len(rows) > 1:
            middle = len(rows) // 2
            self._compute(rows[:middle], count)
            self._compute(rows[middle:], count)
        else:
            shown = error
            if not isinstance(error, BudwoodError):
                where = "" if rows[0].loaded is None else f"adapter '{rows[0].loaded.label}': "
                kind = ResourceError if is_out_of_memory(error) else BudwoodError
                shown = kind(f"{where}the request failed: {describe(error)}.")
                shown.__cause__ = error
            self._drop(rows[0], shown)

    def _by_adapter(self, rows: list[Row], count: int, adapters: set[Loaded | None] | set[Loaded]) -> None:
        """Compute the rows of each of these adapters by themselves, and the others together."""
        groups: dict[object, list[Row]] = {}
        for row in rows:
            groups.setdefault(row.loaded if row.loaded in adapters else None, []).append(row)
        for group in groups.values():
            self._compute(group, count)

    def _make_room(self, rows: list[Row], count: int) -> bool:
        """Return whether the cache can grow as far as a pass needs; if not, the youngest row waits again."""
        needed = max(row.kept for row in rows) + count
        if len(self.rows) == 1 or self.forward.cache.fits(len(self.rows), needed):
            return True
        self._preempt()
        return False

    def _preempt(self) -> None:
        """Let the youngest row wait again; its tokens stay, and their keys and values are computed again."""
        row = max(self.rows, key=lambda row: row.number)
        self._leave(row)
        row.kept = 0
        self.preempted += 1
        self.add(row, first=True)
        try:
            self.forward.cache.shrink(len(self.rows), max((r.kept for r in self.rows), default=0))
        except Exception:  # which takes memory itself: all are computed again
            self.forward.cache.free()
            for other in self.rows:
                other.kept = 0

    def _take(self, row: Row, logits: Tensor, largest: int) -> None:
        """Choose a row's next token after logits [V], which may end it."""
        first = row.new
        if first and self.engine.prefixes.budget:
            self._keep(row, self.rows.index(row))
        try:
            token, scores = choose(logits, largest, row)
            row.ids.append(token)
            self.count(row, row.prompt * first, 1)
            row.writer.add(token, *scores)
        except BaseException as problem:  # of a listener, or of the tokenizer
            self._drop(row, BudwoodError(f"the request failed: {describe(problem)}."))
            return
        if row.writer.reason is not None:
            row.kept = len(row.ids) - 1
            self._leave(row)
            self.end(row, None)

    def _reject(self, row: Row) -> None:
        """End a row whose logits are not finite, and let nothing use its adapter any more."""
        problem, loaded = "computes logits that are not finite", row.loaded
        if loaded is None:
            self._drop(row, ResourceError(f"the base {problem}: open it with precision fp32."))
            return
        self.quarantines += not loaded.quarantined
        loaded.quarantined = f"adapter '{loaded.label}' {problem}, so requests may not use it: load it again."
        self._drop(row, InputError(loaded.quarantined))

    def _drop(self, row: Row, error: Exception) -> None:
        """End a row with an error, and clear what it may have left in the cache: 0 times NaN is NaN, also in others'
        masked positions."""
        self._leave(row)
        try:
            self.forward.cache.clear([other.kept for other in self.rows])
        finally:
            self.end(row, None, error)

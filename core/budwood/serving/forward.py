"""Forward passes of rows in flight: the model's own forward, a slot cache, and the live table's plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from budwood.adapters.live_table import LiveTable, Plan
from budwood.adapters.live_update import LiveAdapter
from budwood.model.embeddings import head_of
from budwood.model.limits import positions_of
from budwood.serving.kv import Pass, RowCache

if TYPE_CHECKING:
    from budwood.serving.requests import Row

PLANS = 32
"""Number of plans that are kept for sets of rows that recur."""
ERROR = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest relative error of the check in `unsupported`; in 16 bit `HALF_ERROR`."""
HALF_ERROR = 0.1


class Forward:
    """Computes the next logits of rows.

    Attributes:
        cache: keys and values; row i of the engine's list is in slot i.
        context: largest number of positions; None: no limit.
    """

    def __init__(self, model: Any, table: LiveTable, kv_bytes: int) -> None:
        self.model, self.table = model, table
        config = model.config.get_text_config(decoder=True)
        self.cache = RowCache(config.num_hidden_layers, kv_bytes)
        self.context = positions_of(model)
        self.device = next(model.parameters()).device
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._stacked: Plan | None = None
        self._last: Tensor | None = None
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or (["sliding_attention"] if window else ["full_attention"])
        self._layers = set(kinds)
        limited = window is not None and (self.context is None or self.context > window)
        self._window: int | None = window if limited and "sliding_attention" in self._layers else None

    def forget_plans(self) -> None:
        """Drop all plans; those of an adapter that was unloaded would keep its tensors."""
        self._plans.clear()
        self._stacked = None

    def plan(self, adapters: Sequence[LiveAdapter | None], stacked: bool) -> Plan:
        """Return the plan for these rows, made before if their adapters are the same."""
        if len(set(adapters)) == 1:
            adapters, stacked = adapters[:1], False
        if stacked:  # one at a time: the next one may write to the slots of this one's stacks
            if self._stacked is None or self._stacked.rows != tuple(adapters):
                self._stacked = Plan(adapters, stacked=True)
            return self._stacked
        key = tuple(map(id, adapters))
        plan = self._plans.pop(key, None) or Plan(adapters)
        self._plans[key] = plan  # which also keeps the ids taken
        while len(self._plans) > PLANS:
            del self._plans[next(iter(self._plans))]
        return plan

    def run(self, rows: Sequence[Row], slots: list[int], count: int) -> Tensor:
        """Compute the next `count` tokens of each row (fewer for a row that has fewer, which must start at 0).

        Returns:
            The logits after each row's last token, [rows, V] fp32.

        Raises:
            UnmixableError: the rows' adapters cannot share a batch of this model.
        """
        adapters = [None if row.loaded is None else row.loaded.live for row in rows]
        tokens = [row.ids[row.kept : row.kept + count] for row in rows]
        plan = self.plan(adapters, stacked=count == 1)
        logits = self.logits(tokens, slots, [row.kept for row in rows], plan)
        for row, part in zip(rows, tokens, strict=True):
            row.kept += len(part)
        return logits

    def logits(self, tokens: list[list[int]], slots: list[int], starts: list[int], plan: Plan) -> Tensor:
        """Compute tokens of rows under a plan; see `run`."""
        count = max(map(len, tokens))
        ids = torch.tensor([[*part, *[0] * (count - len(part))] for part in tokens], device=self.device)
        now = self.cache.pass_over(slots, starts, list(map(len, tokens)), self.device)
        positions = now.at[:, None] + torch.arange(count, device=self.device) if count > 1 else now.at[:, None]
        self.cache.now = now
        self.table.plan = plan
        ragged = count > 1
        self._last = torch.tensor([len(part) - 1 for part in tokens], device=self.device) if ragged else None
        head: Any = head_of(self.model)
        hook = head.register_forward_pre_hook(self._last_positions)
        try:
            output = self.model(
                input_ids=ids, attention_mask=self._mask(now, positions), position_ids=positions,
                past_key_values=self.cache, use_cache=True,
            ).logits  # fmt: skip
        finally:
            hook.remove()
            self.table.plan = self.cache.now = None
        logits: Tensor = output[:, -1].float()
        return logits

    def _last_positions(self, module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give the head the last position of each row only, in memory of its own."""
        states = inputs[0]
        if self._last is None:
            return (states.contiguous(), *inputs[1:])
        rows = torch.arange(len(states), device=states.device)
        return (states[rows, self._last][:, None], *inputs[1:])

    def _mask(self, now: Pass, positions: Tensor) -> Tensor | dict[str, Tensor] | None:
        """Return which positions each token attends to; None: as the model has it.

        In a fresh pass padding is on the right, where only padding attends to it. Otherwise a mask is [rows, 1, tokens,
        width], and one by type of layer if these differ.
        """
        if now.fresh:
            return None
        places = torch.arange(now.width, device=self.device)
        seen = places <= positions[:, None, :, None]
        if self._window is None:
            return self._shaped(seen)
        near = self._shaped(seen & (places > positions[:, None, :, None] - self._window))
        if "full_attention" not in self._layers:
            return near
        return {"full_attention": self._shaped(seen), "sliding_attention": near}

    def _shaped(self, mask: Tensor) -> Tensor:
        config = self.model.config.get_text_config(decoder=True)
        if getattr(config, "_attn_implementation", None) != "eager":
            return mask
        return torch.zeros(mask.shape, device=self.device).masked_fill(~mask, torch.finfo(torch.float32).min)

    def unsupported(self) -> str | None:
        """Return why rows of this model cannot join and leave a batch, found by trying; None: they can.

        Two rows of different lengths are computed with the slot cache, and compared with the model's plain forward.
        """
        config = self.model.config.get_text_config(decoder=True)
        if getattr(self.model.config, "is_encoder_decoder", False) or getattr(self.model, "_is_stateful", False):
            return "it keeps a state that is not keys and values by position"
        other = self._layers - {"full_attention", "sliding_attention"}
        if other:
            return f"its layers have {' and '.join(sorted(other))}"
        head: Any = head_of(self.model)
        if head is None:
            return "it has no output embeddings"
        size = int(head.weight.shape[0])
        first, second = [size // 7, size // 5, size // 3, size // 2], [size // 9, size // 4, size // 6]
        shapes, window = self._watch(), self._window
        try:
            if window is not None:  # one that these rows exceed
                self._window = config.sliding_window = 2
            got = [self.logits([first[:3], second[:2]], [0, 1], [0, 0], shapes)]
            got.append(self.logits([first[3:], second[2:]], [0, 1], [3, 2], self.table.base))
            plain = [self._plain(first[:3]), self._plain(second[:2]), self._plain(first), self._plain(second)]
        except Exception as error:  # whatever a model raises at masks and caches that it does not know
            return f"its forward does not take this cache ({type(error).__name__})"
        finally:
            self.cache.free()
            if window is not None:
                self._window = config.sliding_window = window
        want = torch.stack(plain)
        change = float((torch.cat(got) - want).norm() / want.norm().clamp(min=1e-30))
        allowed = ERROR.get(next(self.model.parameters()).dtype, HALF_ERROR)
        return None if change <= allowed else f"its logits change by {change:.2g} if rows share a batch"

    def _plain(self, tokens: list[int]) -> Tensor:
        self.table.plan = self.table.base
        try:
            logits: Tensor = self.model(torch.tensor([tokens], device=self.device), use_cache=False).logits
        finally:
            self.table.plan = None
        return logits[0, -1].float()

    def _watch(self) -> Plan:
        """Return a plan of the base that records which modules do not get the batch's rows in their first dimension."""
        plan = Plan([None])
        for live in self.table.live.values():
            live.by_row = False

            def way(x: Tensor, *rest: Any, live: Any = live) -> Tensor:
                live.by_row = x.dim() >= 2 and x.shape[0] == 2 and x.shape[1] in (1, 3)
                y: Tensor = live.plain(x, *rest)
                return y

            plan.ways[live] = way
        return plan

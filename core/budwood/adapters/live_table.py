"""The table of adapters on a live model, and the forward of each of its modules for the rows of a batch.

Every linear of the base gets one `LiveModule` when the table opens. It stands in for the module's `forward`, so that
the module tree, the names and the weights stay the base's own. Loading an adapter adds entries to a table, and
switching sets one attribute; neither walks the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from budwood.adapters.live_experts import experts
from budwood.adapters.live_rows import Layout, Stacks, alone, mixed
from budwood.adapters.live_update import LiveAdapter
from budwood.adapters.targets import base_modules
from budwood.model.ops.group import Part
from budwood.model.quantizers import quantizer_of
from budwood.model.quantizers.experts import ExpertLinear

Way = Callable[..., Tensor]
STACK_BYTES = 1 << 30
"""Default budget of the stacks of adapters that share a decoding batch."""


class Plan:
    """The adapters of the rows of the next forward passes, and how each module computes them.

    Attributes:
        rows: the adapter of each row, None for the base; a single entry computes all rows of any batch.
        stacked: whether rows are computed from stacks of adapters, which pays when the same rows recur, as in decoding.
        ways: the forward of each module, filled at its first call; None: the base's own.
    """

    def __init__(self, rows: Sequence[LiveAdapter | None], stacked: bool = False) -> None:
        self.rows, self.stacked = tuple(rows), stacked
        self.ways: dict[LiveModule, Way | None] = {}
        self.layout = Layout(self.rows)

    @property
    def single(self) -> bool:
        """Whether the same adapter, or none, computes all rows."""
        return len(self.layout.distinct) == 1


class LiveModule:
    """The forward of one of the base's modules: the base's own, or with the adapters of the current plan."""

    def __init__(self, table: LiveTable, path: str, module: Any) -> None:
        self.table, self.path, self.module = table, path, module
        self.quantizer = quantizer_of(module)
        self.had = module.__dict__.get("forward")
        self.plain: Way = module.forward
        self.busy = False  # inside the base's product, for which a quantiser may call the module
        self.by_row = True  # False: the first dimension of its input is not that of the batch's rows

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.busy:
            return self.plain(*args, **kwargs)
        plan = self.table.plan or self.table.default
        try:
            way = plan.ways[self]
        except KeyError:
            way = plan.ways[self] = self._way(plan)
        return self.plain(*args, **kwargs) if way is None else way(*args, **kwargs)

    def _way(self, plan: Plan) -> Way | None:
        adapters = [adapter for adapter in plan.layout.distinct if adapter is not None and self.path in adapter.paths]
        if not adapters:
            return None
        if isinstance(self.module, ExpertLinear):
            return experts(self, plan.layout, adapters)
        if plan.single:
            return alone(self, adapters[0])
        return mixed(self, plan.layout, adapters, self.table.stacks if plan.stacked else None)

    def part(self) -> Part | None:
        """Return the linear and its update for the current plan; None: rows differ, or it is no product alone."""
        plan = self.table.plan or self.table.default
        if self.busy or self.had is not None or self.quantizer is None or not plan.single:
            return None
        adapter = plan.layout.distinct[0]
        if adapter is None:
            return Part(self.module)
        update, bias = adapter.updates.get(self.path), adapter.biases.get(self.path)
        if self.path in adapter.modules or not (update is None or update.is_product):
            return None
        if update is None:
            return Part(self.module, bias=bias)
        return Part(self.module, update.a, update.b, update.scaling, bias=bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return the base's forward of the module's copy: a copy has no adapters."""
        twin = memo.get(id(self.module))
        return type(self.module).forward.__get__(twin) if twin is not None else self


class LiveTable:
    """The adapters on a model.

    Attributes:
        model: the base.
        plan: the adapters of the rows of the current step; None outside of steps.
        default: the adapter of forward passes outside of steps.
        stacks: copies of adapters that share a decoding batch.
    """

    def __init__(self, model: nn.Module, stack_bytes: int = STACK_BYTES) -> None:
        self.model = model
        self.plan: Plan | None = None
        self.base = Plan([None])
        self.default = self.base
        self.stacks = Stacks(stack_bytes)
        self.places = {path: module for path, module in base_modules(model) if path}
        self.live: dict[str, LiveModule] = {}
        self._users: dict[str, int] = {}  # modules other than linears get a LiveModule while an adapter needs it
        self.open()

    def open(self) -> None:
        """Place a `LiveModule` on every linear, and on what loaded adapters replace."""
        for path, module in self.places.items():
            if path not in self.live and (quantizer_of(module) is not None or path in self._users):
                self._place(path)

    def add(self, adapter: LiveAdapter) -> None:
        """Make an adapter usable in plans.

        Raises:
            KeyError: the model has no module of one of its paths.
        """
        for path in adapter.paths:
            if path not in self.places:
                raise KeyError(path)
        for path in adapter.paths:
            if path not in self.live or path in self._users:
                self._users[path] = self._users.get(path, 0) + 1
                if path not in self.live:
                    self._place(path)

    def remove(self, adapter: LiveAdapter) -> None:
        """Drop an adapter; after the last one, only the linears have a `LiveModule`."""
        self.stacks.drop(adapter.key)
        if adapter in self.default.rows:
            self.default = self.base
        for path in adapter.paths & self._users.keys():
            self._users[path] -= 1
            if not self._users[path]:
                del self._users[path]
                self._restore(path)
        self.base.ways.clear()
        self.default.ways.clear()

    def close(self) -> None:
        """Give every module its own forward again."""
        for path in list(self.live):
            self._restore(path)
        self.base.ways.clear()
        self.default.ways.clear()

    def _place(self, path: str) -> None:
        module = self.places[path]
        live = self.live[path] = LiveModule(self, path, module)
        module.__dict__["forward"] = live  # bypasses nn.Module: no part of the model

    def _restore(self, path: str) -> None:
        live = self.live.pop(path)
        if live.had is None:
            live.module.__dict__.pop("forward", None)
        else:
            live.module.__dict__["forward"] = live.had

"""What each of a run's processes holds of a sharded base, what it gathers while it computes, and what travels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from budwood.model.heads import body_of
from budwood.model.quantizers import is_quantized, quantizer_of
from budwood.model.recompute import layers_of
from budwood.planning.trace import Trace

GATHERED, REDUCED = "gathered layers", "all-reduce of the gradients"
"""Parts of the memory: complete layers of a sharded base, and the flat copy of the gradients that is summed."""
COMPLETE = 2
"""Layers that are complete at once: in the forward the one that computes and the buffer in which it was gathered, in
the backward the one that computes and the one gathered beside it."""


@dataclass(frozen=True)
class Layer:
    """The bytes of a layer that are sharded: quantised, and not quantised."""

    quantized: int
    plain: int

    @property
    def total(self) -> int:
        return self.quantized + self.plain


@dataclass(frozen=True)
class Exchange:
    """What each process of a planned run holds, and what it exchanges with the others in an optimizer step.

    Attributes:
        processes: of the run.
        parallel: replicate or shard.
        chosen: whether the recipe leaves that open.
        share: bytes of the layers that a process holds of a sharded base.
        replicated: bytes of the base that every process holds.
        gathered: bytes of the layers that are complete at once.
        trained: bytes of adapters with their initial values, gradients and the optimizer's state.
        reduced: bytes that a process sends for the gradients, as a ring all-reduce does, and as many that it receives.
        received: bytes of layers that it receives.
        gathers: all-gathers of layers.
        link: bytes per second that it sends and receives; None: unknown.
        seconds: that the exchange takes if nothing else runs beside it, at best and at worst; None: unknown.
    """

    processes: int
    parallel: str
    chosen: bool
    share: int
    replicated: int
    gathered: int
    trained: int
    reduced: float
    received: float
    gathers: float
    link: float | None
    seconds: tuple[float, float] | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as in `budwood plan --json`."""
        values = asdict(self)
        sizes = ("share", "replicated", "gathered", "trained", "reduced", "received")
        names = {name: f"{name}_bytes" for name in sizes}
        names |= {"link": "link_bytes_per_second", "gathers": "all_gathers"}
        seconds = None if self.seconds is None else list(self.seconds)
        return {names.get(name, name): value for name, value in {**values, "seconds": seconds}.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Exchange:
        """Undo `as_dict`."""
        names = {"link_bytes_per_second": "link", "all_gathers": "gathers"}
        plain = {names.get(name, name.removesuffix("_bytes")): value for name, value in values.items()}
        seconds = plain["seconds"]
        return cls(**{**plain, "seconds": None if seconds is None else (seconds[0], seconds[1])})


def layer_bytes(model: nn.Module) -> dict[nn.Module, Layer]:
    """Return what of each layer of a base is sharded: its matrices, and the scales of quantised ones."""
    found = {}
    for layer in layers_of(body_of(model)):
        quantized = 0
        inside: set[int] = set()
        for module in filter(is_quantized, layer.modules()):
            quantizer: Any = quantizer_of(module)
            tensors = quantizer.sharded_tensors(module)
            quantized += sum(tensor.nbytes for tensor in tensors)
            inside |= set(map(id, tensors))
        plain = sum(p.nbytes for p in layer.parameters() if p.ndim > 1 and id(p) not in inside)
        found[layer] = Layer(quantized, plain)
    return found


class Gathering:
    """Holds the layers that a process of a rehearsed run gathers while they compute, and counts them.

    Args:
        model: the base, on fake tensors.
        layers: what of each layer is sharded.
        processes: of the run.
    """

    def __init__(self, model: nn.Module, layers: dict[nn.Module, Layer], trace: Trace, processes: int) -> None:
        self.model, self.layers, self.trace, self.processes = model, layers, trace, processes
        self.active, self.gathers, self.complete = False, 0, 0
        self._held: Tensor | None = None
        self._backward = False

    @property
    def sharded(self) -> Layer:
        """The bytes of all layers that are sharded."""
        return Layer(*(sum(getattr(layer, part) for layer in self.layers.values()) for part in ("quantized", "plain")))

    @property
    def gathered(self) -> int:
        """The most bytes of layers that are complete at once."""
        return COMPLETE * max((layer.total for layer in self.layers.values()), default=0)

    @property
    def received(self) -> float:
        """The bytes of layers that a forward pass receives from other processes."""
        return self.sharded.total * (1 - 1 / self.processes) if self.active else 0.0

    def absent(self) -> tuple[int, int]:
        """Return the bytes that a process does not hold, quantised and not; 0 if the base is not sharded."""
        if not self.active:
            return 0, 0
        part, whole = 1 - 1 / self.processes, self.sharded
        return int(whole.quantized * part), int(whole.plain * part)

    def shard(self) -> None:
        """Gather the layers from now on."""
        self.active = True
        body_of(self.model).register_forward_pre_hook(lambda *_: self.begin(), prepend=True)
        for layer in self.layers:
            layer.register_forward_pre_hook(self._forward)
            layer.register_forward_hook(self._computed)

    def begin(self) -> None:
        """Forget what an earlier pass has left."""
        self._held, self._backward = None, False

    def reset(self) -> None:
        """Count from zero."""
        self.gathers = self.complete = 0

    def _hold(self, layer: nn.Module) -> None:
        self._held = None
        size = self.layers[layer].total
        self._held = torch.empty(COMPLETE * size, dtype=torch.uint8)
        self.trace.part_of(GATHERED, [self._held])
        self.gathers, self.complete = self.gathers + 1, self.complete + size

    def _forward(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._backward:  # it is recomputed, and complete already
            return
        self._hold(layer)
        first = next((value for value in inputs if isinstance(value, Tensor) and value.requires_grad), None)
        if first is not None and torch.is_grad_enabled():
            first.register_hook(lambda _: self._release())

    def _computed(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._backward:
            return
        self._held = None
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(lambda _: self._again(layer))

    def _again(self, layer: nn.Module) -> None:
        self._backward = True
        self._hold(layer)

    def _release(self) -> None:
        self._held = None

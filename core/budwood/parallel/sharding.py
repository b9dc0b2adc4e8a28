"""A frozen base whose layers are stored in parts on the processes, and gathered while they compute (torch's FSDP2).

Every process must run the same passes in the same order. Matrices are sharded; vectors, the embeddings and the head are
on every process, and so is what trains.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from budwood.parallel.processes import Processes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_MARK = "_budwood_shards"


class Shards:
    """Shards the layers of a base, each as soon as its weights have been read.

    A process therefore never holds more than its share and one layer.

    Args:
        world: the processes.
        device: where the layers are, of this process.
        prepare: called with each module of a layer before it is sharded.
    """

    def __init__(self, world: Processes, device: torch.device, prepare: Callable[[nn.Module], None]) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.world, self.prepare = world, prepare
        self.mesh = init_device_mesh(device.type, (world.size,))
        self.waiting: list[nn.Module] = []

    def watch(self, layers: Sequence[nn.Module]) -> None:
        """Expect the weights of `layers`, which are on the meta device until they are read."""
        self.waiting = list(layers)

    def advance(self) -> None:
        """Shard the layers whose weights have all been read; call it between reads."""
        for layer in [layer for layer in self.waiting if not any(p.is_meta for p in layer.parameters())]:
            self.waiting.remove(layer)
            self._shard(layer)

    def finish(self, body: nn.Module, model: nn.Module) -> None:
        """Shard the remaining layers, and let all layers of `body` share their streams and the order of gathering."""
        from torch.distributed.fsdp import fully_shard

        self.advance()
        rest = {p for p in body.parameters() if not is_sharded(p)}
        fully_shard(body, mesh=self.mesh, ignored_params=rest)
        model.__dict__[_MARK] = (self.world, body)

    def _shard(self, layer: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        for module in list(layer.modules()):
            self.prepare(module)
        layer.requires_grad_(False)
        facts = {}  # such as the kind of quantisation, which PEFT reads of a weight
        for module in layer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                facts[module, name] = {k: v for k, v in vars(parameter).items() if not hasattr(v, "device")}
        fully_shard(layer, mesh=self.mesh, ignored_params={p for p in layer.parameters() if p.ndim < 2})
        for (module, name), values in facts.items():
            vars(module._parameters[name]).update(values, _is_hf_initialized=True)


def processes_of(model: nn.Module) -> Processes | None:
    """Return the processes over which a model's layers are sharded; None if they are not."""
    mark = model.__dict__.get(_MARK)
    return None if mark is None else mark[0]


def forget_failure(model: nn.Module) -> None:
    """Make a sharded model usable again after its forward has raised an exception, on all processes."""
    mark = model.__dict__.get(_MARK)
    if mark is not None:
        mark[1].reset_iter_state()


def whole(tensor: Tensor) -> Tensor:
    """Return a weight of all processes from their parts, on all of them; any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    part: Any = tensor
    result: Tensor = part.full_tensor()
    return result


def own_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor; any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    part: Any = tensor
    local: Tensor = part.to_local()
    return local


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is sharded over processes."""
    library = sys.modules.get("torch.distributed.tensor")  # if not imported, no tensor can be an instance
    return library is not None and isinstance(tensor, library.DTensor)

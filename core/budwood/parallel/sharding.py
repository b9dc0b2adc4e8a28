"""A frozen base whose layers are stored in parts on the processes, and gathered while they compute (torch's FSDP2).

Every process must run the same passes in the same order. Matrices are sharded; vectors, the embeddings and the head are
on every process, and so is what trains.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from budwood.parallel.processes import Processes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_MARK = "_budwood_shards"


class Shards:
    """Shards the layers of a base as their weights are read, so that a process holds little more than its share.

    A layer can only be sharded as a whole. Of a matrix read before the rest of its layer, the parts of the other
    processes are given back at once, if it is in host memory.

    Args:
        world: the processes.
        device: where the layers are, of this process.
        prepare: called with each module that holds matrices, when they have been read.
    """

    def __init__(self, world: Processes, device: torch.device, prepare: Callable[[nn.Module], None]) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.world, self.prepare = world, prepare
        self.mesh = init_device_mesh(device.type, (world.size,))
        self.waiting: list[nn.Module] = []
        self.unread: list[nn.Module] = []

    def watch(self, layers: Sequence[nn.Module]) -> None:
        """Expect the weights of `layers`, which are on the meta device until they are read."""
        self.waiting = list(layers)
        self.unread = [module for layer in layers for module in layer.modules() if _matrices(module)]

    def advance(self) -> None:
        """Shard the layers whose weights have all been read; call it between reads."""
        for module in [module for module in self.unread if _is_read(module.parameters(recurse=False))]:
            self.unread.remove(module)
            self.prepare(module)
            for matrix in _matrices(module):
                _give_back(matrix, self.mesh.size(), self.mesh.get_local_rank())
        for layer in [layer for layer in self.waiting if _is_read(layer.parameters())]:
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

        layer.requires_grad_(False)
        facts = {}  # such as the kind of quantisation, which PEFT reads of a weight
        for module in layer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                facts[module, name] = {k: v for k, v in vars(parameter).items() if not hasattr(v, "device")}
        fully_shard(layer, mesh=self.mesh, ignored_params={p for p in layer.parameters() if p.ndim < 2})
        for (module, name), values in facts.items():
            vars(module._parameters[name]).update(values, _is_hf_initialized=True)


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    """Return a module's own parameters that are sharded."""
    return [parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1]


def _is_read(parameters: Iterable[nn.Parameter]) -> bool:
    return not any(parameter.is_meta for parameter in parameters)


def _give_back(matrix: nn.Parameter, count: int, rank: int) -> None:
    """Keep, of a matrix in host memory, the rows that `fully_shard` will keep of it.

    The others are pages that are never written, and take no memory.
    """
    import torch

    if matrix.device.type != "cpu" or not matrix.nbytes:
        return
    pages = mmap.mmap(-1, matrix.nbytes)
    sparse = torch.frombuffer(pages, dtype=torch.uint8).view(matrix.dtype).view(matrix.shape)
    parts = sparse.chunk(count)
    if rank < len(parts):
        parts[rank].copy_(matrix.detach().chunk(count)[rank])
    matrix.data = sparse


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

"""The processes of a run, as torchrun or accelerate's launcher started them, and what they exchange.

With one process every method returns at once, and `torch.distributed` is never imported.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from budwood.errors import InputError
from budwood.parallel.store import open_store

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of its run. All processes must call the methods that exchange something, in one order.

    Attributes:
        rank: this process, from 0; the first one writes the run's files.
        size: number of processes.
        local_rank: this process among those of its machine, from 0: its device.
        local_size: number of processes on this machine.
        node: this machine, from 0.
        host: this machine's name, for messages.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    host: str = field(default_factory=socket.gethostname)

    @classmethod
    def from_environment(cls) -> Processes:
        """Return the process that torchrun's environment variables describe; without them, a single one.

        Raises:
            InputError: they are incomplete, or contradict each other.
        """
        size = _number("WORLD_SIZE", 1)
        if size < 1:
            raise _unclear("WORLD_SIZE")
        if size == 1:
            return cls()
        rank = _number("RANK", None, size)
        local_size = _number("LOCAL_WORLD_SIZE", size, size + 1)
        if local_size < 1:
            raise _unclear("LOCAL_WORLD_SIZE")
        local_rank = _number("LOCAL_RANK", rank, local_size)
        return cls(rank, size, local_rank, local_size, _number("GROUP_RANK", rank // local_size, size))

    @property
    def first(self) -> bool:
        """Whether this is the run's first process, which writes its files and messages."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of `items`: every `size`-th, from its rank on."""
        return items[self.rank :: self.size]

    def together(self, own: Sequence[T]) -> list[T]:
        """Return the results of all items in the items' order, from each process's results of its `share` of them."""
        gathered = self.gather(list(own))
        return [gathered[i % self.size][i // self.size] for i in range(sum(map(len, gathered)))]

    def join(self, device: torch.device) -> None:
        """Join the group of processes: tensors on CUDA travel over nccl, all else over gloo. Again is no error."""
        if self.size == 1:
            return
        from torch import distributed

        if distributed.is_initialized():
            return
        if device.type == "cuda":
            import torch

            torch.cuda.set_device(self.local_rank)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = open_store(self.rank, "group")  # torch's own keys are those of before a restart
        distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)

    def leave(self) -> None:
        """Leave the group while Python still runs: gloo's threads may abort a process that exits inside it."""
        if self.size > 1:
            from torch import distributed

            if distributed.is_initialized():
                distributed.destroy_process_group()

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            self.gather(None)

    def gather(self, value: T) -> list[T]:
        """Return every process's `value`, a small object, in the order of the ranks, on all of them."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Return the first process's `value`, a small object, on all processes."""
        if self.size == 1:
            return value
        from torch import distributed

        shared: list[Any] = [value]
        distributed.broadcast_object_list(shared, 0)
        result: T = shared[0]
        return result

    def broadcast_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the first process's tensors on all processes, on the CPU; the others give none."""
        if self.size == 1:
            return dict(tensors)
        import torch
        from torch import distributed

        described = self.broadcast([(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()])
        received: dict[str, Tensor] = {}
        for name, dtype, shape in described:
            received[name] = tensors[name].cpu().contiguous() if self.first else torch.empty(shape, dtype=dtype)
            if received[name].numel():
                distributed.broadcast(received[name].reshape(-1).view(torch.uint8), 0)
        return received

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all processes, in place, with one all-reduce per dtype.

        Args:
            tensors: of the same shapes, in the same order, on all processes.
        """
        if self.size == 1:
            return
        import torch
        from torch import distributed

        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for same_dtype in by_dtype.values():
            if len(same_dtype) == 1 and same_dtype[0].is_contiguous():
                distributed.all_reduce(same_dtype[0])
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in same_dtype])
            distributed.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in same_dtype])
            for tensor, part in zip(same_dtype, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def sum_of(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Sum numbers by name over all processes; a name that one process lacks is 0 there."""
        gathered = self.gather(dict(counts))
        names = dict.fromkeys(name for each in gathered for name in each)
        return {name: sum(each.get(name, 0.0) for each in gathered) for name in names}


def _number(name: str, default: int | None, below: int | None = None) -> int:
    """Return a variable of the environment, a whole number from 0 on.

    Raises:
        InputError: it is none, or not `below`; or it is not set and has no default.
    """
    text = os.environ.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdecimal()) or (below is not None and int(text) >= below):
        raise _unclear(name)
    return int(text)


def _unclear(name: str) -> InputError:
    names = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK")
    given = ", ".join(f"{other}={os.environ[other]!r}" for other in names if other in os.environ)
    return InputError(
        f"{name}: the environment ({given}) does not say which process this is: start the run with torchrun, or unset "
        "WORLD_SIZE."
    )

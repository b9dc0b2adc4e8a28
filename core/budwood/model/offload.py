"""Keeps the inputs of recomputed layers in the host's memory from the forward to the backward pass.

On CUDA a stream of its own copies each input to pinned memory while its layer computes, and fetches the input of the
layer below while a layer is recomputed and differentiated. At most two inputs are on the device at a time. Elsewhere
the copies are made in place, one after the other, which is how plans and tests run it.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from budwood.errors import InputError
from budwood.model.device import on_host

PIECE = 1 << 26
"""Bytes of a piece of host memory. torch rounds pinned memory up to powers of two, so pieces are; only the last one of
a tensor is not full."""


class Offload:
    """Moves layer inputs of any number of forward passes, in the order in which they are needed."""

    def __init__(self) -> None:
        self._last: Any = lambda: None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def keeping(self, hidden: Tensor | None) -> AbstractContextManager[Any]:
        """Return a context in which a layer's input that is saved for the backward pass goes to the host's memory.

        Args:
            hidden: the input; other saved tensors stay where they are.

        Raises:
            InputError: the model gives its layers no input that can be moved.
        """
        if hidden is None or not hidden.is_floating_point():
            raise InputError(
                "train.activation_offloading: the model's layers do not take their input as the first argument: leave "
                "it out."
            )
        storage = hidden.untyped_storage()._cdata

        def pack(tensor: Tensor) -> Any:
            is_input = tensor.untyped_storage()._cdata == storage and tensor.is_contiguous()
            return self._keep(tensor) if is_input else tensor

        return saved_tensors_hooks(pack, lambda kept: kept.take() if isinstance(kept, _Kept) else kept)

    def _keep(self, tensor: Tensor) -> _Kept:
        before = self._last()
        if before is not None:
            before.release()
        kept = _Kept(tensor, before, self._stream(tensor.device))
        self._last = weakref.ref(kept)
        return kept

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class _Kept:
    """A layer's input: on the device until the next layer begins, and in the host's memory as long as it is needed.

    Memory of the device is freed only after the stream that computes has waited for the copy, so the allocator needs to
    know nothing of the other stream.
    """

    def __init__(self, tensor: Tensor, before: _Kept | None, stream: torch.cuda.Stream | None) -> None:
        self.device: Tensor | None = tensor
        self.shape, self.dtype, self.place, self.version = tensor.shape, tensor.dtype, tensor.device, tensor._version
        self.stream = stream
        self.before: Any = weakref.ref(before) if before is not None else lambda: None
        self.copied = torch.cuda.Event() if stream is not None else None
        size = PIECE // tensor.element_size()
        flat = tensor.detach().view(-1)
        with on_host():
            self.host = [
                torch.empty(_power(min(size, len(flat) - start)), dtype=self.dtype, pin_memory=stream is not None)
                for start in range(0, len(flat), size)
            ]
        self._copy(flat, to_host=True)

    def release(self) -> None:
        """Free the device's memory once the copy on the host is complete.

        Raises:
            RuntimeError: the tensor was changed in place since it was saved.
        """
        if self.device is None:
            return
        if self.device._version != self.version:
            raise RuntimeError("a layer's input was changed in place after the layer had saved it")
        self._wait()
        self.device = None

    def fetch(self) -> None:
        """Begin to copy the tensor back to the device, if it is not there."""
        if self.device is None:
            self.device = torch.empty(self.shape, dtype=self.dtype, device=self.place)
            self._copy(self.device.view(-1), to_host=False)
            self.version = self.device._version

    def take(self) -> Tensor:
        """Return the tensor on the device, and begin to fetch the one that is needed next."""
        self.fetch()
        tensor = self.device
        assert tensor is not None
        self.release()
        before = self.before()
        if before is not None:
            before.fetch()
        return tensor

    def _copy(self, flat: Tensor, to_host: bool) -> None:
        with self._beside():
            start = 0
            for piece in self.host:
                part = flat[start : start + len(piece)]
                start += len(piece)
                there = piece[: len(part)]
                if to_host:
                    there.copy_(part, non_blocking=True)
                else:
                    part.copy_(there, non_blocking=True)
            if self.copied is not None:
                self.copied.record()

    def _beside(self) -> AbstractContextManager[Any]:
        """Return a context of the stream that copies, which waits for what computes so far."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.place))
        return torch.cuda.stream(self.stream)

    def _wait(self) -> None:
        if self.copied is not None:
            torch.cuda.current_stream(self.place).wait_event(self.copied)

    def __del__(self) -> None:
        if self.device is not None:  # a pass that was given up
            self._wait()


def _power(count: int) -> int:
    """Return the smallest power of two that is not below `count`."""
    return 1 << max(count - 1, 0).bit_length()

"""Fake tensors, with shape, dtype and device but no data, on which a step is checked before weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from budwood.model.checkpoint import resolve
from budwood.model.checks import load_tokenizer, skeleton

if TYPE_CHECKING:
    from budwood.model.base import Base


class _Mode(FakeTensorMode):
    """torch's mode, but a deep copy is the mode itself: copying a module copies all attributes of its tensors."""

    def __deepcopy__(self, memo: Any) -> _Mode:
        return self


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Create only fake tensors inside the context, and let modules convert their fake parameters.

    `Module.to` swaps the contents of fake parameters, which torch rejects for parameters registered with the mode. Here
    it replaces the parameter instead.
    """

    def convert(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(fn)
        for name, parameter in self._parameters.items():
            if parameter is None:
                continue
            new = fn(parameter.data)
            if (new.dtype, new.device) != (parameter.dtype, parameter.device):
                self._parameters[name] = nn.Parameter(new, parameter.requires_grad)
        for name, buffer in self._buffers.items():
            self._buffers[name] = fn(buffer) if buffer is not None else None
        return self

    original = nn.Module._apply
    nn.Module._apply = convert  # type: ignore[method-assign]
    try:
        with _Mode() as mode:
            yield mode
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


def fake_base(
    model: str,
    auto_class: str,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    needs_tokenizer: bool = True,
    **model_kwargs: Any,
) -> Base:
    """Build an unquantised base of fake CPU tensors from its configuration; call it inside `fake_tensors`.

    No weights are read, and the fingerprint is empty.

    Args:
        model: a folder or a hub name.
        auto_class: name of one of transformers' auto classes.
        dtype: dtype of every floating parameter.
        model_kwargs: changes to the configuration, such as `num_labels`.

    Raises:
        InputError, CorruptError: as `skeleton`.
    """
    from budwood.model.base import Base

    frame = skeleton(model, auto_class, trust_remote_code, **model_kwargs)
    elements = stored = 0
    for module in frame.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
                elements, stored = elements + empty.numel(), stored + empty.nbytes
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    frame.tie_weights()
    frame.eval()
    path = resolve(model, weights=False, code=trust_remote_code)
    device = torch.device("cpu")
    tokenizer: Any = load_tokenizer(path) if needs_tokenizer else None
    return Base(
        str(model), path, frame, tokenizer, "", "none", stored, 2 * elements, 1.0, elements,
        dtype, device, (), ["fake"],
    )  # fmt: skip

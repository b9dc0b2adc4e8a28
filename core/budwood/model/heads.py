"""A model in two parts: everything below its head, and the head, which is the model's own forward on given rows."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn


def body_of(model: nn.Module) -> nn.Module:
    """The part of a causal language model below its head: its decoder, and other modalities' towers beside it."""
    base: nn.Module = getattr(model, "base_model", model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    if decoder is None or decoder is model:
        return base
    inside = {id(parameter) for parameter in decoder.parameters()}
    if base is not model and decoder is not base and any(id(p) not in inside for p in base.parameters()):
        return base
    return decoder


def own_head(model: nn.Module, rows: Tensor) -> Tensor:
    """Logits [n, V] of rows [n, d] of the body's output, by the model's own forward.

    The forward runs on a shallow copy of the model whose body is replaced by one that returns the rows. So whatever the
    model does after its body (soft-capping, logit scales, a bias) is done, without Budwood knowing of it; the model
    itself is left as it is, so that several threads may ask at once.
    """
    out = _BodyOutput(last_hidden_state=rows[None])
    logits: Tensor = _with_body(model, body_of(model), _Given(out))(inputs_embeds=rows[None], use_cache=False).logits
    return logits.flatten(0, 1)  # a view; the gradient of an index would fill a tensor of zeros first


def _with_body(model: nn.Module, body: nn.Module, other: nn.Module) -> nn.Module:
    """A shallow copy of the model, and of the modules on the way to its body, with another body."""
    path = next(name for name, module in model.named_modules() if module is body)
    top = current = _shallow(model)
    *parents, last = path.split(".")
    for name in parents:
        current._modules[name] = inner = _shallow(current._modules[name])  # type: ignore[arg-type]
        current = inner
    current._modules[last] = other
    return top


def _shallow(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    twin.__dict__.pop("forward", None)  # an instance's own forward would run on the original
    return twin


class _Given(nn.Module):
    """Stands for a body: returns what it was made with."""

    def __init__(self, out: _BodyOutput) -> None:
        super().__init__()
        self.out = out

    def forward(self, *args: Any, **kwargs: Any) -> _BodyOutput:
        return self.out


class _BodyOutput(SimpleNamespace):
    """Stands for transformers' model output: by attribute and, as some heads do, by index. Anything else is None, such
    as the cache, which versions name differently."""

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

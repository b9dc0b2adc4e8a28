"""Splits a model into its body, everything below the head, and its head, applied by the model's own forward."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

_towers: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a model has parameters beside its decoder, below the head; looked for once, not for every chunk of labels."""


def body_of(model: nn.Module) -> nn.Module:
    """Return the part of a causal language model below its head: its decoder, and the towers of other modalities."""
    base: nn.Module = getattr(model, "base_model", model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    if decoder is None or decoder is model:
        return base
    if base is model or decoder is base:
        return decoder
    if model not in _towers:
        inside = {id(parameter) for parameter in decoder.parameters()}
        _towers[model] = any(id(parameter) not in inside for parameter in base.parameters())
    return base if _towers[model] else decoder


def name_body(model: nn.Module) -> None:
    """Make `base_model_prefix` name the body of a language model whose class names none of its modules, as Llama 4's.

    transformers' `base_model`, and whatever asks for the modules below the head, go by it.
    """
    from transformers import PreTrainedModel

    given: Any = model
    if getattr(model, "base_model", None) is not model or given.get_output_embeddings() is None:
        return
    bodies = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if len(bodies) == 1:
        given.base_model_prefix = bodies[0]


def own_head(model: nn.Module, rows: Tensor) -> Tensor:
    """Return logits [n, V] of rows [n, d] of the body's output, computed by the model's own forward.

    The forward runs on a shallow copy of the model, with a body that returns the rows. This includes all that the model
    does after its body (soft-capping, logit scales, a bias), without model-specific code. The model itself is not
    modified, so that several threads may call this at the same time.
    """
    out = _BodyOutput(last_hidden_state=rows[None])
    body = body_of(model)
    logits: Tensor = _with_body(model, body, _Given(out, body))(inputs_embeds=rows[None], use_cache=False).logits
    return logits.flatten(0, 1)  # a view; the gradient of an index would fill a tensor of zeros first


def pooled_logits(model: nn.Module, body: nn.Module, hidden: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Return logits [rows, classes] of the body's output [rows, width, d], computed by the model's own forward.

    Args:
        model: a model that pools each row of its body's output, in whatever way.
        body: its body, whose `pooler` is applied if it has one.
        hidden: the body's output.
        inputs: `input_ids` and `attention_mask` [rows, width] of these rows.
    """
    pooler, activation = getattr(body, "pooler", None), getattr(body, "pooler_activation", None)
    pooled = {}
    if activation is not None:  # ALBERT's pooler is a linear on the first token
        pooled["pooler_output"] = activation(pooler(hidden[:, 0]))  # type: ignore[misc]
    elif pooler is not None:
        pooled["pooler_output"] = pooler(hidden)
    given = _Given(_BodyOutput(last_hidden_state=hidden, **pooled), body)
    logits: Tensor = _with_body(model, body, given)(**inputs).logits
    return logits


def _with_body(model: nn.Module, body: nn.Module, other: nn.Module) -> nn.Module:
    """Return a shallow copy of the model, and of the modules on the path to its body, with another body."""
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
    twin.__dict__.pop("forward", None)  # a forward set on the instance would run on the original
    return twin


class _Given(nn.Module):
    """Replaces a body: returns the output that it was created with, and has the body's attributes."""

    def __init__(self, out: _BodyOutput, body: nn.Module) -> None:
        super().__init__()
        self.out = out
        self.__dict__["body"] = body  # not a module of this one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["body"], name)  # such as Falcon-H1's multiplier of its logits

    def forward(self, *args: Any, **kwargs: Any) -> _BodyOutput:
        return self.out


class _BodyOutput(SimpleNamespace):
    """Replaces transformers' model output, read by attribute and, by some heads, by index. Any other attribute is None,
    such as the cache, whose name depends on the version."""

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        outputs: tuple[Tensor, ...] = (self.last_hidden_state, self.pooler_output)
        return outputs[index]

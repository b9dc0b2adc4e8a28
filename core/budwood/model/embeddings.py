"""Enlarges a base's embeddings, in place, for tokens that only its tokenizer has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from budwood.errors import InputError

if TYPE_CHECKING:
    from budwood.model.base import Base


def vocabulary_of(tokenizer: Any) -> int:
    """Return the number of embeddings that a tokenizer needs: its largest token id plus one."""
    return int(max(tokenizer.get_vocab().values(), default=-1)) + 1


def table_of(model: Any) -> nn.Module | None:
    """Return the table of the input embeddings; None if the model has none, such as one that reads images."""
    try:
        table: nn.Module | None = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return table if hasattr(plain(table), "weight") else None


def head_of(model: Any) -> nn.Module | None:
    """Return the module that computes the logits of all tokens; None if the model has none."""
    head: nn.Module | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head


@torch.no_grad()
def resize(model: Any, count: int, name: str) -> range:
    """Enlarge input embeddings and output head to `count` rows; tied ones stay tied. Tables are never shrunk.

    Every new row is the mean of the old rows, so that no new token is more probable than the most probable old one
    (Hewitt, 2021, "Initializing New Word Embeddings for Pretrained Language Models"). transformers' `mean_resizing`
    draws from a normal distribution with this mean.

    Args:
        model: a model, or its skeleton on the meta device; inside adapters' wrappers, the base's table is enlarged.
        name: the base's name, for messages.

    Returns:
        The token ids of the new rows.

    Raises:
        InputError: other tables of that size would not be enlarged, or the head is not a plain linear.
    """
    embedding, head = plain(table_of(model)), plain(head_of(model))
    old = getattr(embedding, "num_embeddings", None)
    if old is not None and count <= old:
        return range(old, old)
    _check(model, embedding, head, old, name)
    assert isinstance(old, int)
    tied = head is not None and head.weight is embedding.weight
    embedding.weight, embedding.num_embeddings = _extended(embedding.weight, count), count
    if head is not None:
        head.weight = embedding.weight if tied else _extended(head.weight, count)
        head.out_features = count
    for module in model.modules():
        if module.__dict__.get("vocab_size") == old:
            module.vocab_size = count
    model.config.get_text_config().vocab_size = count
    return range(old, count)


def resize_base(base: Base, count: int) -> None:
    """Enlarge the embeddings of a loaded base to at least `count` rows; see `resize`."""
    base.added = resize(base.model, count, base.name)
    base.notes.append(resize_note(base.added.start, count))
    if not base.added:
        return
    ends: list[Any] = [table_of(base.model), head_of(base.model)]
    tables = {id(end.weight): end.weight for end in ends if end is not None}
    new = sum(len(base.added) * int(table.shape[1]) for table in tables.values())
    total = base.parameters + new
    base.unquantized_share = (base.unquantized_share * base.parameters + new) / total
    base.parameters = total
    base.bytes += new * base.dtype.itemsize
    base.bytes_unquantized += new * base.dtype.itemsize


def resize_note(old: int, count: int) -> str:
    """Return a note about resizing the embeddings from `old` to `count` rows."""
    if count <= old:
        return f"resize_embeddings: nothing to do: the {old:,} embeddings cover every token of the tokenizer"
    return f"embeddings resized from {old:,} to {count:,}; each new row starts as the mean of the old rows"


def plain(module: Any) -> Any:
    """Return the base's module inside adapters' wrappers."""
    for name in ("base_layer", "original_module"):
        module = getattr(module, name, module)
    return module


def _extended(weight: torch.Tensor, count: int) -> nn.Parameter:
    """Return a frozen copy of a weight [n, d] with `count` rows; the mean is taken in fp32, in blocks."""
    total = torch.zeros(weight.shape[1], device=weight.device, dtype=torch.float64)
    for block in weight.split(4096):
        total += block.double().sum(0)
    mean = (total / len(weight)).to(weight.dtype)
    return nn.Parameter(torch.cat([weight, mean.expand(count - len(weight), -1)]), requires_grad=False)


def _check(model: nn.Module, embedding: Any, head: Any, old: int | None, name: str) -> None:
    where = f"base.resize_embeddings: base '{name}'"
    if old is None or not isinstance(embedding, nn.Embedding) or not embedding.weight.is_floating_point():
        raise InputError(f"{where} has no plain embedding table ({type(embedding).__name__}): resize and save it.")
    if head is not None and (type(head) is not nn.Linear or len(head.weight) != old):
        raise InputError(f"{where}: its head is not a linear with {old:,} rows ({type(head).__name__}): resize it.")
    if head is not None and head.bias is not None:
        raise InputError(
            f"{where}: its head has a bias, which PEFT leaves out if rows of the head are trained: "
            "resize it with model.resize_token_embeddings(len(tokenizer)), and save it."
        )
    for path, module in model.named_modules():
        size = getattr(module, "num_embeddings", None) or getattr(module, "out_features", None)
        same = size == old and module is not embedding and module is not head
        if same and (isinstance(module, nn.Embedding) or "head" in path):
            raise InputError(f"{where}: '{path}' has {old:,} rows too and would not be resized: resize it.")

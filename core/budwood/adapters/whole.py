"""What an adapter replaces whole: modules of the base, in PEFT's wrappers, and biases."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from budwood.adapters.peft_config import PREFIX
from budwood.adapters.targets import base_modules, reject_quantized
from budwood.adapters.tokens import TokenRows
from budwood.errors import InputError
from budwood.model.embeddings import head_of


def wrap_whole(model: nn.Module, paths: Iterable[str], name: str) -> None:
    """Give the adapter `name` its own copy of each of these modules, by full name, not in use.

    Raises:
        InputError: another adapter on the model has low-rank updates there; or it holds quantised experts.
    """
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, ModulesToSaveWrapper):
            module.update(name)
            continue
        reject_quantized(path, module)
        if any(isinstance(part, LoraLayer | AuxiliaryTrainingWrapper | TokenRows) for part in module.modules()):
            raise InputError(f"'{path}' is replaced whole, and another adapter stands on it: unload that one first.")
        setattr(model.get_submodule(parent), leaf, ModulesToSaveWrapper(module, name))


def check_replaced(model: nn.Module, paths: Iterable[str]) -> None:
    """Check that no adapter on the model replaces one of these modules, which are to get low-rank updates.

    Raises:
        InputError: one does.
    """
    for path in paths:
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            if isinstance(model.get_submodule(".".join(parts[:end])), AuxiliaryTrainingWrapper | TokenRows):
                raise InputError(
                    f"'{path}' is adapted, and another adapter replaces it, whole or in rows: unload that one first."
                )


def saved_modules(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The whole modules that the adapter `name` replaces, each with its path."""
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and name in getattr(module, "modules_to_save", {}):
            yield path, module.modules_to_save[name]


def in_fp32(module: nn.Module) -> nn.Module:
    """Convert the copy of a base's module to fp32; its output keeps the base's dtype, which what reads it expects."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if dtype != torch.float32:
        module.register_forward_hook(partial(_cast, dtype))
    return module.float()


def _cast(dtype: torch.dtype, module: nn.Module, given: Any, output: Any) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) and output.is_floating_point() else output


@torch.no_grad()
def untie(model: nn.Module, paths: Iterable[str]) -> None:
    """Give these modules parameters of their own, and say so in the model's config, before they change for good.

    Without it, a change of the output embeddings would change tied input embeddings too.
    """
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    for path in paths:
        for module in model.get_submodule(path).modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and counts[id(parameter)] > 1:
                    module._parameters[key] = copy.deepcopy(parameter)
                    counts[id(parameter)] -= 1
                    config: Any = model.config
                    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


def without_base_tensors(model: nn.Module, tensors: Mapping[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """Return an adapter's tensors without the embeddings of its base, which PEFT writes beside adapters of embeddings.

    Args:
        expected: keys that are the adapter's own.

    Raises:
        InputError: they are not those of this base: it was resized or trained.
    """
    own, found = set(expected), dict(tensors)
    for path, module in base_modules(model):
        embeds = isinstance(module, nn.Embedding) or module in _ends(model)
        for key, value in module.named_parameters(recurse=False) if embeds else ():
            for inner in ("", "base_layer.", "token_adapter.base_layer.", "original_module."):
                saved = f"{PREFIX}{path}.{inner}{key}"
                if saved not in found or saved in own:
                    continue
                if not _equal(found[saved], value):
                    raise InputError(
                        f"'{saved}' is another '{path}' than the base's, resized or trained: "
                        "merge the adapter with PEFT (merge_and_unload), and use the result as a base."
                    )
                del found[saved]
    return found


def _equal(saved: Tensor, value: Tensor) -> bool:
    """Return whether two tensors are equal in the dtype of one of them."""
    saved = saved.to(value.device)
    return saved.to(value.dtype).equal(value) or value.to(saved.dtype).equal(saved)


def _ends(model: nn.Module) -> list[nn.Module]:
    head = head_of(model)
    if head is None:
        return []
    own = next(path for path, module in model.named_modules() if module is head)
    return [module for path, module in base_modules(model) if path == own]

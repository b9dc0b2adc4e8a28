"""Weighted sums of LN tuning's and trainable tokens' adapters, as differences from the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from budwood import InputError
from budwood.lowrank import is_tied
from budwood_peft_methods.replaced import NORM, ROWS, saved_token_ids
from budwood_peft_methods.saved import PREFIX
from budwood_peft_methods.sums import WHOLE_CAUSE, check_mean

Rows = dict[tuple[str, int | None], tuple[float, Tensor]]
"""The sum of the weights, and of the weighted values, of a tensor by key; of one row of it by key and token id."""


def combine(
    strategy: Any, adapters: Sequence[Any], weights: Sequence[float], base: Callable[[], nn.Module]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of W + Σ wᵢ (Wᵢ - W), for the base's W and the adapters' Wᵢ; see `combine_adapters`.

    Raises:
        InputError: the adapters do not fit each other; or other modules than norms would need weights that sum to 1.
        CorruptError: a config has an invalid field.
    """
    config = dict(adapters[0].config)
    tokens = {id(a): saved_token_ids(a.config) for a in adapters} if strategy.name == "trainable_tokens" else {}
    found: Rows = {}
    owners: dict[str, Any] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        if (adapter.config.get("modules_to_save") or None) != (config.get("modules_to_save") or None):
            raise InputError(
                f"{adapter.directory}: its modules_to_save differ from those of {adapters[0].directory}: they cannot "
                "be combined."
            )
        for key, value in _once(adapter.load_tensors(), base).items():
            owner = owners.setdefault(key, (adapter.directory, value.shape[1:] if tokens else value.shape))
            if owner[1] != (value.shape[1:] if tokens else value.shape):
                cause = "different bases" if NORM in key or ROWS in key else WHOLE_CAUSE
                raise InputError(
                    f"{adapter.directory}: its '{key}' has the shape {list(value.shape)}, which does not fit that of "
                    f"{owner[0]}: they are of {cause}."
                )
            if tokens and len(value) != len(tokens[id(adapter)]):
                raise InputError(f"{adapter.directory}: its '{key}' has not a row for each of its token_indices.")
            rows = zip(tokens[id(adapter)], value, strict=True) if tokens else [(None, value)]
            for token, row in rows:
                total, added = found.get((key, token), (0.0, torch.zeros((), dtype=torch.double)))
                found[key, token] = total + weight, added + weight * row.double()
    tensors = _completed(found, owners, base)
    changes: dict[str, Any] = {"inference_mode": True}
    if tokens:
        changes["token_indices"] = sorted({token for ids in tokens.values() for token in ids})
    else:
        paths = {key.removeprefix(PREFIX).partition(NORM)[0] for key in tensors if NORM in key}
        changes |= {"target_modules": sorted(paths), "exclude_modules": None}
    return config | changes, tensors


def _once(tensors: Mapping[str, Tensor], base: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Return an adapter's tensors without the rows that PEFT repeats for a head that is tied to the embeddings."""
    rows = [key for key in tensors if ROWS in key]
    if len(rows) != 2 or not torch.equal(*(tensors[key] for key in rows)):
        return dict(tensors)
    model: Any = base()
    if not is_tied(model):
        return dict(tensors)
    table = next(path for path, module in model.named_modules() if module is model.get_input_embeddings())
    return {key: value for key, value in tensors.items() if key not in rows or key.startswith(f"{PREFIX}{table}.")}


def _completed(found: Rows, owners: Mapping[str, Any], base: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Return the tensors with the base's share, where the weights of what the adapters have do not sum to 1."""
    rows: dict[str, list[tuple[int | None, Tensor]]] = {}
    for (key, token), (total, added) in sorted(found.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        if abs(1 - total) > 1e-6:
            name = key.removeprefix(PREFIX)
            if NORM in name:
                added = added + (1 - total) * base().get_parameter(name.replace(NORM, ".")).double().cpu()
            elif ROWS in name:
                table = base().get_submodule(name.removesuffix(ROWS))
                added = added + (1 - total) * table.weight[token].double().cpu()  # type: ignore[index]
            else:
                check_mean(name, str(owners[key][0]), [total])
        rows.setdefault(key, []).append((token, added.float()))
    return {
        key: values[0][1] if values[0][0] is None else torch.stack([value for _, value in values])
        for key, values in rows.items()
    }

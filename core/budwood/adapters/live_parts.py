"""What an adapter replaces whole, as entries of the live table: modules, rows of embeddings, and biases."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from budwood.adapters.live_update import LiveAdapter, LiveUpdate
from budwood.adapters.match import check_adapter_tensors
from budwood.adapters.peft_config import PREFIX, SavedLowRankConfig, saved_whole_modules
from budwood.adapters.targets import base_modules
from budwood.adapters.tokens import KEY, TokenRows, check_plain, check_rows, ends_of, is_tied, saved_tokens
from budwood.adapters.whole import in_fp32, without_base_tensors
from budwood.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class _Whole:
    modules: list[str]
    tokens: dict[str, list[int]]
    biases: dict[str, str]  # path of the module → key in the file


def live_low_rank(
    model: nn.Module,
    saved: SavedLowRankConfig,
    tensors: dict[str, Tensor],
    targets: Sequence[str],
    own: Shapes,
    update: Callable[[str, Mapping[str, Tensor]], LiveUpdate | None],
) -> LiveAdapter:
    """Return a low-rank adapter in PEFT's layout as entries of the live table, after a check of every tensor.

    Args:
        saved: its config.
        tensors: the file's tensors.
        targets: paths of the linears that it adapts.
        own: shape of each tensor of the low-rank updates, by key in the file.
        update: makes the update of one linear from its path and the tensors; None: there is none.

    Raises:
        MisfitError: a tensor is missing, unexpected, or of another shape.
        InputError: the adapter replaces something in a way that is not supported.
    """
    modules = dict(base_modules(model))
    whole = saved_whole_modules(model, saved, tensors)
    tokens, tensors = saved_tokens(model, saved, tensors, whole)
    for path in tokens.keys() & {*targets, *whole}:
        raise InputError(
            f"'{path}' is adapted or replaced while some of its rows are trained, which is not supported: merge the "
            "adapter into its base with PEFT (merge_and_unload), and use the result as a base."
        )
    parts = _Whole(whole, tokens, _biases(modules, saved.bias, targets))
    expected = {**own, **_expected(model, modules, parts, tensors)}
    if tensors.keys() != expected.keys():
        tensors = without_base_tensors(model, tensors, expected)
    check_adapter_tensors(expected, tensors)
    updates = {path: made for path in targets if (made := update(path, tensors)) is not None}
    replaced = _modules(modules, whole, tensors) | _rows(model, modules, parts, tensors)
    biases = {path: tensors[key].float() for path, key in parts.biases.items()}
    return LiveAdapter(updates, replaced, biases)


def _expected(
    model: nn.Module, modules: Mapping[str, Any], parts: _Whole, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what is replaced; a file may hold longer embeddings and heads than the base."""
    shapes: dict[str, tuple[int, ...]] = {}
    ends = ends_of(model)
    for path in parts.modules:
        weight = tensors.get(f"{PREFIX}{path}.weight")
        for key, value in modules[path].state_dict().items():
            shape = tuple(value.shape)
            longer = path in ends and weight is not None and weight.ndim == 2 and len(weight) > shape[0]
            shapes[f"{PREFIX}{path}.{key}"] = (len(weight), *shape[1:]) if longer else shape  # type: ignore[arg-type]
    for path, ids in parts.tokens.items():
        shapes[f"{PREFIX}{path}.{KEY}"] = (len(ids), modules[path].weight.shape[1])
    return shapes | {key: tuple(modules[path].bias.shape) for path, key in parts.biases.items()}


def _biases(modules: Mapping[str, Any], selection: str, targets: Sequence[str]) -> dict[str, str]:
    """Return the keys of the replaced biases by module: none, those of the adapted linears (lora_only), or all."""
    if selection == "none":
        return {}
    adapted = set(targets)
    keys = {
        path: f"{PREFIX}{path}.base_layer.bias" if path in adapted else f"{PREFIX}{path}.bias"
        for path, module in modules.items()
        if path and (selection == "all" or path in adapted) and isinstance(getattr(module, "bias", None), nn.Parameter)
    }
    if not keys:
        raise InputError(f"bias: {selection}: the model has no such biases; use bias: none.")
    return keys


def _modules(modules: Mapping[str, Any], whole: Sequence[str], tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Return the modules that replace the base's, in fp32 as they were trained."""
    replaced = {}
    for path in whole:
        module = copy.deepcopy(modules[path])
        for part in module.modules():
            part.__dict__.pop("forward", None)
        state = {key: tensors[f"{PREFIX}{path}.{key}"] for key in module.state_dict()}
        for key, value in list(module.named_parameters(recurse=False)):
            if len(state[key]) != len(value):
                setattr(module, key, nn.Parameter(value.new_empty(state[key].shape), requires_grad=False))
                setattr(
                    module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", len(state[key])
                )
        in_fp32(module).load_state_dict(state)
        replaced[path] = module.eval().requires_grad_(False)
    return replaced


def _rows(
    model: nn.Module, modules: Mapping[str, Any], parts: _Whole, tensors: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """Return the embeddings and heads in which some rows are the adapter's; a tied head shares the embeddings'."""
    found: dict[str, nn.Module] = {}
    embedding, head = ends_of(model)
    for path, ids in parts.tokens.items():
        check_plain(path, modules[path])
        check_rows(path, ids, modules[path])
        rows = found[path] = _token_rows(modules[path], ids, None)
        rows.rows["adapter"].data.copy_(tensors[f"{PREFIX}{path}.{KEY}"])
        if path == embedding and is_tied(model) and head is not None and head not in (*parts.tokens, *parts.modules):
            found[head] = _token_rows(modules[head], ids, rows.rows["adapter"])
    return found


def _token_rows(module: Any, ids: list[int], shared: nn.Parameter | None) -> TokenRows:
    twin = copy.copy(module)  # the base's tensors, and its own forward
    twin.__dict__.pop("forward", None)
    twin._forward_pre_hooks, twin._forward_hooks = OrderedDict(), OrderedDict()  # those of the base's run on the base's
    rows = TokenRows(twin)
    with torch.no_grad():
        rows.add("adapter", ids, shared)
    rows.active = "adapter"
    return rows.eval().requires_grad_(False)

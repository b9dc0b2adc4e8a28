"""PEFT's layers on a live model: attach, select and remove low-rank adapters of any method.

A method replaces linears with its layers (subclasses of PEFT's `LoraLayer`) and registers the adapter here. The layers
only hold parameters. A single forward per adapted linear computes all of its adapters, whatever their method, so that
methods can share a model and even the rows of one batch.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from budwood.adapters.expert_layers import ExpertForward
from budwood.adapters.peft_config import PREFIX
from budwood.adapters.tokens import merge_tokens, remove_tokens, rows_needed, select_tokens, token_rows, token_tensors
from budwood.adapters.updates import LowRankUpdate
from budwood.adapters.whole import in_fp32, saved_modules, untie
from budwood.contract.types import ParameterGroup
from budwood.errors import InputError
from budwood.model.embeddings import resize
from budwood.model.ops.group import Part
from budwood.model.ops.linear import add_update, cast_factors, frozen_linear
from budwood.model.quantizers import is_transposed, quantizer_of
from budwood.model.quantizers.experts import ExpertLinear

_STATE = "_budwood_adapters"


@dataclass
class LiveAdapters:
    """The adapters on a model.

    Attributes:
        types: adapter type, keyed by adapter name.
        chosen: selection of each method: names, and for each row an index into them; without index, the single name.
        names: distinct names in use, over all methods.
        index: for each row or position of a batch, an index into `names`; -1: the base alone. Empty: one name for all.
        members: cached rows of each name, on the device of their batch.
        forwards: the forward of each adapted linear.
        base_biases: the base's values of the biases that adapters replace, keyed by canonical name.
        biases: each adapter's values of these biases.
        bias_parameters: the parameters that hold the values currently in use.
    """

    types: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, tuple[list[str], list[int]]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    members: dict[str, Tensor] = field(default_factory=dict)
    forwards: dict[nn.Module, _Forward | ExpertForward] = field(default_factory=dict)
    base_biases: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    bias_parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    def rows(self, name: str, device: torch.device) -> Tensor:
        """Return the rows [n] int64 that the adapter `name` computes."""
        rows = self.members.get(name)
        if rows is None or rows.device != device:
            number = self.names.index(name)
            rows = torch.tensor([row for row, i in enumerate(self.index) if i == number], device=device)
            self.members[name] = rows
        return rows


class _Forward:
    """The forward of one adapted linear, for the current selection."""

    def __init__(self, base: Any, state: LiveAdapters) -> None:
        self.base, self.state = base, state
        self.updates: dict[str, LowRankUpdate] = {}
        self.factors: dict[str, _Factors] = {}

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state, base = self.state, self.base
        names = [name for name in state.names if name in self.updates]
        if not names:
            y: Tensor = base(x)
            return y
        if not state.index:
            return self.updates[names[0]].forward(x, base)
        rows = x if len(x) == len(state.index) else x.reshape(-1, x.shape[-1])
        if len(rows) != len(state.index):
            raise ValueError(f"adapters were selected for {len(state.index)} rows, but the input is {list(x.shape)}")
        if not all(self.updates[name].mixes for name in names):
            return self._forward_slices(rows).view(*x.shape[:-1], -1)
        y = frozen_linear(rows, base)
        for name in names:
            factors = self._factors(name, y.dtype)
            if factors is not None:
                y = add_update(rows, y, *factors, state.rows(name, x.device))
        return y.view(*x.shape[:-1], -1)

    def part(self) -> Part | None:
        """Return the linear and its update for the current selection; None: rows differ, or it is no product."""
        state, base = self.state, self.base
        names = [name for name in state.names if name in self.updates]
        quantizer = quantizer_of(base)
        if state.index or "forward" in base.__dict__ or quantizer is None or quantizer.weight(base).requires_grad:
            return None
        if not names:
            return Part(base)
        update = self.updates[names[0]]
        if not update.mixes:
            return None
        weights = update.weights()
        return Part(base) if weights is None else Part(base, *weights, update.probability)

    def _forward_slices(self, x: Tensor) -> Tensor:
        """Compute each slice of consecutive rows with the same adapter separately."""
        parts, start = [], 0
        for number, rows in itertools.groupby(self.state.index):
            stop = start + len(list(rows))
            update = self.updates.get(self.state.names[number]) if number >= 0 else None
            parts.append(update.forward(x[start:stop], self.base) if update else self.base(x[start:stop]))
            start = stop
        return torch.cat(parts)

    def _factors(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Return A and s B in `dtype`; cached if gradients are disabled."""
        update = self.updates[name]
        if torch.is_grad_enabled() or not update.sources():
            return _cast(update, dtype)
        cached = self.factors.get(name)
        if cached is None or not cached.is_valid(update, dtype):
            cached = self.factors[name] = _Factors(update, dtype)
        return cached.value


class _Factors:
    """An adapter's cast factors, and the version of their source tensors."""

    def __init__(self, update: LowRankUpdate, dtype: torch.dtype) -> None:
        self.value, self.dtype, self.version = _cast(update, dtype), dtype, _version(update)
        self.sources = [source.detach() for source in update.sources()]  # so that their addresses are not reused

    def is_valid(self, update: LowRankUpdate, dtype: torch.dtype) -> bool:
        """Whether they are up to date with `update` and in `dtype`."""
        return dtype == self.dtype and self.version == _version(update)


def _version(update: LowRankUpdate) -> tuple[Any, ...]:
    """Return a value that changes if a source is modified in place (training, loading) or replaced."""
    layer = update.layer
    return (*((source.data_ptr(), source._version) for source in update.sources()), layer.scaling[update.name])


def _cast(update: LowRankUpdate, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    weights = update.weights()
    return None if weights is None else cast_factors(*weights, dtype)


def live_adapters(model: nn.Module) -> LiveAdapters | None:
    """Return the adapters on `model`, or None if there are none."""
    return model.__dict__.get(_STATE)


def adapter_layers(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the layers that hold parameters of the adapter `name`, each with the path of the base's module."""
    for path, module in _layers(model, name):
        yield canonical(path), module


def _layers(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            yield path, module


def known_to_peft(module: nn.Module) -> bool:
    """Whether PEFT has its own layers for a linear with this storage."""
    quantizer = quantizer_of(module)
    return quantizer is not None and quantizer.known_to_peft


def fan_in_fan_out(model: nn.Module, paths: Iterable[str]) -> bool:
    """Return PEFT's field of that name: whether one of these linears stores its weight as [in, out], as in GPT-2."""
    modules = map(model.get_submodule, paths)
    return any(is_transposed(m.get_base_layer() if isinstance(m, LoraLayer) else m) for m in modules)


@torch.no_grad()
def add_to_weight(base: Any, update: Tensor) -> None:
    """Add an update [out, in] permanently to the weight of an unquantised linear."""
    weight = base.weight
    weight.copy_(weight + (update.t() if is_transposed(base) else update))


def whole_groups(model: nn.Module, name: str) -> list[ParameterGroup]:
    """Return parameter groups of what the adapter `name` trains beside low-rank updates: whole modules, rows of
    embeddings, and biases."""
    state = live_adapters(model)
    modules = {
        f"{path}.{key}": p for path, module in saved_modules(model, name) for key, p in module.named_parameters()
    }
    biases = {key: state.bias_parameters[key] for key in state.biases.get(name, {})} if state else {}
    tokens = {key.removeprefix(PREFIX): rows for key, rows in token_tensors(model, name).items()}
    groups = [
        ParameterGroup("modules_to_save", modules),
        ParameterGroup("tokens", tokens),
        ParameterGroup("bias", biases, weight_decay=0.0),
    ]
    return [group for group in groups if group.parameters]


def whole_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the adapter's live whole modules, rows of embeddings and biases, keyed as in PEFT's file."""
    tensors = {
        f"{PREFIX}{path}.{k}": v for path, module in saved_modules(model, name) for k, v in module.state_dict().items()
    }
    tensors |= {key: rows.data for key, rows in token_tensors(model, name).items()}
    state = live_adapters(model)
    return tensors | {PREFIX + key: value for key, value in (state.biases.get(name, {}) if state else {}).items()}


def register_adapter(
    model: nn.Module, adapter_type: str, name: str, update: Callable[[Any, str], LowRankUpdate], bias: str = "none"
) -> None:
    """Register the adapter `name`, whose layers are on the model. It is not selected; its whole modules become fp32.

    Args:
        adapter_type: name of the strategy that owns it.
        update: creates the adapter's update for the linear of one layer.
        bias: the biases it replaces: none, lora_only (those of its linears) or all.

    Raises:
        InputError: the model has none of the biases that `bias` selects.
    """
    state = live_adapters(model)
    if state is None:
        state = model.__dict__[_STATE] = LiveAdapters()  # bypasses nn.Module: not part of the model
    state.types[name] = adapter_type
    state.chosen.setdefault(adapter_type, ([], []))
    model.__dict__.pop("peft_config", None)  # otherwise PEFT would treat another method's adapters as its own
    if bias != "none":
        parameters = _find_biases(model, name, bias)
        state.bias_parameters |= parameters
        for key, parameter in parameters.items():
            state.base_biases.setdefault(key, parameter.data)
        state.biases[name] = {key: state.base_biases[key].clone().float() for key in parameters}
    for _, layer in adapter_layers(model, name):
        base = layer.get_base_layer()
        fused = isinstance(base, ExpertLinear)
        if fused or quantizer_of(base) is not None:
            forward = state.forwards.setdefault(base, ExpertForward(base, state) if fused else _Forward(base, state))
            forward.updates[name] = update(layer, name)
            layer.forward = forward
    for _, module in saved_modules(model, name):
        in_fp32(module)
    model.train(model.training)  # PEFT creates modules in training mode, whatever the model's mode
    _apply(model, state)


def select_adapters(model: nn.Module, adapter_type: str, names: Sequence[str], index: Sequence[int] = ()) -> None:
    """Select adapters of one method; the arguments are those of its hook `use_adapters`.

    Raises:
        InputError: an adapter that replaces whole modules or biases would share a batch with others.
    """
    state = live_adapters(model)
    if state is None:
        return
    previous = state.chosen.get(adapter_type, ([], []))
    state.chosen[adapter_type] = (list(names), list(index))
    try:
        _apply(model, state)
    except InputError:
        state.chosen[adapter_type] = previous
        _apply(model, state)
        raise


def _combine(chosen: Sequence[tuple[list[str], list[int]]]) -> tuple[list[str], list[int]]:
    """Combine the names and indices of all methods; a row has at most one adapter, and the first method wins."""
    per_row = [(names, index) for names, index in chosen if index]
    if not per_row:
        return next((names for names, _ in chosen if names), []), []
    rows = zip(*([names[i] if i >= 0 else None for i in index] for names, index in per_row), strict=True)
    row_names = [next((name for name in row if name is not None), None) for row in rows]
    distinct = [name for name in dict.fromkeys(row_names) if name is not None]
    return distinct, [distinct.index(name) if name is not None else -1 for name in row_names]


def _apply(model: nn.Module, state: LiveAdapters) -> None:
    """Apply the methods' selections to names, whole modules and biases."""
    names, index = _combine(list(state.chosen.values()))
    distinct = set(names)
    single = names[0] if names and not index else None
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    if single is None:
        for wrapper in wrappers:
            for name in distinct & set(getattr(wrapper, "modules_to_save", {})):
                raise InputError(f"adapter '{name}' replaces whole modules and cannot share a batch with others.")
        for name in distinct & set(state.biases):
            raise InputError(f"adapter '{name}' replaces biases and cannot share a batch with others.")
    select_tokens(model, distinct, single)
    for wrapper in wrappers:
        replaced = single in getattr(wrapper, "modules_to_save", {})
        wrapper.enable_adapters(replaced)
        if replaced:
            wrapper.set_adapter(str(single))
    biases = state.biases.get(str(single), {})
    for key, base in state.base_biases.items():
        state.bias_parameters[key].data = biases.get(key, base)
    state.names, state.index = names, index
    state.members.clear()
    for forward in state.forwards.values():
        forward.factors.clear()


def remove_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; a linear or module without adapters becomes the base's own again."""
    state = live_adapters(model)
    if state is not None:
        adapter_type = state.types.pop(name, None)
        if adapter_type is not None and name in state.chosen[adapter_type][0]:
            state.chosen[adapter_type] = ([], [])
        state.biases.pop(name, None)
        for forward in state.forwards.values():
            forward.updates.pop(name, None)
        _apply(model, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about its new active adapter, which is not used here
        for path, module in reversed(list(model.named_modules())):  # from the inside out
            parent, _, leaf = path.rpartition(".")
            if isinstance(module, LoraLayer):
                module.delete_adapter(name)
                if not module.lora_A:
                    setattr(model.get_submodule(parent), leaf, module.base_layer)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                module.delete_adapter(name, None)
                if not module.modules_to_save:
                    setattr(model.get_submodule(parent), leaf, module.original_module)
    remove_tokens(model, name)
    model.__dict__.pop("peft_config", None)
    if state is not None and not state.types:
        model.__dict__.pop(_STATE)


def merge_whole_parts(model: nn.Module, name: str) -> None:
    """Overwrite the base's modules, rows of embeddings and biases with the adapter's.

    Its method merges the low-rank updates afterwards, when the weights that change are no longer tied to others.
    """
    if count := rows_needed(model, name):
        resize(model, count, model.config.name_or_path)  # type: ignore[union-attr,arg-type]
    tokens = list(token_rows(model, name))
    alone = [] if any(name in rows.tied for _, rows in tokens) else tokens
    untie(model, [path for path, _ in (*_layers(model, name), *saved_modules(model, name), *alone)])
    merge_tokens(model, name)
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and name in getattr(module, "modules_to_save", {}):
            module.original_module.load_state_dict(module.modules_to_save[name].state_dict())
    state = live_adapters(model)
    for key, value in state.biases.get(name, {}).items() if state else ():
        state.base_biases[key] = value.to(state.base_biases[key].dtype)  # type: ignore[union-attr]


def canonical(path: str) -> str:
    """Return the path of the base's module, without the layers wrapped around it by other methods."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def _find_biases(model: nn.Module, name: str, selection: str) -> dict[str, nn.Parameter]:
    parameters: dict[str, nn.Parameter] = {}
    adapted = {path: getattr(layer.get_base_layer(), "bias", None) for path, layer in adapter_layers(model, name)}
    for path, bias in adapted.items():
        if isinstance(bias, nn.Parameter):
            parameters[f"{path}.base_layer.bias"] = bias
    if selection == "all":
        for path, module in model.named_modules():
            bias, key = getattr(module, "bias", None), canonical(path)
            if isinstance(bias, nn.Parameter) and key not in adapted:
                parameters[f"{key}.bias"] = bias
    if not parameters:
        raise InputError(f"bias: {selection}: the model has no such biases; use bias: none.")
    return parameters

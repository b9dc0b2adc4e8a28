"""PEFT's layers on a live model: low-rank adapters of any methods side by side, chosen by name, and taken off.

A method puts its layers (subclasses of PEFT's `LoraLayer`) in the places of linears and registers the adapter here. The
layers only hold parameters: the adapted linear of each place is computed by one forward, which knows every adapter
there, of whatever method, so that methods share a model, and the rows of one batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from budwood.contract.types import ParameterGroup
from budwood.errors import InputError
from budwood.model.ops.linear import frozen_linear, low_rank_linear, mixed_low_rank_linear
from budwood.model.quantizers import is_transposed, quantizer_of

_STATE = "_budwood_adapters"
PREFIX = "base_model.model."
"""What PEFT's file puts before the path of a module."""


class LowRankUpdate:
    """What one adapter adds to one frozen linear. A method subclasses it and gives `weights`.

    Attributes:
        layer: PEFT's layer, which holds the adapter's parameters in this place.
        name: of the adapter.
    """

    mixes = True
    """Whether `weights` say all: then rows with other adapters may share a batch; else rows run one by one."""

    def __init__(self, layer: Any, name: str) -> None:
        self.layer, self.name = layer, name

    def weights(self) -> tuple[Tensor, Tensor, float] | None:
        """A [r, in], B [out, r] and the scale s of the update s B A, or None where there is none."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: nn.Linear) -> Tensor:
        """Output [..., out] of `base` with this update, for x [..., in]."""
        weights = self.weights()
        if weights is None:
            return frozen_linear(x, base)
        dropout = self.layer.lora_dropout[self.name]
        rate = dropout.p if isinstance(dropout, nn.Dropout) and self.layer.training else 0.0
        return low_rank_linear(x, base, *weights, rate)


@dataclass
class LiveAdapters:
    """The adapters on a model.

    Attributes:
        kinds: method of each adapter, by name.
        chosen: what each method was asked to use: nothing, one name for every row, or one (or None) for each row.
        names: all of `chosen` together, in the same form.
        forwards: the forward of each adapted linear.
        base_biases: the base's own values of the biases that adapters replace, by canonical name.
        biases: each adapter's values of them.
        bias_parameters: the parameters that hold now the ones, now the others.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, list[str | None]] = field(default_factory=dict)
    names: list[str | None] = field(default_factory=list)
    forwards: dict[nn.Module, _Forward] = field(default_factory=dict)
    base_biases: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    bias_parameters: dict[str, nn.Parameter] = field(default_factory=dict)


class _Forward:
    """Forward of one adapted linear under the selection."""

    def __init__(self, base: nn.Linear, state: LiveAdapters) -> None:
        self.base, self.state = base, state
        self.updates: dict[str, LowRankUpdate] = {}

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names, base = self.state.names, self.base
        here = [self.updates.get(name) if name is not None else None for name in names]
        if not any(here):
            y: Tensor = base(x)
            return y
        if len(here) == 1 and here[0] is not None:
            return here[0].forward(x, base)
        if not all(update.mixes for update in here if update is not None):
            rows = zip(x, here, strict=True)
            return torch.cat([update.forward(row[None], base) if update else base(row[None]) for row, update in rows])
        distinct = list(dict.fromkeys(here))
        adapters = [update.weights() if update is not None else None for update in distinct]
        return mixed_low_rank_linear(x, base, adapters, [distinct.index(update) for update in here])


def live_adapters(model: nn.Module) -> LiveAdapters | None:
    """What stands on `model`, or None where nothing does."""
    return model.__dict__.get(_STATE)


def adapter_layers(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """The layers that hold parameters of the adapter `name`, each with the path of the base's module it stands for."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            yield _canonical(path), module


def known_to_peft(module: nn.Module) -> bool:
    """Whether PEFT has layers of its own for a linear, however it is stored."""
    quantizer = quantizer_of(module)
    return quantizer is not None and quantizer.known_to_peft


def fan_in_fan_out(model: nn.Module, paths: Iterable[str]) -> bool:
    """PEFT's field of that name: whether one of these linears holds its weight as [in, out], as GPT-2's do."""
    modules = map(model.get_submodule, paths)
    return any(is_transposed(m.get_base_layer() if isinstance(m, LoraLayer) else m) for m in modules)


@torch.no_grad()
def add_to_weight(base: Any, update: Tensor) -> None:
    """Add an update [out, in] to the weight of an unquantised linear, for good."""
    weight = base.weight
    weight.copy_(weight + (update.t() if is_transposed(base) else update))


def saved_modules(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The whole modules that the adapter `name` replaces, each with its path."""
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and name in getattr(module, "modules_to_save", {}):
            yield path, module.modules_to_save[name]


def whole_groups(model: nn.Module, name: str) -> list[ParameterGroup]:
    """Groups of what the adapter `name` trains beside its low-rank updates: whole modules, and biases."""
    state = live_adapters(model)
    modules = {
        f"{path}.{key}": p for path, module in saved_modules(model, name) for key, p in module.named_parameters()
    }
    biases = {key: state.bias_parameters[key] for key in state.biases.get(name, {})} if state else {}
    groups = [ParameterGroup("modules_to_save", modules), ParameterGroup("bias", biases, weight_decay=0.0)]
    return [group for group in groups if group.parameters]


def whole_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's live whole modules and biases, in use or not, by key in PEFT's file."""
    tensors = {
        f"{PREFIX}{path}.{k}": v for path, module in saved_modules(model, name) for k, v in module.state_dict().items()
    }
    state = live_adapters(model)
    return tensors | {PREFIX + key: value for key, value in (state.biases.get(name, {}) if state else {}).items()}


def register_adapter(
    model: nn.Module, kind: str, name: str, update: Callable[[Any, str], LowRankUpdate], bias: str = "none"
) -> None:
    """Take charge of the adapter `name`, whose layers stand on the model: its whole modules go to fp32, not in use.

    Args:
        kind: name of the strategy that owns it.
        update: makes what the adapter adds to the linear of one layer.
        bias: which biases it replaces: none, lora_only (of its linears) or all.

    Raises:
        InputError: `bias` asks for biases that the model has not.
    """
    state = live_adapters(model)
    if state is None:
        state = model.__dict__[_STATE] = LiveAdapters()  # past nn.Module: it is no part of the model
    state.kinds[name] = kind
    state.chosen.setdefault(kind, [])
    model.__dict__.pop("peft_config", None)  # PEFT would take another method's adapters for its own
    if bias != "none":
        found = _find_biases(model, name, bias)
        state.bias_parameters |= found
        for key, parameter in found.items():
            state.base_biases.setdefault(key, parameter.data)
        state.biases[name] = {key: state.base_biases[key].clone().float() for key in found}
    for _, layer in adapter_layers(model, name):
        base = layer.get_base_layer()
        if quantizer_of(base) is not None:
            forward = state.forwards.setdefault(base, _Forward(base, state))
            forward.updates[name] = update(layer, name)
            layer.forward = forward
    for _, module in saved_modules(model, name):
        module.float()
    model.train(model.training)  # PEFT's new modules begin in training mode, whatever the model's
    _apply(model, state)


def select_adapters(model: nn.Module, kind: str, names: Sequence[str | None]) -> None:
    """Use the adapters of one method: none, one for every row, or one (or None) for each row.

    Raises:
        InputError: adapters that replace whole modules or biases are asked to share a batch with others.
    """
    state = live_adapters(model)
    if state is None:
        return
    before = state.chosen.get(kind, [])
    distinct = set(names)
    state.chosen[kind] = [] if distinct <= {None} else list(distinct) if len(distinct) == 1 else list(names)
    try:
        _apply(model, state)
    except InputError:
        state.chosen[kind] = before
        _apply(model, state)
        raise


def _apply(model: nn.Module, state: LiveAdapters) -> None:
    """Bring names, whole modules and biases in line with what the methods were asked to use."""
    several = [chosen for chosen in state.chosen.values() if len(chosen) > 1]
    if several:
        rows = zip(*several, strict=True)
        names = [next((name for name in row if name is not None), None) for row in rows]
    else:
        names = next((list(chosen) for chosen in state.chosen.values() if chosen), [])
    distinct = set(names)
    one = names[0] if len(names) == 1 else None
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    if one is None:
        for wrapper in wrappers:
            for name in distinct & set(getattr(wrapper, "modules_to_save", {})):
                raise InputError(f"adapter '{name}' replaces whole modules and cannot share a batch with others.")
        for name in distinct & set(state.biases):
            raise InputError(f"adapter '{name}' replaces biases and cannot share a batch with others.")
    for wrapper in wrappers:
        inside = one in getattr(wrapper, "modules_to_save", {})
        wrapper.enable_adapters(inside)
        if inside:
            wrapper.set_adapter(str(one))
    own = state.biases.get(str(one), {})
    for key, base in state.base_biases.items():
        state.bias_parameters[key].data = own.get(key, base)
    state.names = names


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter off; a linear or module without any left is the base's own again."""
    state = live_adapters(model)
    if state is not None:
        kind = state.kinds.pop(name, None)
        if kind is not None and name in state.chosen[kind]:
            state.chosen[kind] = []
        state.biases.pop(name, None)
        for forward in state.forwards.values():
            forward.updates.pop(name, None)
        _apply(model, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PEFT chooses another active adapter, which nothing here reads
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
    model.__dict__.pop("peft_config", None)
    if state is not None and not state.kinds:
        model.__dict__.pop(_STATE)


def merge_whole_parts(model: nn.Module, name: str) -> None:
    """Write the adapter's whole modules and biases over the base's, for good; its low-rank updates are its method's."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and name in getattr(module, "modules_to_save", {}):
            module.original_module.load_state_dict(module.modules_to_save[name].state_dict())
    state = live_adapters(model)
    for key, value in state.biases.get(name, {}).items() if state else ():
        state.base_biases[key] = value.to(state.base_biases[key].dtype)  # type: ignore[union-attr]


def _canonical(path: str) -> str:
    """Path of the base's module: without the layers that other methods have put around it."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def _find_biases(model: nn.Module, name: str, which: str) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    adapted = {path: layer.get_base_layer().bias for path, layer in adapter_layers(model, name)}
    for path, bias in adapted.items():
        if isinstance(bias, nn.Parameter):
            found[f"{path}.base_layer.bias"] = bias
    if which == "all":
        for path, module in model.named_modules():
            bias, key = getattr(module, "bias", None), _canonical(path)
            if isinstance(bias, nn.Parameter) and key not in adapted:
                found[f"{key}.bias"] = bias
    if not found:
        raise InputError(f"bias: {which}: the model has no such biases; use bias: none.")
    return found

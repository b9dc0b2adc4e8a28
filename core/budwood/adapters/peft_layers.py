"""PEFT's layers on a live model: low-rank adapters of any methods side by side, chosen by name, and taken off.

A method puts its layers (subclasses of PEFT's `LoraLayer`) in the places of linears and registers the adapter here. The
layers only hold parameters: the adapted linear of each place is computed by one forward, which knows every adapter
there, of whatever method, so that methods share a model, and the rows of one batch.
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

from budwood.adapters.peft_config import PREFIX
from budwood.adapters.whole import saved_modules, untie
from budwood.contract.types import ParameterGroup
from budwood.errors import InputError
from budwood.model.ops.linear import add_update, cast_factors, frozen_linear, low_rank_linear
from budwood.model.quantizers import is_transposed, quantizer_of

_STATE = "_budwood_adapters"


class LowRankUpdate:
    """What one adapter adds to one frozen linear. A method subclasses it and gives `weights`.

    Attributes:
        layer: PEFT's layer, which holds the adapter's parameters in this place.
        name: of the adapter.
    """

    mixes = True
    """Whether `weights` say all: then other adapters' rows share its products; else it computes slices of its own."""

    def __init__(self, layer: Any, name: str) -> None:
        self.layer, self.name = layer, name

    def weights(self) -> tuple[Tensor, Tensor, float] | None:
        """A [r, in], B [out, r] and the scale s of the update s B A, or None where there is none."""
        raise NotImplementedError

    def sources(self) -> tuple[Tensor, ...]:
        """The tensors that `weights` are made of: when one changes, what is cached is stale. (): nothing is cached."""
        return ()

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
        types: type of each adapter, by name.
        chosen: what each method was asked to use: names, and for each row an index into them; no index: the one name.
        names: distinct names in use, of all methods together.
        index: of `names`, for each row of a batch, or each position; -1: the base alone. Empty: one name for all.
        members: rows of each name, on the device of their batch, once somebody has asked.
        forwards: the forward of each adapted linear.
        base_biases: the base's own values of the biases that adapters replace, by canonical name.
        biases: each adapter's values of them.
        bias_parameters: the parameters that hold now the ones, now the others.
    """

    types: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, tuple[list[str], list[int]]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    members: dict[str, Tensor] = field(default_factory=dict)
    forwards: dict[nn.Module, _Forward] = field(default_factory=dict)
    base_biases: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    bias_parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    def rows(self, name: str, device: torch.device) -> Tensor:
        """Rows [n] int64 that the adapter `name` computes."""
        found = self.members.get(name)
        if found is None or found.device != device:
            which = self.names.index(name)
            chosen = [row for row, i in enumerate(self.index) if i == which]
            found = self.members[name] = torch.tensor(chosen, device=device)
        return found


class _Forward:
    """Forward of one adapted linear under the selection."""

    def __init__(self, base: Any, state: LiveAdapters) -> None:
        self.base, self.state = base, state
        self.updates: dict[str, LowRankUpdate] = {}
        self.factors: dict[str, _Factors] = {}

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state, base = self.state, self.base
        here = [name for name in state.names if name in self.updates]
        if not here:
            y: Tensor = base(x)
            return y
        if not state.index:
            return self.updates[here[0]].forward(x, base)
        rows = x if len(x) == len(state.index) else x.reshape(-1, x.shape[-1])
        if len(rows) != len(state.index):
            raise ValueError(f"adapters were chosen for {len(state.index)} rows, and the input is {list(x.shape)}")
        if not all(self.updates[name].mixes for name in here):
            return self._slices(rows).view(*x.shape[:-1], -1)
        y = frozen_linear(rows, base)
        for name in here:
            factors = self._factors(name, y.dtype)
            if factors is not None:
                y = add_update(rows, y, *factors, state.rows(name, x.device))
        return y.view(*x.shape[:-1], -1)

    def _slices(self, x: Tensor) -> Tensor:
        """Compute neighbouring rows of one adapter together, one run after another."""
        parts, start = [], 0
        for which, run in itertools.groupby(self.state.index):
            stop = start + len(list(run))
            update = self.updates.get(self.state.names[which]) if which >= 0 else None
            parts.append(update.forward(x[start:stop], self.base) if update else self.base(x[start:stop]))
            start = stop
        return torch.cat(parts)

    def _factors(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """A and s B in `dtype`; cached while nobody wants a gradient."""
        update = self.updates[name]
        if torch.is_grad_enabled() or not update.sources():
            return _cast(update, dtype)
        kept = self.factors.get(name)
        if kept is None or not kept.fits(update, dtype):
            kept = self.factors[name] = _Factors(update, dtype)
        return kept.value


class _Factors:
    """An adapter's cast factors, and the version of what they were made of."""

    def __init__(self, update: LowRankUpdate, dtype: torch.dtype) -> None:
        self.value, self.dtype, self.version = _cast(update, dtype), dtype, _version(update)
        self.sources = [source.detach() for source in update.sources()]  # so that no other tensor takes their places

    def fits(self, update: LowRankUpdate, dtype: torch.dtype) -> bool:
        """Whether they are still what `update` gives in `dtype`."""
        return dtype == self.dtype and self.version == _version(update)


def _version(update: LowRankUpdate) -> tuple[Any, ...]:
    """Changes with every change in place of a source (training, loading), and where one is replaced."""
    layer = update.layer
    return (*((source.data_ptr(), source._version) for source in update.sources()), layer.scaling[update.name])


def _cast(update: LowRankUpdate, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    weights = update.weights()
    return None if weights is None else cast_factors(*weights, dtype)


def live_adapters(model: nn.Module) -> LiveAdapters | None:
    """What stands on `model`, or None where nothing does."""
    return model.__dict__.get(_STATE)


def adapter_layers(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """The layers that hold parameters of the adapter `name`, each with the path of the base's module it stands for."""
    for path, module in _layers(model, name):
        yield _canonical(path), module


def _layers(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            yield path, module


def describe_adapter(model: nn.Module, name: str) -> str:
    """Return on which modules the adapter `name` stands, for the user; empty if no layer of PEFT's is its."""
    counts: dict[str, int] = {}
    for path, _ in adapter_layers(model, name):
        last = path.rpartition(".")[2]
        counts[last] = counts.get(last, 0) + 1
    whole = [_canonical(path) for path, _ in saved_modules(model, name)]
    parts = (
        [f"{sum(counts.values()):,} linears ({', '.join(f'{n} {last}' for last, n in counts.items())})"]
        if counts
        else []
    )
    if whole:
        parts.append(f"whole: {', '.join(whole[:6])}" + (f" and {len(whole) - 6:,} more" if len(whole) > 6 else ""))
    return "; ".join(parts)


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
    model: nn.Module, adapter_type: str, name: str, update: Callable[[Any, str], LowRankUpdate], bias: str = "none"
) -> None:
    """Take charge of the adapter `name`, whose layers stand on the model: its whole modules go to fp32, not in use.

    Args:
        adapter_type: name of the strategy that owns it.
        update: makes what the adapter adds to the linear of one layer.
        bias: which biases it replaces: none, lora_only (of its linears) or all.

    Raises:
        InputError: `bias` asks for biases that the model has not.
    """
    state = live_adapters(model)
    if state is None:
        state = model.__dict__[_STATE] = LiveAdapters()  # past nn.Module: it is no part of the model
    state.types[name] = adapter_type
    state.chosen.setdefault(adapter_type, ([], []))
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


def select_adapters(model: nn.Module, adapter_type: str, names: Sequence[str], index: Sequence[int] = ()) -> None:
    """Use adapters of one method: what its hook `use_adapters` is given.

    Raises:
        InputError: adapters that replace whole modules or biases are asked to share a batch with others.
    """
    state = live_adapters(model)
    if state is None:
        return
    before = state.chosen.get(adapter_type, ([], []))
    state.chosen[adapter_type] = (list(names), list(index))
    try:
        _apply(model, state)
    except InputError:
        state.chosen[adapter_type] = before
        _apply(model, state)
        raise


def _combine(chosen: Sequence[tuple[list[str], list[int]]]) -> tuple[list[str], list[int]]:
    """Names and index of all methods together; each row has one adapter at most, and the first method's counts."""
    several = [(names, index) for names, index in chosen if index]
    if not several:
        return next((names for names, _ in chosen if names), []), []
    rows = zip(*([names[i] if i >= 0 else None for i in index] for names, index in several), strict=True)
    row_names = [next((name for name in row if name is not None), None) for row in rows]
    together = [name for name in dict.fromkeys(row_names) if name is not None]
    return together, [together.index(name) if name is not None else -1 for name in row_names]


def _apply(model: nn.Module, state: LiveAdapters) -> None:
    """Bring names, whole modules and biases in line with what the methods were asked to use."""
    names, index = _combine(list(state.chosen.values()))
    distinct = set(names)
    one = names[0] if names and not index else None
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
    state.names, state.index = names, index
    state.members.clear()
    for forward in state.forwards.values():
        forward.factors.clear()


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter off; a linear or module without any left is the base's own again."""
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
    if state is not None and not state.types:
        model.__dict__.pop(_STATE)


def merge_whole_parts(model: nn.Module, name: str) -> None:
    """Write the adapter's whole modules and biases over the base's, for good.

    Its method merges the low-rank updates afterwards: what is tied to a module that changes is separate by then.
    """
    untie(model, [path for path, _ in (*_layers(model, name), *saved_modules(model, name))])
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

"""The experts of a mixture: routed products in place of transformers' forward, quantised as they are read, counted.

transformers stores the projections of all experts of a layer as parameters [experts, out, in] of one module. Opening a
model gives each projection a module of its own, `ExpertLinear`, which a quantiser may store and an adapter may wrap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from budwood.contract.calls import attribute_errors
from budwood.errors import CorruptError
from budwood.model.ops.experts import Routing, combine, dispatch
from budwood.model.quantizers.experts import DenseExperts, ExpertLinear
from budwood.model.quantizers.protocol import Quantizer

_COUNTS = ("num_experts", "num_routed_experts", "moe_num_experts")
"""Names by which modules of transformers give their number of experts."""
_PACKED = "_budwood_packed"
_PATH = "_budwood_path"
_LOAD = "_budwood_load"
_CHOICES = "_budwood_choices"


@dataclass(frozen=True)
class Experts:
    """Number of fused experts in a model, over all layers.

    Attributes:
        total: all fused experts.
        quantized: those with quantised weights.
        trained: those with trainable parameters: adapters, or the experts themselves.
    """

    total: int = 0
    quantized: int = 0
    trained: int = 0


def count_experts(model: nn.Module) -> Experts:
    """Count the fused experts of a model, which may have adapters."""
    total = quantized = trained = 0
    for path, experts, is_quantized in fused_experts(model):
        if ".modules_to_save." in path:
            continue  # an adapter's copy
        total += experts
        quantized += experts if is_quantized else 0
        trained += experts if trains(model, path) else 0
    return Experts(total, quantized, trained)


def trains(model: nn.Module, path: str) -> bool:
    """Return whether the experts of the module at `path`, or their adapters, have parameters that train."""
    outer = path.split(".base_layer")[0].split(".original_module")[0]  # the PEFT layer around it, if any
    return any(parameter.requires_grad for parameter in model.get_submodule(outer).parameters())


def fused_experts(model: nn.Module) -> Iterator[tuple[str, int, bool]]:
    """Yield the modules with fused experts: path, number of experts, and whether all their weights are quantised.

    In transformers' own modules these are parameters [experts, …, …] or, in DBRX, [experts · inner, …].
    """
    for path, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            projections = [part for part in module.modules() if isinstance(part, ExpertLinear)]
            yield path, projections[0].experts, all(part.quantized for part in projections)
            continue
        experts = next((count for name in _COUNTS if isinstance(count := getattr(module, name, None), int)), 0)
        stacked = isinstance(getattr(module, "moe_num_experts", None), int)
        fused = [
            p
            for p in module.parameters(recurse=False)
            if (p.ndim == 3 and len(p) == experts) or (stacked and p.ndim == 2 and experts and len(p) % experts == 0)
        ]
        if fused:
            yield path, experts, not any(p.is_floating_point() for p in fused)


class RoutedExperts(nn.Module):
    """What an opened module of experts is in addition to its class in transformers; see `open_experts`."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the outputs of each token's experts.

        Args:
            hidden_states: [n, d].
            top_k_index: [n, k] int64, the experts that the router chose.
            top_k_weights: [n, k], their weights.

        Returns:
            [n, d] in the dtype of `hidden_states`.
        """
        own: Any = self
        if _CHOICES in self.__dict__:
            top_k_index, top_k_weights = self.__dict__[_CHOICES].follow(top_k_index, top_k_weights)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        inner = own.gate_up_proj if own.has_gate else own.up_proj
        routing = Routing.of(top_k_index.reshape(len(x), -1), experts_in(own))
        if self.training:
            self.__dict__[_LOAD] = [a + b for a, b in zip(expert_load(self), routing.counts, strict=True)]
        y = inner(dispatch(x, routing), routing)
        if own.has_bias:
            bias = own.gate_up_proj_bias if own.has_gate else own.up_proj_bias
            y = y + bias.index_select(0, routing.ids).to(y.dtype)
        y = own._apply_gate(y) if own.has_gate else own.act_fn(y)
        y = own.down_proj(y, routing)
        if own.has_bias:
            y = y + own.down_proj_bias.index_select(0, routing.ids).to(y.dtype)
        if own.has_post_expert_norm:
            y = own.post_expert_norm(y)
        return combine(y, top_k_weights.reshape(routing.shape), routing).to(hidden_states.dtype).view_as(hidden_states)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name, part in self.named_children():
            if isinstance(part, DenseExperts) and prefix + name in state_dict:
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(prefix + name)  # which its own call then finds
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Choices:
    """The experts that each token of some forwards chose, for a forward of all of these tokens together."""

    def __init__(self) -> None:
        self.recorded: list[tuple[Tensor, Tensor]] = []
        self.recording = True

    def follow(self, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Record choices, or return those recorded if they are for as many tokens."""
        if self.recording:
            self.recorded.append((index, weights))
            return index, weights
        indices, every = zip(*self.recorded, strict=True)
        joined, weighed = torch.cat(indices), torch.cat(every)
        return (joined, weighed) if joined.shape == index.shape else (index, weights)


@contextmanager
def same_routing(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Let a later forward choose the experts that earlier ones chose for the same tokens.

    Two kernels round differently in 16 bit, which near a tie of a router chooses another expert. The forwards until the
    yielded function is called are recorded; those after it that have all of their tokens, in order, repeat them.
    """
    choices = [
        module.__dict__.setdefault(_CHOICES, _Choices())
        for module in model.modules()
        if isinstance(module, RoutedExperts)
    ]

    def repeat() -> None:
        for choice in choices:
            choice.recording = False

    try:
        yield repeat
    finally:
        for module in model.modules():
            module.__dict__.pop(_CHOICES, None)


def experts_in(module: Any) -> int:
    """Return the number of experts of an opened module."""
    return next(part.experts for part in module.modules() if isinstance(part, ExpertLinear))


def expert_load(module: RoutedExperts) -> list[int]:
    """Return the number of tokens that each expert of a module has got in training."""
    load: list[int] = module.__dict__.get(_LOAD) or [0] * experts_in(module)
    return load


def open_experts(model: nn.Module) -> None:
    """Give the expert projections of a model modules of their own, with the parameters or what was packed of them.

    A module's state dict keeps the names of transformers. Modules of another form than transformers' are left alone.
    """
    for module in list(model.modules()):
        names = _projections(module)
        if not names:
            continue
        packed = module.__dict__.pop(_PACKED, {})
        module.__dict__.pop(_PATH, None)
        for name in names:
            weight: Any = module._parameters.pop(name)
            linear = packed.get(name) or DenseExperts(weight, bool(module.is_transposed))
            setattr(module, name, linear)
        module.__class__ = _opened(type(module))  # type: ignore[arg-type]


def mark_quantized(frame: nn.Module, quantizer: Quantizer) -> None:
    """Mark the experts of an opened model without weights as quantised, if the quantiser would pack them."""
    if type(quantizer).pack_experts is not Quantizer.pack_experts:
        for module in frame.modules():
            if isinstance(module, ExpertLinear):
                module.quantized = True


def close_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the experts of a model back to transformers' own forward and parameters, dequantised in `dtype`."""
    for module in [module for module in model.modules() if isinstance(module, RoutedExperts)]:
        for name, linear in list(module.named_children()):
            if isinstance(linear, ExpertLinear):
                weight = linear.dequantize(0, linear.experts, dtype)
                weight = weight.transpose(1, 2) if module.is_transposed else weight
                delattr(module, name)
                setattr(module, name, nn.Parameter(weight.contiguous(), requires_grad=False))
        module.__class__ = type(module).__mro__[2]


def plan_experts(model: nn.Module, quantizer: Quantizer, double_quantization: bool) -> None:
    """Replace the projections of an opened model by the quantiser's, with fake tensors."""
    for module in [module for module in model.modules() if isinstance(module, RoutedExperts)]:
        for name, linear in list(module.named_children()):
            if isinstance(linear, ExpertLinear):
                shape = (linear.experts, linear.out_features, linear.in_features)
                setattr(module, name, quantizer.planned_experts(shape, double_quantization) or linear)


@contextmanager
def packed_as_read(frame: nn.Module, quantizer: Quantizer, double_quantization: bool) -> Iterator[None]:
    """Quantise the experts of models of the same classes as `frame`'s, whenever a projection is assigned.

    What is assigned is replaced by a parameter of that shape without memory, so that a model's experts never exist
    together in 16 bit. `open_experts` takes what was packed.

    Args:
        frame: an opened model.
    """
    paths: dict[type[nn.Module], list[str]] = {}
    for path, module in frame.named_modules():
        if isinstance(module, RoutedExperts):
            paths.setdefault(type(module).__mro__[2], []).append(path)
    left = {cls: iter(own) for cls, own in paths.items()}  # a model builds its modules in the frame's order

    def assign(self: Any, name: str, value: Any) -> None:
        if _PATH not in self.__dict__:
            self.__dict__[_PATH] = next(left[type(self)], "")
        if isinstance(value, nn.Parameter) and value.device.type != "meta" and name in _projections(self):
            weight = value.detach().transpose(1, 2) if self.is_transposed else value.detach()
            try:
                with attribute_errors(quantizer, "pack_experts"), torch.no_grad():
                    linear = quantizer.pack_experts(weight, double_quantization)
            except CorruptError as error:
                raise CorruptError(f"the base's '{self.__dict__[_PATH]}.{name}': {error}") from error
            if linear is not None:
                self.__dict__.setdefault(_PACKED, {})[name] = linear
                value = nn.Parameter(value.new_zeros(()).expand(value.shape), requires_grad=False)
                value._is_hf_initialized = True  # else transformers would fill it
        nn.Module.__setattr__(self, name, value)

    for cls in paths:
        cls.__setattr__ = assign  # type: ignore[method-assign]
    try:
        yield
    finally:
        for cls in paths:
            del cls.__setattr__


@cache
def _opened(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (RoutedExperts, cls), {"__module__": cls.__module__})


def _projections(module: nn.Module) -> list[str]:
    """Return the names of the fused projections of one of transformers' modules of experts; [] if it is none."""
    if not all(isinstance(getattr(module, flag, None), bool) for flag in ("has_gate", "has_bias", "is_transposed")):
        return []
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    found = [module._parameters.get(name) for name in names]
    return names if all(p is not None and p.ndim == 3 for p in found) else []

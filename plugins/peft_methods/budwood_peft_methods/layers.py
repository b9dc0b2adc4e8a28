"""PEFT's layers of a method, built beside the model, and what puts them into it.

PEFT's tuner runs on a copy of the module tree that holds only the targets, and there only stand-ins: linears that
compute the base's frozen product, whatever stores its weight. So PEFT's own layers compute every method, the parameters
and their names in the file are PEFT's, and a method that needs no more than this product runs on any quantised base.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from peft.tuners.boft import layer as boft
from peft.tuners.lora import LoraLayer
from peft.tuners.shira.layer import ShiraLayer
from peft.tuners.supertuning.layer import SupertuningLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from budwood import CorruptError, InputError, linear_shape
from budwood.lowrank import LowRankUpdate, check_replaced, frozen_linear
from budwood_peft_methods.forwards import INNER, Computed
from budwood_peft_methods.starts import set_start, stand_ins_accepted


class StandIn(nn.Linear):
    """The linear that PEFT's layer sees: the shape and the product of a frozen module, without parameters of its own.

    Attributes:
        opened: whether `weight` is the base's, as methods that compute with it need; until then it has only a shape.
    """

    def __init__(self, base: Any) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear_shape(base)
        self.__dict__["base"] = base  # bypasses nn.Module: no part of the adapter
        self.__dict__["merging"] = self.__dict__["given"] = None
        self.opened = False

    @property
    def weight(self) -> Any:  # type: ignore[override]
        base = self.__dict__["base"]
        if self.__dict__["merging"] is not None:
            return self.__dict__["merging"][0]
        if self.opened:
            return base.weight.t() if is_transposed(base) else base.weight
        device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
        return torch.zeros((), device=device).expand(self.out_features, self.in_features)

    @property
    def bias(self) -> Any:  # type: ignore[override]
        merging = self.__dict__["merging"]
        return getattr(self.__dict__["base"], "bias", None) if merging is None else merging[1]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = self.__dict__["given"]
        return given[1] if given is not None and x is given[0] else frozen_linear(x, self.__dict__["base"])

    @torch.no_grad()
    def merge(self, layer: Any) -> None:
        """Merge an unquantised linear's layer into its weight and bias."""
        base = self.__dict__["base"]
        transposed, bias = is_transposed(base), base.bias
        weight = (base.weight.t() if transposed else base.weight).detach().clone(memory_format=torch.contiguous_format)
        copies = (nn.Parameter(weight), None if bias is None else nn.Parameter(bias.detach().clone()))
        self.__dict__["merging"] = copies
        if isinstance(layer, boft.Linear):
            layer.boft_P = torch.eye(self.in_features, device=weight.device)[None]
        try:
            layer.merge(safe_merge=True)
            merged = self.weight.detach()
            base.weight.copy_(merged.t() if transposed else merged)
            if bias is not None:
                bias.copy_(self.bias.detach())
        finally:
            self.__dict__["merging"] = None


class Adapter:
    """PEFT's layers of one adapter, by path of the base's module."""

    def __init__(self, peft: Any, layers: Mapping[str, Any]) -> None:
        self.peft, self.layers = peft, dict(layers)

    def slots(self) -> dict[str, Tensor]:
        """Return the live tensors of the adapter, by key in PEFT's file."""
        found = get_peft_model_state_dict(self.peft, adapter_name=INNER, save_embedding_layers=False)
        return {key: tensor.detach() for key, tensor in found.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name; those that all layers share come once."""
        named = self.peft.named_parameters()
        return {name.removeprefix("base_model.model.").replace(f".{INNER}", ""): p for name, p in named}


class MethodLayer(nn.Module, LoraLayer):
    """The place of PEFT's layers in the model, on the linear that they adapt; `MethodUpdate` computes the forward.

    It is a layer of PEFT's LoRA, whose A is the other method's layer, so that adapters of all methods share one place.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a class unknown to PEFT
            LoraLayer.__init__(self, base_layer)
        self.out_features, self.in_features = linear_shape(self.get_base_layer())


class MethodUpdate(LowRankUpdate):
    """The forward of one linear with PEFT's layer of a method."""

    mixes = False

    def forward(self, x: Tensor, base: nn.Linear) -> Tensor:
        y: Tensor = self.layer.lora_A[self.name](x)
        return y


class _Place(nn.Module):
    """A node of the copied module tree."""


def build(
    model: nn.Module,
    config: Any,
    targets: Sequence[str],
    needs_weight: bool,
    new: bool = False,
    planning: bool = False,
) -> Adapter:
    """Build PEFT's layers for the targets of a config, in fp32 on the devices of the base's modules.

    Args:
        config: PEFT's.
        targets: full names of linears, in the order in which their parameters are drawn; PEFT's own are a set.
        new: the adapter is no saved one, whose file has the values that depend on the weights.
        planning: tensors have no values, so that what depends on these is left out.

    Raises:
        InputError: the method needs the weight of a module that is quantised; or PEFT refuses a module.
    """
    root: Any = _Place()
    root.hf_device_map = {}  # RoAd's tuner asks for it, or for the device of a parameter, of which there are none
    if planning and hasattr(config, "mask_fn"):
        config.mask_fn = None
    for path in targets:
        base = base_of(model.get_submodule(path))
        if needs_weight:
            check_weight(path, base, str(config.peft_type.value).lower())
        *parents, leaf = path.split(".")
        place: nn.Module = root
        for part in parents:
            if part not in place._modules:
                place.add_module(part, _Place())
            place = place.get_submodule(part)
        place.add_module(leaf, StandIn(base))
    try:
        with warnings.catch_warnings(), stand_ins_accepted():
            warnings.simplefilter("ignore")  # about fan_in_fan_out, and fields that are meant for other modules
            peft: Any = get_peft_model(root, config, adapter_name=INNER)  # type: ignore[arg-type]
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"PEFT refuses these options for this base: {' '.join(str(error).split())}") from error
    layers = dict(_layers(peft.base_model.model))
    set_start(layers, config, new, planning)
    for layer in layers.values():
        layer.get_base_layer().opened = needs_weight
    return Adapter(peft, layers)


def add_layers(model: nn.Module, adapter: Adapter, name: str) -> None:
    """Put the adapter's layers in their places in the model, in place."""
    check_replaced(model, adapter.layers)
    for path, layer in adapter.layers.items():
        parent, _, leaf = path.rpartition(".")
        module = model.get_submodule(path)
        if not isinstance(module, LoraLayer):
            module = MethodLayer(module)
            setattr(model.get_submodule(parent), leaf, module)
        module.lora_A[name] = Computed(layer)


def check_positions(adapter: Adapter) -> None:
    """Check that the positions in a file of SHiRA or Super-Tuning lie within the weights.

    Raises:
        CorruptError: one does not.
    """
    for path, layer in adapter.layers.items():
        if isinstance(layer, ShiraLayer):
            positions, ends = layer.shira_indices[INNER], (layer.out_features, layer.in_features)
        elif isinstance(layer, SupertuningLayer):
            positions, ends = layer.supertuning_indices[INNER][None], (layer.out_features * layer.in_features,)
        else:
            continue
        if isinstance(positions, FakeTensor):  # a plan
            continue
        for row, end in zip(positions, ends, strict=True):
            if len(row) and not 0 <= int(row.min()) <= int(row.max()) < end:
                raise CorruptError(f"the adapter's positions in '{path}' lie outside of its weight.")


def base_of(module: Any) -> Any:
    """Return the base's module, without the layers of other adapters on it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_transposed(base: Any) -> bool:
    """Whether a linear stores its weight as [in, out], as transformers' Conv1D does."""
    return type(base).__name__ == "Conv1D"


def check_weight(path: str, base: Any, method: str) -> None:
    """Check that a linear holds its weight.

    Raises:
        InputError: it is quantised.
    """
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        raise InputError(
            f"{method} computes with the base's weight, which '{path}' does not hold, since it is quantised: use "
            "quantization: none, or a method that adds to its output."
        )


def _layers(root: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in root.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path, module

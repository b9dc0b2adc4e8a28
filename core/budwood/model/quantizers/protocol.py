"""The interface of quantisers, which define how the frozen linears of a base are stored and computed.

A quantiser is registered in the entry point group `budwood.quantizers`, under the name that recipes use.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from budwood.contract.strategy import Plugin
from budwood.parallel.sharding import whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from budwood.model.quantizers.experts import ExpertLinear
    from budwood.untrusted.formats import TensorInfo


ROOM = "_budwood_room"
"""Attribute of a linear that may keep its dequantised weight."""


class Quantizer(Plugin):
    """Base class of quantisers. A subclass declares `api = 2`.

    The methods up to `after_load` are for loading a base. The others take one linear module of this quantiser, which
    need not be an `nn.Linear`; its bias, if it has one, is the attribute `bias`.
    """

    group = "budwood.quantizers"
    name: str
    """Name of the entry point, used in recipes; set by the registry."""
    takes_fused_experts: bool = True
    """False: fused expert tensors (three-dimensional) that `pack_experts` does not take would stay in 16 bit, so such a
    base is refused."""
    dequantizes: bool = False
    """True: a stored checkpoint is dequantised as it is read: its linears are `nn.Linear` in the compute dtype."""
    stored_only: bool = False
    """True: reads checkpoints that are quantised already, and quantises none."""
    needs_files: bool = False
    """True: a stored checkpoint loads from its files, since its library reads more of them than tensors."""
    stored_names: str = ""
    """Regular expression that the name of some tensor in each of its checkpoints matches; "": not checked. With
    `own_modules` it matches one tensor of each packed linear, from the end of the linear's name on."""
    own_modules: bool = False
    """True: its checkpoints load into modules of its own, which `replace` returns, and no other library is asked."""
    shards: bool = False
    """Whether its linears compute with weights that are sharded over processes; see `shard`."""
    rounds_inputs: bool = False
    """Whether its linears round their inputs to 8 bits or less, so that a difference in the last bit of fp32 may become
    one of a percent."""
    known_to_peft: bool = False
    """Whether PEFT has layers for these linears, which DoRA needs."""

    def check(self, device: str) -> None:
        """Check that the quantiser works on this machine; `device` is a torch device such as "cuda:0".

        Raises:
            ResourceError: a library is missing, or does not support the device.
        """

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Return whether a checkpoint with this `quantization_config` was saved by this quantiser."""
        return False

    def check_stored(self, config: Mapping[str, Any], device: str | None) -> None:
        """Check that adapters can be trained on a stored checkpoint with this `quantization_config`.

        It is called before weights are read, and before `check`.

        Args:
            device: a torch device such as "cuda:0"; None: not known yet.

        Raises:
            InputError: they cannot; the message names the reason and the remedy.
        """

    def check_saved(
        self, path: str, shape: tuple[int, int], config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> None:
        """Check the tensors of a linear in a checkpoint that another library loads, before weights are read.

        Args:
            path: the name of the linear in the checkpoint.
            shape: its numbers of outputs and inputs.
            config: the checkpoint's `quantization_config`.
            tensors: those of its tensors that there are, by their names in it, such as "weight.absmax"; each has a
                `shape`, a `dtype` as safetensors names it, and its `file`.

        Raises:
            InputError, CorruptError: they contradict the configuration or each other.
        """

    def check_saved_experts(
        self, path: str, shape: tuple[int, int, int], config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> None:
        """Check the tensors of a projection of all experts of a layer, as `check_saved` does those of a linear.

        Args:
            path: the name of the projection in the checkpoint.
            shape: its numbers of experts, outputs and inputs.
            tensors: by the ends of their names after the projection's, such as "_scales".

        Raises:
            InputError, CorruptError: they contradict the configuration or each other.
        """

    def stored_config(self, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """Return the `quantization_config` to load such a checkpoint with, such that it computes in `dtype`."""
        return dict(config)

    def replace(self, path: str, module: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
        """Return the module into which the tensors of a packed linear load, with `own_modules`.

        Its parameters and buffers, on the meta device, have the names, shapes and dtypes of the checkpoint's tensors;
        plans use it too.

        Args:
            path: the name of the linear in the checkpoint.
            module: the unquantised linear, on the meta device.
            config: the checkpoint's `quantization_config`.
            tensors: the tensors of this linear, by their names in it, such as "scales", on the meta device.

        Raises:
            InputError, CorruptError: it is in a format that is not read; its tensors contradict each other.
        """
        raise NotImplementedError(f"{self} declares own_modules, but does not implement replace")

    def config(self, dtype: torch.dtype, double_quantization: bool, skip: list[str]) -> Any:
        """Return transformers' `quantization_config` for an unquantised checkpoint, or None.

        Args:
            dtype: dtype of matrix products.
            double_quantization: also quantise the quantisation constants, if the method supports it.
            skip: names of modules that are not quantised (heads).
        """
        return None

    def after_load(self, model: nn.Module, skip: list[str]) -> None:
        """Modify a newly loaded model if necessary, for example to replace its linears.

        Args:
            model: modified in place; every parameter is frozen afterwards.
            skip: names of modules that are not quantised (heads).
        """

    def planned(self, module: nn.Module, dtype: torch.dtype, double_quantization: bool) -> nn.Module | None:
        """Return the linear that would replace `module` in a quantised base, with fake weights; for plans of memory.

        Its weights have the shapes and dtypes of real ones, and this quantiser's other methods work on it. None: a plan
        calls `after_load` on the unquantised model instead.

        Args:
            module: an unquantised linear; its weight may be on the meta device.
            dtype: compute dtype of the base.
            double_quantization: as for `config`.
        """
        return None

    def pack_experts(self, weight: Tensor, double_quantization: bool) -> ExpertLinear | None:
        """Return the linears of all experts of a mixture, quantised expert by expert; None: they stay as they are.

        A CorruptError that it raises gets the name of the projection in front.

        Args:
            weight: [E, out, in], on the device of the base, as one checkpoint tensor after the other is read.
            double_quantization: as for `config`.
        """
        return None

    def planned_experts(self, shape: tuple[int, int, int], double_quantization: bool) -> ExpertLinear | None:
        """Return what `pack_experts` returns for a weight [E, out, in], with fake tensors; for plans of memory."""
        return None

    def shard(self, module: Any) -> None:
        """Prepare a linear for sharding, if `shards`: core shards the module's parameters of two dimensions or more.

        What holds the weights becomes such parameters, frozen, which the other methods read whenever they are called:
        in a pass they are complete, and between passes `budwood.parallel.sharding.whole` gathers them.
        """

    def sharded_tensors(self, module: Any) -> list[Tensor]:
        """Return the tensors that `shard` would make such parameters; for plans of memory."""
        return [self.weight(module)]

    def is_linear(self, module: nn.Module) -> bool:
        """Return whether `module` is a linear that this quantiser stores."""
        return False

    def weight(self, module: Any) -> Tensor:
        """Return the tensor of the weight, packed or not; its device and `requires_grad` are those of the linear."""
        weight: Tensor = module.weight
        return weight

    def constants(self, module: Any) -> list[Tensor]:
        """Return the tensors stored in addition to `weight` to dequantise it: scales, zero points, tables."""
        return []

    def bytes(self, module: Any) -> int:
        """Return the stored size of the weight in bytes, including constants."""
        return sum({t.data_ptr(): t.nbytes for t in (self.weight(module), *self.constants(module))}.values())

    def shape(self, module: Any) -> tuple[int, int]:
        """Return the number of outputs and inputs of the stored weight."""
        return module.out_features, module.in_features

    def forward(self, module: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + bias as the module's own forward computes it, without a graph.

        Args:
            x: [n, in] in the compute dtype.
            bias: [out], the module's bias, or None.

        Returns:
            [n, out] in the dtype of `x`; a new tensor, which the caller may modify.
        """
        from torch.nn import functional

        return functional.linear(x, self.dequantized(module, x.dtype), None if bias is None else bias.to(x.dtype))

    @property
    def dense(self) -> bool:
        """Whether `forward` is the product with what `dequantize` returns, and nothing else."""
        return type(self).forward is Quantizer.forward

    def stacks(self, module: Any) -> bool:
        """Return whether `stack` takes the module, where a kernel dequantises."""
        return False

    def stack(self, modules: Sequence[Any], dtype: torch.dtype) -> Tensor:
        """Return the W of several modules of one number of inputs below each other, written by one kernel."""
        raise NotImplementedError(f"{self} takes modules in stacks, but does not implement stack")

    def dequantize(self, module: Any, dtype: torch.dtype) -> Tensor:
        """Return W [out, in] in `dtype`, as the forward uses it; the caller may not modify it."""
        raise NotImplementedError(f"{self} declares linears, but does not implement dequantize")

    def keep(self, module: Any) -> None:
        """Prepare a linear that may keep its dequantised weight: its own forward should take it from `dequantized`."""

    def dequantized(self, module: Any, dtype: torch.dtype) -> Tensor:
        """Return `dequantize`, kept where there is room for it; see `budwood.model.quantizers.room`."""
        keeper = module.__dict__.get(ROOM)
        weight: Tensor = self.dequantize(module, dtype) if keeper is None else keeper.dequantized(self, module, dtype)
        return weight


class Unquantized(Quantizer):
    """Weights in the compute dtype: `nn.Linear`, and transformers' `Conv1D`, which stores the transposed weight."""

    api = 2
    known_to_peft = True
    shards = True
    dense = True

    def is_linear(self, module: nn.Module) -> bool:
        from torch import nn

        return is_transposed(module) or (isinstance(module, nn.Linear) and computes_linear(module))

    def shape(self, module: Any) -> tuple[int, int]:
        first, second = module.weight.shape
        return (second, first) if is_transposed(module) else (first, second)

    def forward(self, module: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        import torch

        weight, bias = module.weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if not is_transposed(module):
            return torch.nn.functional.linear(x, weight, bias)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)

    def dequantize(self, module: Any, dtype: torch.dtype) -> Tensor:
        weight: Tensor = whole(module.weight).to(dtype)
        return weight.t() if is_transposed(module) else weight


def computes_linear(module: nn.Linear) -> bool:
    """Return whether the forward of an `nn.Linear`, or of a subclass, is x Wᵀ + bias; a router's is not, for example.

    A forward of a subclass runs once for its class, on a small weight.
    """
    from torch import nn

    cls = type(module)
    if cls.forward is nn.Linear.forward:
        return True
    if cls not in _computes_linear:
        _computes_linear[cls] = _tried(module)
    return _computes_linear[cls]


_computes_linear: dict[type, bool] = {}


def _tried(module: nn.Linear) -> bool:
    import torch

    from budwood.model.device import isolated

    twin: Any = copy.copy(module)
    twin.__dict__["_parameters"] = dict(module._parameters)
    twin.in_features, twin.out_features = 5, 3
    draw = torch.Generator().manual_seed(0)
    with isolated(), torch.no_grad():
        weight, bias, x = (torch.randn(shape, generator=draw) for shape in ((3, 5), (3,), (2, 5)))
        twin._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            twin._parameters["bias"] = torch.nn.Parameter(bias, requires_grad=False)
        try:
            found = type(module).forward(twin, x)
        except Exception:  # it needs other inputs, or another weight
            return False
        expected = torch.nn.functional.linear(x, weight, None if module.bias is None else bias)
        return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)


def is_transposed(module: nn.Module) -> bool:
    """Return whether a linear stores its weight as [in, out]: transformers' `Conv1D`, used by GPT-2."""
    library = sys.modules.get("transformers.pytorch_utils")  # if not imported, no module can be an instance
    return library is not None and isinstance(module, library.Conv1D)

"""The bitsandbytes quantisers, with guards against repacking of 4-bit weights and against autocast in int8."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from budwood.errors import ResourceError
from budwood.model.quantizers.protocol import Quantizer, Unquantized
from budwood.model.quantizers.saved import check_eight_bit, check_four_bit
from budwood.model.quiet import hide_hub_kernels
from budwood.parallel.sharding import whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from budwood.model.quantizers.experts import ExpertLinear
    from budwood.untrusted.formats import TensorInfo

BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one if they are quantised too: transformers' defaults."""
SCALES = "weight_scales"
"""Parameter of a sharded 4-bit linear."""
FEW_ROWS = 1536
"""Up to this many rows of an input, bitsandbytes chooses how to multiply; above, it dequantises W, as is done here."""


class _BitsAndBytes(Quantizer):
    api = 2
    takes_fused_experts = False
    known_to_peft = True

    def check(self, device: str) -> None:
        hide_hub_kernels()
        try:
            import bitsandbytes
        except Exception as error:  # a broken native library may raise any exception
            raise ResourceError(
                f"quantization needs bitsandbytes, which cannot be imported here ({error}): "
                "`pip install bitsandbytes`, or set quantization to none."
            ) from error
        kind = device.split(":")[0]
        if kind not in bitsandbytes.supported_torch_devices:
            known = ", ".join(sorted(bitsandbytes.supported_torch_devices))
            raise ResourceError(
                f"bitsandbytes {bitsandbytes.__version__} does not support '{kind}' (it supports {known}): "
                "set quantization to none, or another device."
            )


class Int8(_BitsAndBytes):
    """8 bits, one scale per row (LLM.int8(), Dettmers et al., 2022)."""

    def config(self, dtype: torch.dtype, double_quantization: bool, skip: list[str]) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)

    stored_names = r"\.SCB$"
    rounds_inputs = True

    def reads(self, config: Mapping[str, Any]) -> bool:
        return _is_ours(config) and bool(config.get("load_in_8bit"))

    def check_saved(
        self, path: str, shape: tuple[int, int], config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> None:
        check_eight_bit(path, shape, tensors)

    def after_load(self, model: nn.Module, skip: list[str]) -> None:
        guard_autocast(model)

    def planned(self, module: nn.Module, dtype: torch.dtype, double_quantization: bool) -> nn.Module:
        import bitsandbytes
        import torch
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        outputs, inputs = Unquantized().shape(module)
        with unset_fake_temporarily():  # the constructor wraps its weight in a class that cannot hold fakes
            linear: Any = bitsandbytes.nn.Linear8bitLt(inputs, outputs, False, has_fp16_weights=False, device="meta")
        codes = torch.empty(outputs, inputs, dtype=torch.int8)
        linear._parameters["weight"] = torch.nn.Parameter(codes, requires_grad=False)
        linear.weight.CB = linear.weight.SCB = None
        linear.state.CB, linear.state.SCB = codes, torch.empty(outputs, dtype=torch.float32)
        linear.state.threshold = 0.0  # which columns have outliers depends on values
        linear._parameters["bias"] = _planned_bias(module, dtype)
        linear.__class__ = _guarded_linear()
        return linear

    def pack_experts(self, weight: Tensor, double_quantization: bool) -> ExpertLinear:
        from budwood.model.quantizers.experts import Int8Experts

        return Int8Experts.pack(weight)

    def planned_experts(self, shape: tuple[int, int, int], double_quantization: bool) -> ExpertLinear:
        from budwood.model.quantizers.experts import Int8Experts

        return Int8Experts.planned(shape)

    def is_linear(self, module: nn.Module) -> bool:
        return _is_eight_bit(module)

    def constants(self, module: Any) -> list[Tensor]:
        return [self._codes(module)[1]]

    def shape(self, module: Any) -> tuple[int, int]:
        outputs, inputs = module.weight.shape
        return outputs, inputs

    def forward(self, module: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = type(module).forward(module, x)  # not that of an adapter, which calls this one
        return result

    def dequantize(self, module: Any, dtype: torch.dtype) -> Tensor:
        codes, scales = self._codes(module)
        return codes.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))

    def _codes(self, module: Any) -> tuple[Tensor, Tensor]:
        """Return codes [out, in] int8 and scales [out] fp32; the first forward moves them from weight to state."""
        owner = module.state if module.state.CB is not None else module.weight
        return owner.CB, owner.SCB


class _FourBit(_BitsAndBytes):
    kind: str
    shards = True
    dense = True

    def config(self, dtype: torch.dtype, double_quantization: bool, skip: list[str]) -> Any:
        from transformers import BitsAndBytesConfig

        from budwood.model.quantizers.cpu_kernel import install

        install()
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=double_quantization,
            llm_int8_skip_modules=skip,
        )

    stored_names = r"\.absmax$"

    def reads(self, config: Mapping[str, Any]) -> bool:
        eight = config.get("load_in_8bit")
        return _is_ours(config) and not eight and config.get("bnb_4bit_quant_type", "fp4") == self.kind

    def check_saved(
        self, path: str, shape: tuple[int, int], config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> None:
        check_four_bit(path, shape, self.kind, tensors)

    def stored_config(self, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        from budwood.model.quantizers.cpu_kernel import install

        install()
        return {**config, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}

    def after_load(self, model: nn.Module, skip: list[str]) -> None:
        guard_repacking(model)

    def shard(self, module: Any) -> None:
        """Make the packed weight and its scales plain parameters, and let the module compute from them."""
        import torch
        from torch import nn

        weight, state = module.weight, module.weight.quant_state
        facts = {name: value for name, value in vars(weight).items() if not hasattr(value, "device")}
        packed = nn.Parameter(weight.detach().as_subclass(torch.Tensor), requires_grad=False)
        vars(packed).update(facts, quant_state=None)
        module._parameters["weight"] = packed
        module.register_parameter(SCALES, nn.Parameter(state.absmax.view(-1, 1), requires_grad=False))
        module.quant_state, state.absmax = state, None
        module.__class__ = _sharded_linear()

    def sharded_tensors(self, module: Any) -> list[Tensor]:
        return [self.weight(module), _state(module, gather=False).absmax]

    def planned(self, module: nn.Module, dtype: torch.dtype, double_quantization: bool) -> nn.Module:
        import bitsandbytes
        import torch
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        outputs, inputs = Unquantized().shape(module)
        with unset_fake_temporarily():  # the constructor wraps its weight in a class that cannot hold fakes
            linear: Any = bitsandbytes.nn.Linear4bit(
                inputs, outputs, False, compute_dtype=dtype, quant_type=self.kind, device="meta"
            )
        blocks = -(-outputs * inputs // BLOCK)
        packed = torch.empty((outputs * inputs + 1) // 2, 1, dtype=torch.uint8)
        weight: Any = torch.nn.Parameter(packed, requires_grad=False)
        state_of = bitsandbytes.functional.QuantState
        nested = {
            "offset": torch.empty(()),
            "state2": state_of(
                torch.empty(-(-blocks // NESTED_BLOCK)), code=torch.empty(256), blocksize=NESTED_BLOCK,
                dtype=torch.float32,
            ),
        } if double_quantization else {}  # fmt: skip
        weight.quant_state = state_of(
            torch.empty(blocks, dtype=torch.uint8 if double_quantization else torch.float32),
            torch.Size((outputs, inputs)), torch.empty(16), BLOCK, self.kind, dtype, **nested,
        )  # fmt: skip
        weight.quant_type, weight.blocksize, weight.bnb_quantized = self.kind, BLOCK, True
        weight.compress_statistics, weight.quant_storage = double_quantization, torch.uint8
        linear._parameters["weight"] = weight
        linear._parameters["bias"] = _planned_bias(module, dtype)
        linear.support_avx512bf16_for_cpu = False
        return linear

    def pack_experts(self, weight: Tensor, double_quantization: bool) -> ExpertLinear:
        from budwood.model.quantizers.experts import FourBitExperts

        return FourBitExperts.pack(weight, self.kind, double_quantization)

    def planned_experts(self, shape: tuple[int, int, int], double_quantization: bool) -> ExpertLinear:
        from budwood.model.quantizers.experts import FourBitExperts

        return FourBitExperts.planned(shape, self.kind, double_quantization)

    def is_linear(self, module: nn.Module) -> bool:
        return _is_four_bit(module) and _quant_type(module) == self.kind

    def constants(self, module: Any) -> list[Tensor]:
        import torch

        state = _state(module, gather=False)
        constants = [getattr(state, "offset", None), getattr(module, SCALES, None)]
        constants += [
            getattr(o, name, None) for o in (state, getattr(state, "state2", None)) for name in ("absmax", "code")
        ]
        return [tensor for tensor in constants if isinstance(tensor, torch.Tensor)]

    def shape(self, module: Any) -> tuple[int, int]:
        outputs, inputs = _state(module, gather=False).shape
        return outputs, inputs

    def forward(self, module: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        from budwood.model.device import device_type

        # The module's own forward is not called, because it might repack the weight.
        dtype = module.compute_dtype or x.dtype
        if device_type(module.weight) == "cpu":  # where bitsandbytes dequantises too
            return super().forward(module, x.to(dtype), bias).to(x.dtype)
        import bitsandbytes

        bias = None if bias is None else bias.to(dtype)
        weight = module.weight
        if len(x) > FEW_ROWS and (dense := self._by_kernel(module, dtype)) is not None:
            from torch.nn import functional

            return functional.linear(x.to(dtype), dense, bias).to(x.dtype)
        result: Tensor = bitsandbytes.matmul_4bit(x.to(dtype), weight, _state(module), bias=bias).to(x.dtype)
        return result

    def keep(self, module: Any) -> None:
        if type(module) is _library().nn.Linear4bit:
            module.__class__ = _keeping_linear()

    def dequantize(self, module: Any, dtype: torch.dtype) -> Tensor:
        import bitsandbytes
        import torch

        state = _state(module)
        if getattr(state, "packing_format_for_cpu", False):
            raise RuntimeError("bitsandbytes has repacked this 4-bit weight for inference; it cannot be dequantised")
        dense = self._by_kernel(module, dtype)
        if dense is not None:
            return dense
        absmax = state.absmax
        if state.nested:
            absmax = bitsandbytes.functional.dequantize_blockwise(absmax, state.state2) + state.offset
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            whole(module.weight.data).view(-1, 1), absmax.float(), state.blocksize, state.quant_type, state.shape, dtype
        )
        return weight

    def _by_kernel(self, module: Any, dtype: torch.dtype) -> Tensor | None:
        """Return W in `dtype`, written by one kernel instead of three; None where there is none."""
        from budwood.model.ops.kernels import implementation

        kernel = implementation("dequantize_4bit", module.weight, dtype)
        if kernel is None:
            return None
        packed, absmax, code, share, nested, shape = _stored(module)
        result: Tensor = kernel.dequantize_4bit(packed, absmax, code, share, nested, shape, dtype)
        return result

    def stacks(self, module: Any) -> bool:
        return not getattr(_state(module, gather=False), "packing_format_for_cpu", False)

    def stack(self, modules: Sequence[Any], dtype: torch.dtype) -> Tensor:
        from budwood.model.ops.kernels import implementation

        kernel = implementation("dequantize_4bit", modules[0].weight, dtype)
        result: Tensor = kernel.dequantize_4bit_group([_stored(module) for module in modules], dtype)
        return result


class NF4(_FourBit):
    """4 bits, quantiles of a normal distribution, one scale per 64 weights (QLoRA, Dettmers et al., 2023)."""

    kind = "nf4"


class FP4(_FourBit):
    """4-bit floating point, one scale per 64 weights."""

    kind = "fp4"


def _stored(module: Any) -> tuple[Tensor, Tensor, Tensor, int, tuple[Any, ...] | None, Any]:
    """Return how a 4-bit linear is stored, as `budwood.model.ops.kernels.launch.dequantize_4bit` takes it."""
    import torch

    state, nested = _state(module), None
    if state.nested:
        nested = (state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    packed = whole(module.weight.data).view(torch.uint8)
    return packed, state.absmax, state.code, state.blocksize, nested, state.shape


def _state(module: Any, gather: bool = True) -> Any:
    """Return how a 4-bit linear is quantised; of a sharded one with its scales, gathered if necessary."""
    if not hasattr(module, SCALES):
        return module.weight.quant_state
    state = module.quant_state
    if gather:
        state = copy.copy(state)
        state.absmax = whole(getattr(module, SCALES)).view(-1)
    return state


def _quant_type(module: Any) -> str:
    state = module.quant_state if hasattr(module, SCALES) else module.weight
    return str(getattr(state, "quant_type", ""))


def _planned_bias(module: Any, dtype: torch.dtype) -> Any:
    import torch

    bias = getattr(module, "bias", None)
    return None if bias is None else torch.nn.Parameter(torch.empty(bias.shape, dtype=dtype), requires_grad=False)


def guard_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking the 4-bit weights of `model` in place.

    On a CPU with AVX512-BF16, `Linear4bit` repacks its weight in the first forward in eval mode without gradients.
    Later dequantisation (backward, merge) returns zeros or garbage without an error. bitsandbytes has no option for
    this. Its layers read the attribute that is cleared here, and copies of a layer keep it.
    """
    for layer in _four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False


def assert_not_packed(model: nn.Module) -> None:
    """Check that no 4-bit weight of `model` has been repacked; a cheap check before training and merging.

    Raises:
        RuntimeError: a weight has been repacked, so gradients and merged weights would be garbage.
    """
    for layer in _four_bit_layers(model):
        if getattr(_state(layer, gather=False), "packing_format_for_cpu", False):
            raise RuntimeError("a 4-bit weight has been repacked for inference: its gradients would be garbage")


def guard_autocast(model: nn.Module) -> None:
    """Disable autocast inside the 8-bit linears of `model`.

    On a CPU without AVX-512, bitsandbytes multiplies the integers in fp32, where the sums are exact. Autocast would
    round those sums to 16 bit. The output of a linear would then differ from that inside an adapter layer, which
    disables autocast. Copies of a layer keep the guard.
    """
    for layer in model.modules():
        if _is_eight_bit(layer):
            layer.__class__ = _guarded_linear()


@cache
def _sharded_linear() -> type[nn.Module]:
    import bitsandbytes

    class ShardedLinear4bit(bitsandbytes.nn.Linear4bit):
        """bitsandbytes' 4-bit linear that reads its packed weight and scales from plain parameters."""

        def forward(self, x: Tensor) -> Tensor:
            from budwood.model.ops.linear import frozen_linear

            return frozen_linear(x, self)

    return ShardedLinear4bit


@cache
def _keeping_linear() -> type[nn.Module]:
    import bitsandbytes
    import torch

    class KeepingLinear4bit(bitsandbytes.nn.Linear4bit):
        """bitsandbytes' 4-bit linear that may keep its dequantised weight."""

        def forward(self, x: Tensor) -> Tensor:
            from budwood.model.ops.linear import frozen_linear, live_linear

            product = frozen_linear if torch.is_grad_enabled() else live_linear
            with torch.autocast(x.device.type, enabled=False):  # as the class above, which knows no autocast
                result: Tensor = product(x.to(self.compute_dtype or x.dtype), self).to(x.dtype)
            return result

    return KeepingLinear4bit


@cache
def _guarded_linear() -> type[nn.Module]:
    import bitsandbytes
    import torch

    class Linear8bit(bitsandbytes.nn.Linear8bitLt):
        """bitsandbytes' 8-bit linear with its input in the autocast dtype, computed with autocast disabled."""

        def init_8bit_state(self) -> None:
            """Take codes and scales from the weight, whose scales are in the state if PEFT has moved it to read it."""
            scales = self.state.SCB
            super().init_8bit_state()
            if self.state.SCB is None:
                self.state.SCB = scales

        def forward(self, x: Tensor) -> Tensor:
            device = x.device.type
            if torch.is_autocast_enabled(device):
                x = x.to(torch.get_autocast_dtype(device))
            with torch.autocast(device, enabled=False):
                result: Tensor = super().forward(x)
            return result

    return Linear8bit


def _is_ours(config: Mapping[str, Any]) -> bool:
    ours = config.get("quant_method") == "bitsandbytes"
    return ours or bool(config.get("load_in_4bit") or config.get("load_in_8bit"))


def _library() -> Any:
    """Return bitsandbytes if it is imported; otherwise None, since no module can then be an instance of its classes."""
    return sys.modules.get("bitsandbytes")


def _is_eight_bit(module: nn.Module) -> bool:
    library = _library()
    return library is not None and isinstance(module, library.nn.Linear8bitLt)


def _is_four_bit(module: nn.Module) -> bool:
    library = _library()
    return library is not None and isinstance(module, library.nn.Linear4bit)


def _four_bit_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if _is_four_bit(module)]

"""Fake tensors, with shape, dtype and device but no data, on which a step is checked before weights are read."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from budwood.contract.calls import attribute_errors
from budwood.errors import first_line
from budwood.model.checkpoint import read_config, read_tensors, resolve
from budwood.model.checks import check_base, find_quantizer, load_tokenizer, skeleton
from budwood.model.experts import count_experts, plan_experts
from budwood.model.halves.take_over import use_own_operations
from budwood.model.quantizers import Quantizer, Unquantized, claim, is_quantized
from budwood.model.quantizers.experts import quantized_experts
from budwood.model.quantizers.stored import possible_names, replace_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from budwood.model.base import Base


class _Mode(FakeTensorMode):
    """torch's mode, but a deep copy is the mode itself: copying a module copies all attributes of its tensors."""

    def __deepcopy__(self, memo: Any) -> _Mode:
        return self

    def _prep_args_for_hash(self, result: list[object], args: Any, *others: Any) -> None:
        """Append what tells the arguments of an operation apart in torch's cache of results; see its base class.

        torch reads seventeen properties of each tensor, some of them by a call back into the modes above; a dense
        tensor of this mode differs from another in ten.
        """
        if self.shape_env is not None or not isinstance(args, list | tuple):
            super()._prep_args_for_hash(result, args, *others)
            return
        result += (type(args), len(args))
        for arg in args:
            if isinstance(arg, FakeTensor):
                if arg.fake_mode is self and arg.constant is None and arg.layout is torch.strided:
                    result += (
                        arg.dtype, tuple(arg.shape), arg.stride(), arg.storage_offset(), arg.untyped_storage().nbytes(),
                        arg.fake_device, arg.requires_grad, arg.is_conj(), arg.is_neg(), arg.is_inference(),
                    )  # fmt: skip
                    continue
            elif isinstance(arg, list | tuple):
                self._prep_args_for_hash(result, arg, *others)
                continue
            super()._prep_args_for_hash(result, (arg,), *others)


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Create only fake tensors inside the context, and let modules convert their fake parameters.

    `Module.to` swaps the contents of fake parameters, which torch rejects for parameters registered with the mode. Here
    it replaces the parameter instead.
    """

    def convert(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(fn)
        for name, parameter in self._parameters.items():
            if parameter is None:
                continue
            new = fn(parameter.data)
            if (new.dtype, new.device) != (parameter.dtype, parameter.device):
                self._parameters[name] = nn.Parameter(new, parameter.requires_grad)
        for name, buffer in self._buffers.items():
            self._buffers[name] = fn(buffer) if buffer is not None else None
        return self

    original = nn.Module._apply
    nn.Module._apply = convert  # type: ignore[method-assign]
    try:
        with _Mode() as mode:
            yield mode
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


def fake_base(
    model: str,
    auto_class: str,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    needs_tokenizer: bool = True,
    quantization: str | None = "none",
    double_quantization: bool = True,
    unused: Collection[str] = (),
    **model_kwargs: Any,
) -> Base:
    """Build a base of fake CPU tensors from its configuration; call it inside `fake_tensors`.

    No weights are read, and the fingerprint is empty. If a quantiser cannot make fake weights, the base is unquantised,
    and a note says so.

    Args:
        model: a folder or a hub name.
        auto_class: name of one of transformers' auto classes.
        dtype: dtype of every floating parameter that is not quantised.
        quantization, double_quantization, unused: as for `load_base`.
        model_kwargs: changes to the configuration, such as `num_labels`.

    Raises:
        InputError, CorruptError, ResourceError: as `check_base` and `skeleton`.
    """
    from budwood.model.base import Base, heads_of, sizes_of

    info = check_base(model, quantization, trust_remote_code)
    frame = skeleton(model, auto_class, trust_remote_code, **model_kwargs)
    quantizer, heads, notes = find_quantizer(info.quantization), heads_of(frame), ["fake"]
    path = resolve(model, weights=False, code=trust_remote_code)
    if info.prequantized and quantizer.own_modules and any(path.glob("*.safetensors")):
        made = replace_linears(frame, quantizer, info.config["quantization_config"], read_tensors(path))
    else:
        made = 0
    with attribute_errors(quantizer, "planned"):
        made = made or _quantize(frame, quantizer, dtype, double_quantization, heads)
        plan_experts(frame, quantizer, double_quantization)
    _fill(frame, dtype)
    if not made and not isinstance(quantizer, Unquantized):
        try:
            quantizer.after_load(frame, heads)
        except Exception as error:  # an unknown quantiser's code, on tensors without values
            notes.append(f"{quantizer} cannot be planned ({first_line(error)}): its base counts unquantised")
    claim(frame, quantizer)
    if len(notes) == 1 and quantizer.dequantizes:
        notes.append(f"its {quantizer.name} weights are dequantised as they are read")
    elif len(notes) == 1 and not isinstance(quantizer, Unquantized) and not _any_quantized(frame):
        notes.append(f"{quantizer} cannot be planned: its base counts unquantised")
    frame.requires_grad_(False)
    frame.eval()
    use_own_operations(frame)
    if count_experts(frame).total:
        notes.append("experts: planned with the same number of tokens for each")
    device = torch.device("cpu")
    tokenizer: Any = load_tokenizer(path) if needs_tokenizer else None
    return Base(
        str(model), path, frame, tokenizer, "", info.quantization, *sizes_of(frame, dtype), dtype, device,
        tuple(key for key in _new(frame, path) if not set(key.split(".")) & set(unused)), notes, double_quantization,
    )  # fmt: skip


def _any_quantized(frame: nn.Module) -> bool:
    return bool(quantized_experts(frame)) or any(map(is_quantized, frame.modules()))


def _quantize(
    frame: nn.Module, quantizer: Quantizer, dtype: torch.dtype, double_quantization: bool, heads: list[str]
) -> int:
    """Replace the linears outside of heads by the quantiser's fake ones; returns their number."""
    made = 0
    for path, module in list(frame.named_modules()):
        kept = any(path == head or path.startswith(f"{head}.") for head in heads)
        if kept or isinstance(quantizer, Unquantized) or not Unquantized().is_linear(module):
            continue
        planned = quantizer.planned(module, dtype, double_quantization)
        if planned is None:
            return made
        parent, _, leaf = path.rpartition(".")
        setattr(frame.get_submodule(parent), leaf, planned)
        made += 1
    return made


def _fill(frame: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace every parameter and buffer on the meta device by a fake one on the CPU; ties stay ties."""
    filled: dict[int, nn.Parameter] = {}
    for module in frame.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                if id(parameter) not in filled:
                    floating = parameter.is_floating_point()
                    empty = torch.empty(parameter.shape, dtype=dtype if floating else parameter.dtype)
                    filled[id(parameter)] = nn.Parameter(empty, requires_grad=False)
                module._parameters[name] = filled[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    frame.tie_weights()


def _new(frame: PreTrainedModel, path: Path) -> tuple[str, ...]:
    """Return the parameters that the checkpoint lacks: a classification head, a pooler."""
    if frame.get_output_embeddings() is not None:
        return ()
    prefix = f"{frame.base_model_prefix}."
    body = "" if frame.base_model is frame else prefix
    names = [name for name, _ in frame.named_parameters()]
    heads = [name for name in names if "pooler" in name.split(".") or not name.startswith(body)]
    if any(path.glob("*.safetensors")):
        stored = read_tensors(path)

        def is_stored(name: str) -> bool:
            keys = possible_names(name, prefix)
            return any(key in stored and stored[key].shape == _shape(frame, name) for key in keys)

        return tuple(name for name in heads if not is_stored(name))
    return () if type(frame).__name__ in (read_config(path).get("architectures") or ()) else tuple(heads)


def _shape(frame: nn.Module, name: str) -> tuple[int, ...]:
    return tuple(frame.get_parameter(name).shape)

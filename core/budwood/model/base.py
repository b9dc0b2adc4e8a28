"""Loads the frozen base of a run, quantised if requested."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budwood.contract.calls import attribute_errors
from budwood.errors import BudwoodError, CorruptError, ResourceError, describe, first_line, plural
from budwood.model.checkpoint import commit_of, fingerprint, read_tensors, resolve
from budwood.model.checks import (
    BaseInfo,
    build_skeleton,
    check_base,
    check_fused,
    find_quantizer,
    load_config,
    load_tokenizer,
    size,
    skeleton,
)
from budwood.model.experts import count_experts, open_experts, packed_as_read
from budwood.model.halves.take_over import use_own_operations
from budwood.model.heads import body_of, name_body
from budwood.model.machine import pick_device_precision
from budwood.model.quantizers import claim, is_quantized, linear_shape, quantizer_of
from budwood.model.quantizers.experts import quantized_experts
from budwood.model.quantizers.stored import check_linears, loading_config
from budwood.model.quiet import import_bitsandbytes, silence_libraries
from budwood.model.sharding import sharded_as_read, shards_of
from budwood.model.stated_sizes import check_experts, wrong_shapes
from budwood.model.streaming import slices, trim_heap
from budwood.parallel.sharding import own_part
from budwood.untrusted.formats import TensorInfo, read_json

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from budwood.parallel.processes import Processes

__all__ = [
    "Base",
    "BaseInfo",
    "check_base",
    "fingerprint",
    "silence_libraries",
    "load_base",
    "load_tokenizer",
    "pick_device_precision",
    "skeleton",
]

import_bitsandbytes()  # before a plugin imports peft, which would load the compiler and download kernels with it

STORED = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}
"""Names of torch dtypes in safetensors."""
PRECISIONS = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
"""Names of torch dtypes in recipes."""


@dataclass
class Base:
    """A loaded base; every parameter is frozen, and the model is in eval mode.

    Attributes:
        name: folder or hub name, as the user gave it.
        path: its folder.
        tokenizer: None if the task does not need one.
        fingerprint: hash of its checkpoint; see `fingerprint`.
        quantization: none, int8, nf4, fp4, or the name of a third party's quantiser.
        bytes: stored size of parameters and buffers, including the quantiser's constants; of a sharded base, that of
            this process.
        bytes_unquantized: size of all parameters in `dtype` without quantisation.
        unquantized_share: fraction of the weights, by count, that are not quantised.
        parameters: number of parameters.
        dtype: dtype of computation and of weights that are not quantised.
        new: names of parameters that are not in the checkpoint, initialised from the seed: a classification head, a
            pooler. They have to train whole, and be saved with the adapter.
        notes: lines for the user.
        double_quantization: whether a 4-bit quantiser also quantises its constants.
        added: token ids whose embeddings are not in the checkpoint; see `resize_base`. Their rows have to train.
    """

    name: str
    path: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    quantization: str
    bytes: int
    bytes_unquantized: int
    unquantized_share: float
    parameters: int
    dtype: torch.dtype
    device: torch.device
    new: tuple[str, ...]
    notes: list[str]
    double_quantization: bool = True
    added: range = range(0)

    @property
    def revision(self) -> str | None:
        """Commit of the base on the hub; None for a local folder."""
        return commit_of(self.path)

    def autocast(self) -> torch.autocast:
        """Return the context in which its model computes: autocast in 16 bit, nothing in fp32."""
        import torch

        narrow = self.dtype in (torch.float16, torch.bfloat16)
        return torch.autocast(torch.device(self.device).type, self.dtype if narrow else None, narrow)


def load_base(
    model: str | Path,
    quantization: str | None,
    auto_class: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    double_quantization: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    seed: int = 0,
    needs_tokenizer: bool = True,
    unused: Collection[str] = (),
    world: Processes | None = None,
) -> Base:
    """Load a base, and quantise each tensor as it is read, so that memory never holds the complete base in 16 bit.

    Args:
        model: a folder or a hub name.
        quantization: name of a quantiser; None: that of the checkpoint, if it is quantised.
        auto_class: name of one of transformers' auto classes.
        dtype: float32, bfloat16 or float16; dtype of computation and of weights that are not quantised.
        double_quantization: also quantise the constants (4 bit).
        model_kwargs: changes to the configuration, such as `num_labels`.
        seed: seed for the weights of a new head.
        needs_tokenizer: False leaves `Base.tokenizer` None.
        unused: names of modules and parameters that need not train if the checkpoint lacks them, such as a pooler that
            the task does not run.
        world: the processes over which the base's layers are sharded; None: it is complete on this one.

    Raises:
        InputError, ResourceError, CorruptError: as `check_base`; the base does not fit in memory; a weight of the
            model is missing from the checkpoint, or has the wrong shape.
    """
    import torch

    device = torch.device(device)
    info = check_base(model, quantization, trust_remote_code, device)
    name, path = info.name, resolve(model, code=trust_remote_code)
    tensors = read_tensors(path)
    tokenizer: Any = load_tokenizer(path) if needs_tokenizer else None
    config = load_config(path, trust_remote_code, model_kwargs or {})
    frame = build_skeleton(name, config, auto_class, trust_remote_code)
    _check_size(name, frame, tensors.values())
    quantizer = find_quantizer(info.quantization)
    check_fused(name, frame, quantizer)
    check_experts(frame, tensors)
    heads = heads_of(frame)
    plan = None
    if info.prequantized and quantizer.own_modules:
        config.quantization_config = loading_config(quantizer, info.config["quantization_config"], tensors)
    elif info.prequantized:
        check_linears(frame, quantizer, info.config["quantization_config"], tensors)
        with attribute_errors(quantizer, "stored_config"):
            config.quantization_config = quantizer.stored_config(info.config["quantization_config"], dtype)
    else:
        with attribute_errors(quantizer, "config"):
            plan = quantizer.config(dtype, double_quantization, heads)
    views = info.quantization == "none" and {entry.dtype for entry in tensors.values()} == {STORED[str(dtype)]}
    rest = _not_quantized(frame, tensors, dtype) if info.prequantized else {}
    views = views and world is None  # pages of a mapped file stay in memory after their layer is sharded
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    shards = None if world is None else shards_of(name, frame, info.quantization, world, device)
    with forked, packed_as_read(frame, quantizer, double_quantization), sharded_as_read(frame, shards):
        torch.manual_seed(seed)
        try:
            from_files = info.prequantized and quantizer.needs_files
            pair: Any = type(frame).from_pretrained(
                str(path) if from_files else None,
                config=config,
                state_dict=None if from_files else slices(tensors, views, shards.advance if shards else None, rest),
                quantization_config=plan,
                dtype=dtype,
                device_map={"": device},
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported by name below
                local_files_only=True,
            )
        except BudwoodError:
            raise
        except torch.OutOfMemoryError as error:
            raise ResourceError(f"base '{name}' does not fit on {device}: {first_line(error)}") from error
        except MemoryError as error:
            raise ResourceError(f"base '{name}' does not fit in memory.") from error
        except ImportError as error:
            raise ResourceError(f"base '{name}' needs a library: {first_line(error)}") from error
        except Exception as error:  # a model class may raise any exception on unexpected values
            if "can't allocate memory" in str(error):
                raise ResourceError(f"base '{name}' does not fit in memory: {first_line(error)}") from error
            if "automatic conversion of the weights" in str(error):  # its details were only logged
                text = f"base '{name}' does not load: some of its tensors do not fit config.json, or each other: "
                raise CorruptError(f"{text}take complete files that belong together.") from error
            raise CorruptError(f"base '{name}' does not load: {describe(error)}") from error
    loaded: PreTrainedModel
    report: dict[str, Any]
    loaded, report = pair  # output_loading_info
    name_body(loaded)
    if shards is not None:
        shards.finish(body_of(loaded), loaded)
    trim_heap()
    with attribute_errors(quantizer, "after_load"), torch.no_grad():
        quantizer.after_load(loaded, heads)
    claim(loaded, quantizer)
    new = _check_complete(name, loaded, frame, report, unused)
    open_experts(loaded)
    new = tuple(key for key in new if not set(key.split(".")) & set(unused))
    loaded.requires_grad_(False)
    loaded.eval()
    use_own_operations(loaded)
    loaded.config.name_or_path = name
    if info.prequantized and quantizer.own_modules:
        loaded.config.quantization_config = info.config["quantization_config"]
    if loaded.can_generate() and (path / "generation_config.json").is_file():
        loaded.generation_config = _generation_config(path)
    base = Base(
        name, path, loaded, tokenizer, fingerprint(path), info.quantization, *sizes_of(loaded, dtype), dtype, device,
        new, [], double_quantization,
    )  # fmt: skip
    base.notes.append(_describe(base, heads))
    experts = count_experts(loaded)
    if experts.total:
        counts = f"{experts.quantized:,} of {experts.total:,} in {base.quantization}"
        counts = f"{experts.total:,}, not quantised" if base.quantization == "none" else counts
        base.notes.append(f"experts: {counts}")
    if new:
        base.notes.append(f"new, initialised from the seed: {_some(list(new))}")
    unused = sorted(report["unexpected_keys"])
    if unused and not new:  # a model with a new head does not use the checkpoint's
        base.notes.append(f"not used: {plural(len(unused), 'tensor')} of the checkpoint, {_some(unused)}")
    return base


def _check_size(name: str, frame: PreTrainedModel, tensors: Iterable[TensorInfo]) -> None:
    """Refuse a configuration whose model is far larger than its checkpoint, before memory is allocated for it.

    Raises:
        CorruptError: the model has over 4 elements for each stored byte; a 4-bit checkpoint has two.
    """
    described = sum(tensor.numel() for tensor in (*frame.parameters(), *frame.buffers()))
    stored = sum(tensor.bytes for tensor in tensors)
    if described > 4 * stored + (1 << 24):  # room for a new head
        raise CorruptError(
            f"base '{name}': config.json describes a model of {described:,} elements, but its checkpoint has "
            f"{stored:,} bytes."
        )


def _not_quantized(
    frame: PreTrainedModel, tensors: Mapping[str, TensorInfo], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Return the tensors of a quantised checkpoint that are not quantised, with the dtype in which they are loaded.

    transformers leaves them as they are stored, where it converts those of other checkpoints.
    """
    wide: set[str] = {*(frame._keep_in_fp32_modules or ()), *(frame._keep_in_fp32_modules_strict or ())}
    return {
        name: dtype
        for name, parameter in frame.named_parameters(remove_duplicate=False)
        if (entry := tensors.get(name)) is not None
        and entry.dtype in STORED.values()
        and tuple(entry.shape) == tuple(parameter.shape)
        and not wide & set(name.split("."))
    }


def _generation_config(path: Path) -> GenerationConfig:
    from transformers import GenerationConfig

    read_json(path / "generation_config.json", finite=False)
    try:
        return GenerationConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # it may raise any exception on unexpected values
        raise CorruptError(f"{path / 'generation_config.json'}: {describe(error)}") from error


def heads_of(model: PreTrainedModel) -> list[str]:
    """Return the names of modules other than the decoder or encoder, and of poolers: they stay in the compute dtype.

    A model without a head, as for embeddings, is a decoder or encoder itself; T5 is one with a head among its modules.
    """
    alone = model.base_model is model
    children = [name for name, _ in model.named_children() if name != model.base_model_prefix and not alone]
    own = model.get_output_embeddings()
    inside = [n for n, m in model.named_modules() if n.rpartition(".")[2] == "pooler" or m is own]
    return [*children, *(name for name in inside if name.partition(".")[0] not in children)]


def _check_complete(
    name: str, model: PreTrainedModel, frame: PreTrainedModel, report: dict[str, Any], unused: Collection[str]
) -> tuple[str, ...]:
    """Refuse a checkpoint that does not match its model; return the parameters that are new.

    A head of a model that is no language model, and a pooler, may be new, as a checkpoint of masked-language training
    holds none; a head for another number of classes is replaced by a new one. So may what the task does not use.

    Raises:
        CorruptError: weights are missing, have the wrong shape, or belong to layers that the model does not have; the
            message names them.
    """
    body = "" if model.base_model is model else f"{model.base_model_prefix}."
    head = model.get_output_embeddings() is None

    def may_be_new(key: str) -> bool:
        return head and (bool({"pooler", *unused} & set(key.split("."))) or not key.startswith(body))

    missing = sorted(key for key in report["missing_keys"] if not may_be_new(key))
    if missing:
        raise CorruptError(f"base '{name}': it lacks {plural(len(missing), 'weight')}: {_some(missing)}")
    other = {str(item[0]) for item in report["mismatched_keys"]} | _wrong_shapes(model, frame)
    mismatched = sorted(key for key in other if not may_be_new(key))
    if mismatched:
        raise CorruptError(wrong_shapes(name, mismatched))
    numbered = {re.sub(r"\d+", "#", key) for key in model.state_dict()}
    extra = [key for key in sorted(report["unexpected_keys"]) if re.sub(r"\d+", "#", key) in numbered]
    if extra:
        raise CorruptError(f"base '{name}': the checkpoint has more layers than config.json: {_some(extra)}")
    if report.get("error_msgs"):
        raise CorruptError(f"base '{name}': {str(report['error_msgs'][0]).splitlines()[0]}")
    return tuple(sorted({*report["missing_keys"], *other}))


def _wrong_shapes(model: nn.Module, frame: nn.Module) -> set[str]:
    """Return the names of quantised weights of the wrong shape, which transformers accepts as they are packed.

    Args:
        frame: the same model without weights, as config.json describes it.
    """
    described = dict(frame.named_modules())
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if is_quantized(module) and linear_shape(module) != linear_shape(described[name])
    }


def sizes_of(model: nn.Module, dtype: torch.dtype) -> tuple[int, int, float, int]:
    """Return stored bytes, bytes in `dtype`, fraction of weights not quantised, and number of parameters."""
    tensors = [*model.parameters(), *model.buffers()]
    elements = {id(parameter): parameter.numel() for parameter in model.parameters()}
    quantized = {}
    for module in filter(is_quantized, model.modules()):
        quantizer: Any = quantizer_of(module)
        quantized[id(quantizer.weight(module))] = math.prod(quantizer.shape(module))
        constants = quantizer.constants(module)
        elements |= dict.fromkeys(map(id, constants), 0)
        tensors += [quantizer.weight(module), *constants]
    quantized |= {id(module): module.numel for module in quantized_experts(model)}
    count = sum((elements | quantized).values())
    tensors = [part for tensor in tensors for part in _parts(tensor)]
    stored = {(t.untyped_storage()._cdata, t.storage_offset()): t.nbytes for t in tensors}  # tables may be shared
    return sum(stored.values()), dtype.itemsize * count, (count - sum(quantized.values())) / max(count, 1), count


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that a tensor of a library's own class holds, such as codes and scales; else itself.

    Of a sharded tensor it is this process's part.
    """
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    tensor = own_part(tensor)
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def _describe(base: Base, heads: list[str]) -> str:
    precision, others = PRECISIONS[str(base.dtype)], _in_other_dtypes(base)
    if base.quantization == "none":
        return f"{size(base.bytes)} in {precision}, not quantised{others}"
    if find_quantizer(base.quantization).dequantizes:
        how = f"its {base.quantization} weights are dequantised as they are read"
        return f"{size(base.bytes)} in {precision}: {how}{others}"
    experts = count_experts(base.model)
    dense = ["experts"] if experts.quantized < experts.total else []
    names = [
        *dense,
        "embeddings",
        *(head for head in heads if any(True for _ in base.model.get_submodule(head).parameters())),
    ]
    return (
        f"{size(base.bytes)} in {base.quantization} ({size(base.bytes_unquantized)} in {precision}); "
        f"{base.unquantized_share:.0%} of the weights stay in {precision}: {', '.join(names)}, norms{others}"
    )


def _in_other_dtypes(base: Base) -> str:
    """Return which floating weights are in another dtype than the base's, such as those that a class keeps in fp32."""
    counts: dict[str, int] = {}
    holders = (*filter(is_quantized, base.model.modules()), *quantized_experts(base.model))
    quantized = {id(parameter) for module in holders for parameter in module.parameters()}
    for parameter in base.model.parameters():
        if parameter.is_floating_point() and parameter.dtype != base.dtype and id(parameter) not in quantized:
            name = str(parameter.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + parameter.numel()
    shown = [f"{count:,} weights in {name}" for name, count in counts.items()]
    return f"; {', '.join(shown)}" if shown else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

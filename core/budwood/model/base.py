"""The frozen base of a run: checks before anything loads, its tokenizer, and loading it quantised."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budwood.contract.discovery import find
from budwood.errors import CorruptError, InputError, ResourceError
from budwood.model.checkpoint import Entry, fingerprint, read_config, read_tensors, resolve
from budwood.model.quantizers import Quantizer, assert_not_packed, guard_repacking
from budwood.model.quiet import hide_hub_kernels, hush

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Base",
    "BaseInfo",
    "assert_not_packed",
    "check_base",
    "fingerprint",
    "guard_repacking",
    "hush",
    "load_base",
    "load_tokenizer",
    "pick_device_precision",
    "skeleton",
]

hide_hub_kernels()  # before a plugin imports peft, which imports bitsandbytes, which fetches them

FUSED_SHARE = 0.05
"""A base is refused where tensors that its quantiser cannot take hold a larger share of its weights."""


@dataclass(frozen=True)
class BaseInfo:
    """What is known of a base before it loads.

    Attributes:
        name: as the user gave it.
        path: its folder; that of a hub name lies in the hub's cache.
        config: its config.json.
        quantization: how it will be stored; that of the checkpoint where it is quantised already.
        prequantized: the checkpoint is quantised already.
    """

    name: str
    path: Path
    config: dict[str, Any]
    quantization: str
    prequantized: bool


@dataclass
class Base:
    """A loaded base; every parameter is frozen, and the model is in evaluation mode.

    Attributes:
        name: as the user gave it.
        path: its folder.
        fingerprint: of its checkpoint, as `fingerprint` gives it.
        quantization: none, int8, nf4, fp4, or a third party's.
        bytes: of its parameters and buffers as they are stored, with the quantiser's constants.
        bytes_16bit: of its parameters in 16 bit.
        unquantized_share: of its weights, by count, that the quantiser has not taken.
        parameters: how many there are.
        dtype: what it computes in, and of what is not quantised.
        new: names of parameters that the checkpoint does not hold: a new classification head, drawn from the seed.
        notes: lines for people.
    """

    name: str
    path: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    quantization: str
    bytes: int
    bytes_16bit: int
    unquantized_share: float
    parameters: int
    dtype: torch.dtype
    device: torch.device
    new: tuple[str, ...]
    notes: list[str]


def check_base(
    model: str | Path,
    quantization: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str | None = None,
) -> BaseInfo:
    """Refuse whatever can be refused without loading weights. Reads JSON files and the headers of safetensors.

    Args:
        model: a folder or a hub name, of which only small files are downloaded.
        quantization: name of a quantiser; None: what the checkpoint has, or none.
        trust_remote_code: the checkpoint's own Python files may run.
        device: check that the quantiser works there, which imports its library.

    Raises:
        InputError: no such base; only pickled or GGUF weights; a model class that is not known, or needs code of its
            own; a quantisation that does not fit the checkpoint.
        ResourceError: the hub is out of reach; the machine cannot do the quantisation.
        CorruptError: a file is missing, truncated or not what it claims to be.
    """
    wanted = None if quantization is None else _quantizer(quantization)
    path = resolve(model, weights=False, code=trust_remote_code)
    config = read_config(path)
    if Path(str(model)).expanduser().is_dir():  # a hub name's weights may not be here yet
        read_tensors(path)
    _check_architecture(str(model), config, trust_remote_code)
    stored = _stored_quantization(str(model), config)
    if stored is not None and quantization not in (None, stored):
        raise InputError(
            f"base '{model}' is quantised already, with {stored}: write `quantization: {stored}`, "
            f"or give the unquantised base for {quantization}."
        )
    name = stored or quantization or "none"
    quantizer = wanted or _quantizer(name)
    if device is not None:
        quantizer.check(str(device))
    if not quantizer.takes_fused_experts and _has_experts(config):
        frame = skeleton(path, "AutoModelForCausalLM", trust_remote_code)
        _check_fused(str(model), frame, name)
    return BaseInfo(str(model), path, config, name, stored is not None)


def _quantizer(name: str) -> Quantizer:
    quantizer: Quantizer = find(name, "budwood.quantizers", "quantization").load()()
    return quantizer


def _check_architecture(name: str, config: dict[str, Any], trust_remote_code: bool) -> None:
    kind = config["model_type"]
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations
    models = Path(spec.submodule_search_locations[0]) / "models"
    if re.fullmatch(r"\w+", kind.replace("-", "_")) and (models / kind.replace("-", "_")).is_dir():
        return  # nearly always: transformers, which takes seconds to import, keeps a model type in a folder of its name
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if kind in CONFIG_MAPPING_NAMES or ("auto_map" in config and trust_remote_code):
        return
    if "auto_map" in config:
        raise InputError(
            f"base '{name}': model type '{kind}' needs Python code of its own, which is not run: read it, "
            "then write `trust_remote_code: true`."
        )
    raise InputError(f"base '{name}': model type '{kind}' is not known to the installed transformers: upgrade it.")


def _stored_quantization(name: str, config: dict[str, Any]) -> str | None:
    """Name of the quantiser that a checkpoint has been saved with.

    Raises:
        InputError: it is one whose weights cannot be trained on here.
    """
    stored = config.get("quantization_config")
    if not isinstance(stored, dict):
        return None
    method = str(stored.get("quant_method", "unknown"))
    if method == "bitsandbytes" or stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        return "int8" if stored.get("load_in_8bit") else str(stored.get("bnb_4bit_quant_type", "fp4"))
    raise InputError(
        f"base '{name}' is quantised already, with {method}, which is not supported: "
        "give the unquantised base and `quantization: nf4`."
    )


def _has_experts(config: dict[str, Any]) -> bool:
    """Whether a configuration, or one inside it, counts experts."""
    return any(
        _has_experts(value) if isinstance(value, dict) else "experts" in key and type(value) is int and value > 1
        for key, value in config.items()
    )


def _check_fused(name: str, model: nn.Module, quantization: str) -> None:
    """Refuse a base most of whose weights its quantiser would leave in 16 bit.

    Raises:
        InputError: it names the tensors and their bytes.
    """
    fused = {key: p.numel() for key, p in model.named_parameters() if p.ndim > 2}
    total = sum(p.numel() for p in model.parameters())
    if sum(fused.values()) > FUSED_SHARE * total:
        largest = max(fused, key=lambda key: fused[key])
        raise InputError(
            f"base '{name}': {len(fused)} fused tensors such as '{largest}' hold "
            f"{size(2 * sum(fused.values()))} of {size(2 * total)} in 16 bit, and {quantization} cannot take them: "
            "use `quantization: none`, or a base without experts."
        )


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer; never runs code of its own.

    Raises:
        InputError: there is none, or none that the `tokenizers` library can run.
        CorruptError: its files are damaged.
    """
    from transformers import AutoTokenizer

    path = resolve(model, weights=False)
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((path / file).is_file() for file in files):
        raise InputError(f"base '{model}' holds no tokenizer (tokenizer.json): copy that of its original.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CorruptError(f"base '{model}': its tokenizer does not load: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise InputError(f"base '{model}': its tokenizer has no tokenizer.json, and cannot be converted to one.")
    return tokenizer


def _config(path: Path, trust_remote_code: bool, changes: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=trust_remote_code, **changes
        )
    except Exception as error:  # a config class may raise anything on values that it does not expect
        raise CorruptError(f"{path / 'config.json'}: {_first_line(error)}") from error
    config._attn_implementation = None  # a checkpoint may name a kernel of the hub
    return config


def skeleton(
    model: str | Path, auto_class: str = "AutoModelForCausalLM", trust_remote_code: bool = False, **model_kwargs: Any
) -> PreTrainedModel:
    """Build a base's modules on the meta device: names and shapes, no weights.

    Args:
        auto_class: name of one of transformers' auto classes.
        model_kwargs: changes to its configuration, such as `num_labels`.

    Raises:
        InputError: the model has no class for that.
        CorruptError: its configuration is not sound.
    """
    path = resolve(model, weights=False, code=trust_remote_code)
    return _build(str(model), _config(path, trust_remote_code, model_kwargs), auto_class, trust_remote_code)


def _build(name: str, config: PretrainedConfig, auto_class: str, trust_remote_code: bool) -> PreTrainedModel:
    import torch
    import transformers

    try:
        with torch.device("meta"):
            model: PreTrainedModel = getattr(transformers, auto_class).from_config(
                config, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise CorruptError(f"base '{name}': config.json: {_first_line(error)}") from error
        raise InputError(f"base '{name}': '{config.model_type}' has no {auto_class} in transformers.") from error
    return model


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
) -> Base:
    """Load a base: quantised tensor by tensor as it is read, so that memory never holds all of it in 16 bit.

    Args:
        model: a folder or a hub name.
        quantization: name of a quantiser; None: what the checkpoint has, or none.
        auto_class: name of one of transformers' auto classes.
        dtype: float32, bfloat16 or float16; of computation and of all that is not quantised.
        double_quantization: quantise the constants too (4 bit).
        model_kwargs: changes to the configuration, such as `num_labels`.
        seed: of a new head's weights.

    Raises:
        InputError, ResourceError, CorruptError: as `check_base`; memory is too small; a weight that the model needs
            is missing from the checkpoint, or has another shape.
    """
    import torch
    from transformers import GenerationConfig

    device = torch.device(device)
    info = check_base(model, quantization, trust_remote_code, device)
    name, path = info.name, resolve(model, code=trust_remote_code)
    tensors = read_tensors(path)
    tokenizer = load_tokenizer(path)
    config = _config(path, trust_remote_code, model_kwargs or {})
    frame = _build(name, config, auto_class, trust_remote_code)
    quantizer = _quantizer(info.quantization)
    if not quantizer.takes_fused_experts:
        _check_fused(name, frame, info.quantization)
    heads = _heads(frame)
    plan = None
    if info.prequantized:
        config.quantization_config = _with_dtype(config.quantization_config, dtype)
    else:
        plan = quantizer.config(dtype, double_quantization, heads)
    with _tight_heap(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            loaded, report = type(frame).from_pretrained(
                None,
                config=config,
                state_dict=_slices(tensors, views=plan is None and not info.prequantized),
                quantization_config=plan,
                dtype=dtype,
                device_map={"": device},
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # judged below, by name
                local_files_only=True,
            )
        except torch.OutOfMemoryError as error:
            raise ResourceError(f"base '{name}' does not fit on {device}: {_first_line(error)}") from error
        except MemoryError as error:
            raise ResourceError(f"base '{name}' does not fit into memory.") from error
        except ImportError as error:
            raise ResourceError(f"base '{name}' needs a library: {_first_line(error)}") from error
    _check_complete(name, frame, report)
    guard_repacking(loaded)
    loaded.requires_grad_(False)
    loaded.eval()
    loaded.config.name_or_path = name
    if loaded.can_generate() and (path / "generation_config.json").is_file():
        loaded.generation_config = GenerationConfig.from_pretrained(str(path), local_files_only=True)
    new = tuple(sorted(report["missing_keys"]))
    base = Base(
        name, path, loaded, tokenizer, fingerprint(path), info.quantization, *_sizes(loaded), dtype, device, new, []
    )
    base.notes.append(_describe(base, heads))
    if new:
        base.notes.append(f"new, from the seed: {_some(list(new))}")
    unused = sorted(report["unexpected_keys"])
    if unused and not new:  # a model with a head of its own has no use for the checkpoint's
        base.notes.append(f"{len(unused)} tensors of the checkpoint are not used: {_some(unused)}")
    return base


def _heads(model: PreTrainedModel) -> list[str]:
    """Names of modules beside the decoder or encoder; they stay in the compute dtype."""
    return [name for name, _ in model.named_children() if name != model.base_model_prefix]


def _with_dtype(stored: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The checkpoint's own bitsandbytes configuration, computing in `dtype`."""
    values = dict(stored if isinstance(stored, dict) else stored.to_dict())
    if values.get("load_in_4bit"):
        values["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    return values


def _slices(tensors: dict[str, Entry], views: bool) -> dict[str, Any]:
    """Every tensor of a checkpoint, to be read when it is indexed.

    Args:
        views: give views of the mapped files, which nobody copies; else the bytes are read, because the pages of a
            mapped file that a quantiser has done with would still count as memory of the process.
    """
    from safetensors import safe_open

    files: dict[Path, Any] = {}
    for entry in tensors.values():
        if entry.file not in files:
            files[entry.file] = safe_open(entry.file, framework="pt", backend="mmap" if views else "pread")
    return {name: files[entry.file].get_slice(name) for name, entry in tensors.items()}


@contextmanager
def _tight_heap() -> Iterator[None]:
    """Have glibc give back at once what is freed; quantising a base else leaves holes larger than the base.

    What it sets afterwards is what it arrives at by itself when large tensors come and go.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_threshold, most = -1, -3, 32 << 20  # names and largest value of <malloc.h>
    mallopt(mmap_threshold, 128 << 10)
    try:
        yield
    finally:
        mallopt(mmap_threshold, most)
        mallopt(trim_threshold, 2 * most)


def _check_complete(name: str, frame: PreTrainedModel, report: dict[str, Any]) -> None:
    """Refuse a checkpoint that does not fill its model; only a classifier's head may be new.

    Raises:
        CorruptError: it names what is missing, or has another shape, or belongs to layers that the model has not.
    """
    within = f"{frame.base_model_prefix}."
    missing = sorted(report["missing_keys"])
    if frame.get_output_embeddings() is None:
        missing = [key for key in missing if key.startswith(within)]
    if missing:
        raise CorruptError(f"base '{name}': {len(missing)} weights are missing: {_some(missing)}")
    mismatched = sorted(str(item[0]) for item in report["mismatched_keys"])
    if mismatched:
        raise CorruptError(f"base '{name}': {len(mismatched)} weights have another shape than config.json says: "
                           f"{_some(mismatched)}")  # fmt: skip
    numbered = {re.sub(r"\d+", "#", key) for key in frame.state_dict()}
    beyond = [key for key in sorted(report["unexpected_keys"]) if re.sub(r"\d+", "#", key) in numbered]
    if beyond:
        raise CorruptError(f"base '{name}': the checkpoint holds layers beyond those of config.json: {_some(beyond)}")
    if report.get("error_msgs"):
        raise CorruptError(f"base '{name}': {str(report['error_msgs'][0]).splitlines()[0]}")


def _sizes(model: nn.Module) -> tuple[int, int, float, int]:
    """Bytes as stored, bytes in 16 bit, share of weights not quantised, count of parameters."""
    import torch

    storages: dict[int, int] = {}
    count = unquantized = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        numbers = math.prod(state.shape) if state is not None else parameter.numel()
        count += numbers
        unquantized += numbers if parameter.is_floating_point() else 0
        constants = state.as_dict(packed=True).values() if state is not None else [getattr(parameter, "SCB", None)]
        for tensor in (parameter.data, *constants):
            if isinstance(tensor, torch.Tensor):
                storages[tensor.data_ptr()] = tensor.nbytes
    for buffer in model.buffers():
        storages[buffer.data_ptr()] = buffer.nbytes
    return sum(storages.values()), 2 * count, unquantized / max(count, 1), count


def _describe(base: Base, heads: list[str]) -> str:
    if base.quantization == "none":
        return f"{size(base.bytes)} in {str(base.dtype).removeprefix('torch.')}, not quantised"
    kept = ["embeddings", *(head for head in heads if any(True for _ in base.model.get_submodule(head).parameters()))]
    return (
        f"{size(base.bytes)} in {base.quantization} ({size(base.bytes_16bit)} in 16 bit); "
        f"{base.unquantized_share:.0%} of the weights stay unquantised: {', '.join(kept)}, norms"
    )


def pick_device_precision(device: str | None, precision: str | None) -> tuple[torch.device, torch.dtype, str]:
    """Choose device and precision for this machine, where the user has not.

    Args:
        device: a torch device such as "cpu" or "cuda:1"; None or "auto": CUDA where there is one.
        precision: bf16, fp16 or fp32; None or "auto": bf16 where the device computes it natively.

    Returns:
        Device, dtype, and the reason in words.

    Raises:
        InputError: no such device name or precision.
        ResourceError: the machine has not that device, or the device not that precision.
    """
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision not in (None, "auto", *dtypes):
        raise InputError(f"precision '{precision}': use {', '.join(dtypes)} or auto.")
    if device in (None, "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(str(device))
    except RuntimeError as error:
        raise InputError(f"device '{device}': no such name; use cpu, cuda or cuda:0.") from error
    available = getattr(getattr(torch, chosen.type, None), "is_available", lambda: False)
    if not available():
        raise ResourceError(f"device '{device}': torch {torch.__version__} finds none here; use cpu.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ResourceError(f"device '{device}': this machine has {torch.cuda.device_count()}; count from cuda:0.")
    native = _native_precisions(chosen)
    if precision is not None and precision != "auto":
        native_or_full = precision in native or precision == "fp32"
        return chosen, dtypes[precision], "as asked" if native_or_full else "as asked; this device emulates it, slowly"
    # fp16 needs its losses scaled, which is worth it only where there is no bf16 and fp32 is slow.
    order = ("bf16",) if chosen.type == "cpu" else ("bf16", "fp16")
    precision = next((name for name in order if name in native), "fp32")
    reason = "no fast bf16 here" if precision == "fp32" else "native here"
    return chosen, dtypes[precision], reason


def _native_precisions(device: torch.device) -> set[str]:
    """Which of the 16-bit precisions the device multiplies in hardware."""
    import torch

    if device.type == "cuda":
        return {"fp16", *(["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else [])}
    if device.type != "cpu":
        return {"fp16", "bf16"}
    has = torch.cpu.get_capabilities()
    bf16 = any(has.get(key) for key in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    fp16 = any(has.get(key) for key in ("avx512_fp16", "amx_fp16", "fp16_arith"))
    return {name for name, there in (("bf16", bf16), ("fp16", fp16)) if there}


def size(count: int) -> str:
    """Bytes for people, in decimal units: 5.2 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

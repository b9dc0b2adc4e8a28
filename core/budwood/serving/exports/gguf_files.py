"""GGUF files: an adapter as llama.cpp's LoRA, and a complete model with its tokenizer. Each is read back.

The layout of an adapter is that of llama.cpp's convert_lora_to_gguf.py, as `src/llama-adapter.cpp` reads it: the type
"adapter", adapter.type "lora", alpha, and two tensors NAME.lora_a [rank, in] and NAME.lora_b [out, rank].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from budwood.errors import BudwoodError, InputError, ResourceError
from budwood.model.checkpoint import read_tensors
from budwood.serving.exports.architectures import Architecture, hyperparameters, rope_factors
from budwood.serving.exports.factors import Factors, largest_rank, padded
from budwood.serving.exports.vocabulary import Vocabulary
from budwood.untrusted.formats import TensorInfo
from budwood.untrusted.redaction import shorten

_IGNORED = ".rotary_emb.inv_freq"
"""Buffers that old checkpoints hold."""
_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def check_installed() -> None:
    """Require the package gguf.

    Raises:
        ResourceError: it is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ResourceError("GGUF files need the package gguf: pip install 'budwood[gguf]'")


def adapter_names(factors: Factors, arch: Architecture, where: str) -> dict[str, str]:
    """Return llama.cpp's name of the weight of each adapted linear.

    Raises:
        InputError: llama.cpp has no such weight.
    """
    names = {}
    for path in factors:
        name = arch.gguf_name(f"{path}.weight")
        if name == "output.weight" and arch.tied:
            raise InputError(
                f"{where}: adapts '{shorten(path)}', which is tied to the embeddings: llama.cpp cannot: merge it: "
                "--for gguf --merged"
            )
        if name is None:
            raise InputError(f"{where}: adapts '{shorten(path)}', of which llama.cpp's {arch.name} has no weight.")
        names[path] = name
    return names


def write_adapter_gguf(path: Path, factors: Factors, arch: Architecture, where: str) -> int:
    """Write an adapter with one rank and alpha = rank, so that llama.cpp scales it by 1; return the rank."""
    import gguf

    names, rank = adapter_names(factors, arch, where), largest_rank(factors)
    writer = gguf.GGUFWriter(path, arch.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for module, (a, b) in padded(factors, rank).items():
        writer.add_tensor(f"{names[module]}.lora_a", a.contiguous().numpy())
        writer.add_tensor(f"{names[module]}.lora_b", arch.to_gguf(module, b).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rank


def read_adapter_gguf(path: Path, arch: Architecture, factors: Factors, where: str) -> Factors:
    """Read an adapter back, with the rows in the order of transformers.

    Args:
        factors: the adapter that was written: the paths of its linears.

    Raises:
        BudwoodError: the file does not hold exactly these linears.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    kind, alpha = (reader.get_field(key) for key in ("adapter.type", "adapter.lora.alpha"))
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    found: Factors = {}
    for module, name in adapter_names(factors, arch, where).items():
        a, b = tensors.pop(f"{name}.lora_a", None), tensors.pop(f"{name}.lora_b", None)
        if a is None or b is None or kind is None or kind.contents() != "lora" or alpha is None:
            raise BudwoodError(f"{path}: holds no update of '{name}'.")
        found[module] = a, arch.from_gguf(module, b) * (float(alpha.contents()) / len(a))
    if tensors:
        raise BudwoodError(f"{path}: holds more than was written: {next(iter(tensors))}")
    return found


def write_model_gguf(
    path: Path, folder: Path, config: dict[str, Any], arch: Architecture, vocabulary: Vocabulary, name: str
) -> None:
    """Write a model folder as one GGUF file, with each weight in its stored dtype and vectors in fp32.

    Args:
        folder: a folder of transformers; its weights are read one at a time.
        config: its config.json.
        name: the model's name.

    Raises:
        InputError: llama.cpp has no place for one of its weights.
    """
    import gguf

    infos = _weights(folder, arch)
    writer = gguf.GGUFWriter(path, arch.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    for key, value in hyperparameters(config, arch).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{arch.name}.{key}", value)  # type: ignore[operator]
    _add_vocabulary(writer, vocabulary)
    factors = rope_factors(config, arch)
    tensors = [(gguf_name, source) for source, gguf_name in infos.items()]
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.numpy().dtype, factors.nbytes)
    for gguf_name, info in tensors:
        dtype = _stored(info)
        size = dtype.itemsize
        shape = (*info.shape[:-1], info.shape[-1] * size)
        kind = getattr(gguf.GGMLQuantizationType, _TYPES[dtype])
        writer.add_tensor_info(gguf_name, shape, _bytes(torch.empty(1)).dtype, _count(info) * size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for info, weight in _read(infos):
        writer.write_tensor_data(_bytes(arch.to_gguf(info.name, weight).to(_stored(info))))
    writer.close()


def compare_model_gguf(path: Path, folder: Path, arch: Architecture) -> int:
    """Read a model back, and compare every weight with the folder's, bit for bit; return their number.

    Raises:
        BudwoodError: one differs, or is missing.
    """
    import gguf

    infos = _weights(folder, arch)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    tensors.pop("rope_freqs.weight", None)
    for info, value in _read(infos):
        found = tensors.pop(infos[info], None)
        dtype = _stored(info)
        if found is None or found.tensor_type.name != _TYPES[dtype]:
            raise BudwoodError(f"{path}: '{infos[info]}' is missing, or in another dtype than was written.")
        read = torch.from_numpy(found.data.copy()).reshape(-1).view(torch.uint8).view(dtype).reshape(info.shape)
        if not arch.from_gguf(info.name, read).equal(value.to(dtype)):
            raise BudwoodError(f"{path}: '{infos[info]}' is not '{info.name}' of the model.")
    if tensors:
        raise BudwoodError(f"{path}: holds more than was written: {next(iter(tensors))}")
    return len(infos)


def _weights(folder: Path, arch: Architecture) -> dict[TensorInfo, str]:
    """Return llama.cpp's name of each of a folder's weights."""
    names = {}
    for path, info in read_tensors(folder).items():
        if path.endswith(_IGNORED):
            continue
        name = arch.gguf_name(path)
        if name is None or info.dtype not in _TYPES.values():
            why = "llama.cpp has no place for it" if name is None else f"its dtype {info.dtype} cannot be written"
            raise InputError(f"{info.file}: '{shorten(path)}': {why}.")
        names[info] = name
    return names


def _read(infos: dict[TensorInfo, str]) -> Iterator[tuple[TensorInfo, Tensor]]:
    for info in infos:
        with safe_open(info.file, "pt") as file:
            yield info, file.get_tensor(info.name)


def _stored(info: TensorInfo) -> torch.dtype:
    """Return the dtype in which a weight is written: vectors in fp32, as llama.cpp computes with them."""
    if len(info.shape) < 2:
        return torch.float32
    return next(dtype for dtype, name in _TYPES.items() if name == info.dtype)


def _count(info: TensorInfo) -> int:
    count = 1
    for size in info.shape:
        count *= size
    return count


def _bytes(value: Tensor) -> Any:
    return value.contiguous().view(torch.uint8).numpy()


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for name, token in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)

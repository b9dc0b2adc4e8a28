"""Models as llama.cpp knows them: which ones, the names and order of their weights, and their hyperparameters.

llama.cpp rotates pairs of neighbouring elements in models of Llama's type, where transformers rotates the first half of
a head against the second: the rows of q and k are in another order there.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from budwood.errors import InputError
from budwood.untrusted.redaction import shorten


@dataclass(frozen=True)
class Architecture:
    """A model type that can be written.

    Attributes:
        name: llama.cpp's name.
        rotated: whether the rows of q and k are in llama.cpp's order.
        heads, kv_heads: number of attention heads, and of those of keys and values.
        layers: number of layers.
        tied: whether the head is the embeddings, so that llama.cpp has no weight of its own for it.
    """

    name: str
    rotated: bool
    heads: int
    kv_heads: int
    layers: int
    tied: bool

    def gguf_name(self, path: str) -> str | None:
        """Return the name of a parameter, such as blk.0.attn_q.weight; None if llama.cpp has none."""
        import gguf

        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        return gguf.get_tensor_name_map(arch, self.layers).get_name(path, (".weight", ".bias"))

    def to_gguf(self, path: str, value: Tensor) -> Tensor:
        """Return a weight [out, …] or bias [out] with its rows in llama.cpp's order."""
        heads = self._heads_of(path)
        if heads is None:
            return value
        return value.reshape(heads, 2, len(value) // heads // 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)

    def from_gguf(self, path: str, value: Tensor) -> Tensor:
        """Undo `to_gguf`."""
        heads = self._heads_of(path)
        if heads is None:
            return value
        return value.reshape(heads, len(value) // heads // 2, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)

    def _heads_of(self, path: str) -> int | None:
        match = re.search(r"\.([qk])_proj(?:\.(?:weight|bias))?$", path) if self.rotated else None
        return None if match is None else self.heads if match[1] == "q" else self.kv_heads


_MODELS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's names of transformers' model types of which models and adapters are written."""
_ADAPTERS = {"gemma2": "gemma2", "gemma3_text": "gemma3"}
"""Those of which only adapters are written: the tokenizers of these models are SentencePiece's."""
_ROPE_TYPES = ("default", "linear", "llama3")


def architecture_of(config: dict[str, Any], where: str) -> Architecture:
    """Return the architecture of a base.

    Args:
        config: its config.json.
        where: the base, for messages.

    Raises:
        InputError: it is not one that can be written, or has an option that llama.cpp does not compute.
    """
    kind = str(config.get("model_type"))
    names = _MODELS | _ADAPTERS
    if kind not in names:
        raise InputError(
            f"base '{where}': model type '{shorten(kind)}' cannot be written as GGUF, only {', '.join(names)}: merge "
            "the adapter (--for merged), and convert the folder with llama.cpp's convert_hf_to_gguf.py."
        )
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    name = names[kind]
    layers, tied = int(config["num_hidden_layers"]), bool(config.get("tie_word_embeddings", kind in _ADAPTERS))
    if kind in _ADAPTERS:
        return Architecture(name, False, heads, kv_heads, layers, tied)
    rope = _rope(config)
    problems = {
        f"hidden_act: {config.get('hidden_act')}": config.get("hidden_act", "silu") != "silu",
        f"rope_type: {rope.get('rope_type')}": rope.get("rope_type", "default") not in _ROPE_TYPES,
        "partial_rotary_factor": (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1) != 1,
        "use_sliding_window": bool(config.get("use_sliding_window")),
    }
    if problem := next((name for name, found in problems.items() if found), None):
        raise InputError(f"base '{where}': config.json: {shorten(problem)} is not what llama.cpp computes for {kind}.")
    return Architecture(name, name == "llama", heads, kv_heads, layers, tied)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary parameters, of this and older versions of transformers."""
    old = config.get("rope_scaling") or {}
    rope = {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": old.get("type", "default"), **old}
    return rope | (config.get("rope_parameters") or {})


def hyperparameters(config: dict[str, Any], arch: Architecture) -> dict[str, int | float | str]:
    """Return the keys of a model's GGUF without the architecture's name before them."""
    size = int(config.get("head_dim") or config["hidden_size"] // arch.heads)
    rope = _rope(config)
    context = int(config["max_position_embeddings"])
    if config.get("model_type") == "mistral" and config.get("sliding_window"):
        context = min(context, int(config["sliding_window"]))  # up to here the window changes nothing
    values: dict[str, int | float | str] = {
        "vocab_size": int(config["vocab_size"]),
        "context_length": context,
        "embedding_length": int(config["hidden_size"]),
        "block_count": arch.layers,
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": arch.heads,
        "attention.head_count_kv": arch.kv_heads,
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": size,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return values


def rope_factors(config: dict[str, Any], arch: Architecture) -> Tensor | None:
    """Return the divisors [head size / 2] of the rotary frequencies of Llama 3.1; None for other types.

    Frequencies of long wavelengths are divided by `factor`, short ones are kept, and those between are interpolated
    (Llama Team, 2024; transformers' `_compute_llama3_parameters`).
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    size = int(config.get("head_dim") or config["hidden_size"] // arch.heads)
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    waves = 2 * math.pi * float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = float(rope["original_max_position_embeddings"]) / waves
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (share + (1 - share) / factor)).float()


def check_complete(config: dict[str, Any], where: str) -> None:
    """Refuse a base of which only adapters can be written: by its type, or since it is quantised on disk.

    Raises:
        InputError: the message says why.
    """
    if (kind := str(config.get("model_type"))) in _ADAPTERS:
        raise InputError(
            f"base '{where}': only adapters of model type '{kind}' are written as GGUF: leave the base out, or merge "
            "the adapter (--for merged), and convert the folder with llama.cpp's convert_hf_to_gguf.py."
        )
    if found := config.get("quantization_config"):
        method = json.dumps(found.get("quant_method") if isinstance(found, dict) else None)
        raise InputError(
            f"base '{where}' is quantised on disk ({method}): pass the unquantised original with --base DIR "
            "--allow-other-base."
        )

"""Refuses a base that cannot serve, before its weights load: from JSON files, headers, modules without weights."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budwood.contract.calls import attribute_errors
from budwood.contract.discovery import PluginError, installed
from budwood.contract.loading import create
from budwood.errors import CorruptError, InputError, ResourceError, describe
from budwood.model.checkpoint import first_line, read_config, read_tensors, resolve
from budwood.model.quantizers import Quantizer
from budwood.untrusted.redaction import shorten

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

GUARDED = ("jinja2", "safetensors", "torch", "transformers")
"""Libraries that read what strangers wrote."""
TOKENIZER_BYTES = 256_000_000
"""Largest file of a tokenizer that is read, in bytes; those of the largest vocabularies have 40 MB."""
LAYERS = 2000
"""More layers than this are believed only of a checkpoint that has as many tensors."""
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


@functools.cache
def check_versions() -> None:
    """Refuse libraries that are older than Budwood asks for: older ones have holes by which a file can run code.

    Raises:
        ResourceError: it names the library, its version, and how to upgrade it.
    """
    for requirement in metadata.requires("budwood") or ():
        asked = re.match(r"(\w+)>=([\d.]+)$", requirement)
        if asked is not None and asked[1] in GUARDED:
            have = metadata.version(asked[1])
            old, least = ([int(n) for n in re.findall(r"\d+", version)] for version in (have, asked[2]))
            if old[: len(least)] < least:
                raise ResourceError(
                    f"{asked[1]} {have} is installed, and older than {asked[2]} it has holes by which a file can run "
                    f"code: pip install -U '{asked[1]}>={asked[2]}'"
                )


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
    check_versions()
    wanted = None if quantization is None else find_quantizer(quantization)
    path = resolve(model, weights=False, code=trust_remote_code)
    config = read_config(path)
    here = Path(os.path.expanduser(str(model))).is_dir()  # a hub name's weights may not be here yet
    _check_layers(path, config, len(read_tensors(path)) if here else 0)
    _check_architecture(str(model), config, trust_remote_code)
    stored = _stored_quantization(str(model), config, wanted)
    if stored is not None and quantization not in (None, stored):
        raise InputError(
            f"base '{model}' is quantised already, with {stored}: write `quantization: {stored}`, "
            f"or give the unquantised base for {quantization}."
        )
    name = stored or quantization or "none"
    quantizer = wanted or find_quantizer(name)
    if device is not None:
        with attribute_errors(quantizer, "check"):
            quantizer.check(str(device))
    if not quantizer.takes_fused_experts and _has_experts(config):
        check_fused(str(model), skeleton(path, "AutoModel", trust_remote_code), name)
    return BaseInfo(str(model), path, config, name, stored is not None)


def _check_layers(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse a configuration that counts modules by the million, which would be built one by one.

    Raises:
        CorruptError: it counts more layers than `LAYERS`, or ten times as many experts, and than there are tensors.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            _check_layers(path, value, tensors)
        counts = re.search(r"^n_layer$|^depth$|(layers|blocks|experts)$", key)
        limit = 10 * LAYERS if key.endswith("experts") else LAYERS
        if counts and type(value) is int and value > max(limit, tensors):
            told = f"{shorten(key)}: {shorten(str(value), 20)}"
            raise CorruptError(f"{path / 'config.json'}: {told}; its checkpoint has {tensors:,} tensors.")


def find_quantizer(name: str) -> Quantizer:
    quantizer: Quantizer = create(name, "budwood.quantizers")
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


def _stored_quantization(name: str, config: dict[str, Any], wanted: Quantizer | None) -> str | None:
    """Name of the installed quantiser that a checkpoint was saved by: `wanted` if it is that one.

    Raises:
        InputError: no installed quantiser reads it, or several do.
        PluginError: no quantiser that works reads it, and one is broken.
    """
    stored = config.get("quantization_config")
    if not isinstance(stored, dict):
        return None
    readers, broken = [], []
    for candidate in [wanted] if wanted is not None and _reads(wanted, stored) else installed("budwood.quantizers"):
        try:
            quantizer = candidate if isinstance(candidate, Quantizer) else find_quantizer(candidate)
            if _reads(quantizer, stored):
                readers.append(quantizer)
        except PluginError as error:
            broken.append(error)
    if len(readers) > 1:
        raise InputError(
            f"base '{name}' is quantised already, and {' and '.join(map(str, readers))} read it: "
            "name one of them as `quantization`."
        )
    if readers:
        return readers[0].name
    if broken:
        raise broken[0]
    raise InputError(
        f"base '{name}' is quantised already, with {shorten(str(stored.get('quant_method', 'unknown')))}, which no "
        "installed quantiser reads: give the unquantised base and `quantization: nf4`."
    )


def _reads(quantizer: Quantizer, stored: dict[str, Any]) -> bool:
    with attribute_errors(quantizer, "reads"):
        return quantizer.reads(stored)


def _has_experts(config: dict[str, Any]) -> bool:
    """Whether a configuration, or one inside it, counts experts."""
    return any(
        _has_experts(value) if isinstance(value, dict) else "experts" in key and type(value) is int and value > 1
        for key, value in config.items()
    )


def check_fused(name: str, model: nn.Module, quantization: str) -> None:
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
    return build_skeleton(str(model), load_config(path, trust_remote_code, model_kwargs), auto_class, trust_remote_code)


def load_config(path: Path, trust_remote_code: bool, changes: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=trust_remote_code, **changes
        )
    except Exception as error:  # a config class may raise anything on values that it does not expect
        raise CorruptError(f"{path / 'config.json'}: {first_line(error)}") from error
    config._attn_implementation = None  # a checkpoint may name a kernel of the hub
    return config


def build_skeleton(name: str, config: PretrainedConfig, auto_class: str, trust_remote_code: bool) -> PreTrainedModel:
    import torch
    import transformers

    try:
        with torch.device("meta"):
            model: PreTrainedModel = getattr(transformers, auto_class).from_config(
                config, trust_remote_code=trust_remote_code
            )
    except ImportError as error:
        raise ResourceError(f"base '{name}' needs a library: {first_line(error)}") from error
    except Exception as error:  # a model class may raise anything on values that it does not expect
        if "Unrecognized configuration class" in str(error):
            raise InputError(f"base '{name}': '{config.model_type}' has no {auto_class} in transformers.") from error
        raise CorruptError(f"base '{name}': config.json describes no model: {describe(error)}") from error
    return model


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer; never runs code of its own.

    Raises:
        InputError: there is none, or none that the `tokenizers` library can run.
        CorruptError: its files are damaged.
    """
    from transformers import AutoTokenizer

    check_versions()
    path = resolve(model, weights=False)
    for file in (*path.glob("*token*"), *path.glob("vocab*"), *path.glob("chat_template*"), path / "config.json"):
        if file.exists() and (file.is_fifo() or file.is_file() and file.stat().st_size > TOKENIZER_BYTES):
            raise CorruptError(f"{file}: is no plain file of at most {size(TOKENIZER_BYTES)}.")
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((path / file).is_file() for file in files):
        raise InputError(f"base '{model}' holds no tokenizer (tokenizer.json): copy that of its original.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        if "trust_remote_code" in str(error):
            raise InputError(
                f"base '{model}': its tokenizer needs Python code of its own, which is never run: give it one that the "
                "installed transformers knows."
            ) from error
        raise CorruptError(f"base '{model}': its tokenizer does not load: {first_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"base '{model}': its tokenizer has no tokenizer.json, and cannot be converted to one.")
    return tokenizer


def size(count: int) -> str:
    """Bytes for people, in decimal units: 5.2 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"

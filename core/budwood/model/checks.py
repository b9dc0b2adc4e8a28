"""Refuses unusable bases before their weights load, based on JSON files, headers and modules without weights."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budwood.contract.calls import attribute_errors
from budwood.contract.discovery import PluginError, installed
from budwood.contract.loading import create
from budwood.errors import BudwoodError, CorruptError, InputError, ResourceError, describe, first_line
from budwood.model.checkpoint import read_config, read_tensors, resolve
from budwood.model.missing_head import check_head
from budwood.model.outputs import take_outputs
from budwood.model.quantizers import Quantizer
from budwood.untrusted.redaction import shorten

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

GUARDED = ("jinja2", "safetensors", "torch", "transformers")
"""Libraries that read untrusted files."""
TOKENIZER_BYTES = 256_000_000
"""Size limit of a tokenizer file, in bytes; the largest vocabularies need 40 MB."""
LAYERS = 2000
"""A configuration may have more layers than this only if the checkpoint has as many tensors."""
_PERMUTED = ("xlnet", "xlm")
"""Model types with a class for causal language modelling that see tokens on both sides."""
FUSED_SHARE = 0.05
"""A base is refused if tensors that its quantiser does not support hold a larger fraction of its weights."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k")
"""Names by which configurations give the number of experts of a layer, and of those that a router chooses."""

PACKED = re.compile(r"\.(?:qweight|weight_packed|weight_scale_inv|SCB|W_q)$|\.absmax$|_qdata$|_proj_blocks$")
"""Names of tensors that only quantised checkpoints have."""


@dataclass(frozen=True)
class BaseInfo:
    """Facts about a base that has not been loaded.

    Attributes:
        name: folder or hub name, as the user gave it.
        path: its folder, which for a hub name is in the hub's cache.
        config: its config.json.
        quantization: name of the quantiser; that of the checkpoint if it is already quantised.
        prequantized: whether the checkpoint is already quantised.
    """

    name: str
    path: Path
    config: dict[str, Any]
    quantization: str
    prequantized: bool


@functools.cache
def check_versions() -> None:
    """Refuse libraries older than Budwood requires, which have vulnerabilities that let a file run code.

    Raises:
        ResourceError: a library is too old; the message has its version and the command that upgrades it.
    """
    for requirement in metadata.requires("budwood") or ():
        match = re.match(r"(\w+)>=([\d.]+)$", requirement)
        if match is not None and match[1] in GUARDED:
            version = metadata.version(match[1])
            installed_version, least = ([int(n) for n in re.findall(r"\d+", v)] for v in (version, match[2]))
            if installed_version[: len(least)] < least:
                raise ResourceError(
                    f"{match[1]} {version} is installed; versions before {match[2]} have vulnerabilities that let a "
                    f"file run code: pip install -U '{match[1]}>={match[2]}'"
                )


def check_base(
    model: str | Path,
    quantization: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str | None = None,
) -> BaseInfo:
    """Check a base as far as possible without loading weights, from its JSON files and safetensors headers.

    Args:
        model: a folder, or a hub name, of which only small files are downloaded.
        quantization: name of a quantiser; None: that of the checkpoint, if it is quantised.
        trust_remote_code: allow the checkpoint's Python files to run.
        device: also check that the quantiser supports this device, which imports its library.

    Raises:
        InputError: the base does not exist; it has only pickled or GGUF weights; its model class is unknown or needs
            custom code; the quantisation does not match the checkpoint.
        ResourceError: the hub cannot be reached; the machine does not support the quantisation.
        CorruptError: a file is missing, truncated or malformed.
    """
    check_versions()
    requested = None if quantization is None else find_quantizer(quantization)
    path = resolve(model, weights=False, code=trust_remote_code)
    config = read_config(path)
    local = Path(os.path.expanduser(str(model))).is_dir()  # otherwise the weights may not be downloaded yet
    tensors = read_tensors(path) if local else {}
    _check_layers(path, config, len(tensors))
    _check_routing(path, config)
    _check_architecture(str(model), config, trust_remote_code)
    stored = _stored_quantization(str(model), config, requested)
    name = stored or quantization or "none"
    quantizer = find_quantizer(name)
    if stored is not None:
        with attribute_errors(quantizer, "check_stored"):
            quantizer.check_stored(config["quantization_config"], None if device is None else str(device))
    elif quantizer.stored_only:
        raise InputError(
            f"base '{model}' is not quantised, and {name} only reads bases that are: set quantization to nf4, or "
            f"take a base in {name}."
        )
    if stored is not None and quantization not in (None, stored):
        raise InputError(
            f"base '{model}' is already quantised, with {stored}: set quantization to {stored}, "
            f"or give the unquantised base for {quantization}."
        )
    if tensors:
        _check_stored_names(path, tensors, quantizer if stored is not None else None)
    if device is not None:
        with attribute_errors(quantizer, "check"):
            quantizer.check(str(device))
    if not quantizer.takes_fused_experts and _has_experts(config):
        check_fused(str(model), skeleton(path, "AutoModel", trust_remote_code), quantizer)
    return BaseInfo(str(model), path, config, name, stored is not None)


def stored_quantization(model: str | Path) -> str | None:
    """Return the name of the quantiser that saved a base; None: it is not quantised, or `check_base` refuses it."""
    try:
        return _stored_quantization(str(model), read_config(resolve(model, weights=False)), None)
    except BudwoodError:
        return None


def _check_layers(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse a configuration with millions of modules, which would be built one by one.

    Raises:
        CorruptError: it has more than `LAYERS` layers, or ten times as many experts, and more than there are tensors.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            _check_layers(path, value, tensors)
        counts = re.search(r"^n_layer$|^depth$|(layers|blocks|experts)$", key)
        limit = 10 * LAYERS if key.endswith("experts") else LAYERS
        if counts and type(value) is int and value > max(limit, tensors):
            entry = f"{shorten(key)}: {shorten(str(value), 20)}"
            raise CorruptError(f"{path / 'config.json'}: {entry}; its checkpoint has {tensors:,} tensors.")


def _check_routing(path: Path, config: dict[str, Any]) -> None:
    """Refuse a configuration whose routers choose more experts than there are, or none.

    Raises:
        InputError: the message names the field.
    """
    for value in config.values():
        if isinstance(value, dict):
            _check_routing(path, value)
    count = next((config[name] for name in EXPERTS if type(config.get(name)) is int), 0)
    for name in CHOSEN if count > 1 else ():
        chosen = config.get(name)
        if type(chosen) is int and not 1 <= chosen <= count:
            raise InputError(
                f"{path / 'config.json'}: {name} is {shorten(str(chosen), 20)}, and each layer has {count} experts: "
                "take the config.json that was saved with these weights."
            )


def find_quantizer(name: str) -> Quantizer:
    quantizer: Quantizer = create(name, "budwood.quantizers")
    return quantizer


def _check_architecture(name: str, config: dict[str, Any], trust_remote_code: bool) -> None:
    kind = config["model_type"]
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations
    models = Path(spec.submodule_search_locations[0]) / "models"
    if re.fullmatch(r"\w+", kind.replace("-", "_")) and (models / kind.replace("-", "_")).is_dir():
        return  # usual case: transformers, which takes seconds to import, has a folder named after each model type
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if kind in CONFIG_MAPPING_NAMES or ("auto_map" in config and trust_remote_code):
        return
    if "auto_map" in config:
        raise InputError(
            f"base '{name}': model type '{kind}' needs custom Python code, which is not run: review it, "
            "then write `trust_remote_code: true`."
        )
    raise InputError(f"base '{name}': the installed transformers does not support model type '{kind}': upgrade it.")


def _stored_quantization(name: str, config: dict[str, Any], requested: Quantizer | None) -> str | None:
    """Return the name of the quantiser that saved a checkpoint, or None; `requested` has priority if several match.

    Raises:
        InputError: no installed quantiser reads the checkpoint, or several do.
        PluginError: no working quantiser reads the checkpoint, and one is broken.
    """
    stored = config.get("quantization_config")
    if stored is None:
        return None
    if not isinstance(stored, dict):
        raise InputError(
            f"base '{name}': quantization_config in config.json is {shorten(repr(stored))}, and has to be an object: "
            "take the config.json that was saved with these weights."
        )
    readers, broken = [], []
    chosen = [requested] if requested is not None and _reads(requested, stored) else installed("budwood.quantizers")
    for candidate in chosen:
        try:
            quantizer = candidate if isinstance(candidate, Quantizer) else find_quantizer(candidate)
            if _reads(quantizer, stored):
                readers.append(quantizer)
        except PluginError as error:
            broken.append(error)
    if len(readers) > 1:
        raise InputError(
            f"base '{name}' is already quantised, and {' and '.join(map(str, readers))} read it: "
            "set quantization to one of them."
        )
    if readers:
        return readers[0].name
    if broken:
        raise broken[0]
    raise InputError(
        f"base '{name}' is already quantised, with {shorten(str(stored.get('quant_method', 'unknown')))}, which no "
        "installed quantiser reads: give the unquantised base with quantization nf4."
    )


def _check_stored_names(path: Path, tensors: Iterable[str], quantizer: Quantizer | None) -> None:
    """Check that a checkpoint has quantised tensors if, and only if, its configuration says so.

    Args:
        quantizer: that of the configuration; None: it says that the checkpoint is not quantised.

    Raises:
        InputError: they contradict each other.
    """
    packed = next((name for name in tensors if PACKED.search(name)), None)
    if quantizer is None:
        if packed is not None:
            raise InputError(
                f"{path}: the tensor '{packed}' is quantised, but config.json has no quantization_config: take the "
                "config.json that was saved with these weights."
            )
    elif quantizer.stored_names and not any(re.search(quantizer.stored_names, name) for name in tensors):
        if packed is not None:
            raise InputError(
                f"{path / 'config.json'}: quantization_config says {quantizer.name}, but the tensor '{packed}' is "
                "quantised in another format: take the config.json that was saved with these weights."
            )
        raise InputError(
            f"{path / 'config.json'}: quantization_config says that the weights are quantised, but no tensor is: "
            "remove it if these are the original weights, or take the files that belong to it."
        )


def _reads(quantizer: Quantizer, stored: dict[str, Any]) -> bool:
    with attribute_errors(quantizer, "reads"):
        return quantizer.reads(stored)


def _has_experts(config: dict[str, Any]) -> bool:
    """Return whether a configuration, or one nested in it, has experts."""
    return any(
        _has_experts(value) if isinstance(value, dict) else "experts" in key and type(value) is int and value > 1
        for key, value in config.items()
    )


def check_fused(name: str, model: nn.Module, quantizer: Quantizer) -> None:
    """Refuse a base if its quantiser would leave a large part of its weights in 16 bit.

    Args:
        model: its modules, with opened experts.

    Raises:
        InputError: fused tensors that it does not take hold more than `FUSED_SHARE` of the weights.
    """
    from budwood.model.quantizers.experts import ExpertLinear

    if quantizer.takes_fused_experts:
        return
    packs = type(quantizer).pack_experts is not Quantizer.pack_experts
    taken = {id(p) for m in model.modules() if packs and isinstance(m, ExpertLinear) for p in m.parameters()}
    fused = {key: p.numel() for key, p in model.named_parameters() if p.ndim > 2 and id(p) not in taken}
    total = sum(p.numel() for p in model.parameters())
    if sum(fused.values()) > FUSED_SHARE * total:
        largest = max(fused, key=lambda key: fused[key])
        stored = quantizer.stored_only
        other = "give the unquantised base with quantization nf4" if stored else "set quantization to none"
        raise InputError(
            f"base '{name}': {len(fused)} fused tensors such as '{largest}' hold "
            f"{size(2 * sum(fused.values()))} of {size(2 * total)} in 16 bit, and {quantizer} cannot "
            f"{'read them quantised' if stored else 'quantise them'}: {other}, or a base without experts."
        )


def skeleton(
    model: str | Path, auto_class: str = "AutoModelForCausalLM", trust_remote_code: bool = False, **model_kwargs: Any
) -> PreTrainedModel:
    """Build a base's modules on the meta device: names and shapes, no weights.

    Args:
        auto_class: name of one of transformers' auto classes.
        model_kwargs: changes to its configuration, such as `num_labels`.

    Raises:
        InputError: the model type has no class for `auto_class`, or the checkpoint has no language-model head for it.
        CorruptError: its configuration is invalid.
    """
    path = resolve(model, weights=False, code=trust_remote_code)
    config = load_config(path, trust_remote_code, model_kwargs)
    frame = build_skeleton(str(model), config, auto_class, trust_remote_code)
    check_head(str(model), frame, auto_class, path)
    return frame


def load_config(path: Path, trust_remote_code: bool, changes: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=trust_remote_code, **changes
        )
    except Exception as error:  # a config class may raise any exception on unexpected values
        if "does not recognize this architecture" in str(error):
            kind = shorten(str(read_config(path)["model_type"]))
            raise InputError(
                f"base '{path}': transformers {metadata.version('transformers')} knows no models of type '{kind}': "
                "pip install -U transformers, or take another base."
            ) from error
        raise CorruptError(f"{path / 'config.json'}: {first_line(error)}") from error
    take_outputs(config)
    config._attn_implementation = None  # a checkpoint may name a kernel on the hub
    return config


def build_skeleton(name: str, config: PretrainedConfig, auto_class: str, trust_remote_code: bool) -> PreTrainedModel:
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    from budwood.model.experts import open_experts
    from budwood.model.heads import name_body

    if auto_class == "AutoModelForCausalLM":
        _check_decoder(name, config)
    try:
        with torch.device("meta"), no_init_weights():  # a tensor without values needs none
            model: PreTrainedModel = getattr(transformers, auto_class).from_config(
                config, trust_remote_code=trust_remote_code
            )
        model.tie_weights(recompute_mapping=False)
    except ImportError as error:
        raise ResourceError(f"base '{name}' needs a library: {first_line(error)}") from error
    except Exception as error:  # a model class may raise any exception on unexpected values
        if "Unrecognized configuration class" in str(error):
            raise InputError(f"base '{name}': '{config.model_type}' has no {auto_class} in transformers.") from error
        if " meta " in str(error):  # of torch: the skeleton's tensors are on the meta device
            raise InputError(
                f"base '{name}': {config.model_type} reads values of tensors while it is built, so it cannot be "
                f"checked or planned without its weights ({first_line(error)}): take another base."
            ) from error
        raise CorruptError(f"base '{name}': no model can be built from config.json: {describe(error)}") from error
    name_body(model)
    open_experts(model)
    return model


def _check_decoder(name: str, config: PretrainedConfig) -> None:
    """Refuse a model that does not predict each token from those before it, although it has a class for that.

    Raises:
        InputError: it is an encoder-decoder, an encoder, or predicts tokens in a permuted order.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as masked

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        what, other = "an encoder-decoder", ""
    elif kind in _PERMUTED or (kind in masked and not getattr(config, "is_decoder", False)):
        what, other = "no decoder", ", or train a classifier: base.task: sequence-classification in a recipe"
    else:
        return
    raise InputError(
        f"base '{name}': '{kind}' is {what}, but causal-lm needs a decoder-only model (such as Llama, Qwen, Mistral, "
        f"GPT-2): take another base{other}."
    )


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer without running custom code.

    Raises:
        InputError: the base has no tokenizer, or the `tokenizers` library does not support it.
        CorruptError: the tokenizer's files are damaged.
    """
    from transformers import AutoTokenizer

    check_versions()
    path = resolve(model, weights=False)
    for file in (*path.glob("*token*"), *path.glob("vocab*"), *path.glob("chat_template*"), path / "config.json"):
        if file.exists() and (file.is_fifo() or file.is_file() and file.stat().st_size > TOKENIZER_BYTES):
            raise CorruptError(f"{file}: not a regular file of at most {size(TOKENIZER_BYTES)}.")
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((path / file).is_file() for file in files):
        raise InputError(f"base '{model}' has no tokenizer (tokenizer.json): copy that of the original model.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        if "trust_remote_code" in str(error):
            raise InputError(
                f"base '{model}': its tokenizer needs custom Python code, which is never run: replace it with one that "
                "the installed transformers supports."
            ) from error
        with suppress(InputError):  # AutoTokenizer reads config.json too, so that may be what is wrong
            load_config(path, False, {})
        raise CorruptError(f"base '{model}': its tokenizer does not load: {first_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"base '{model}': its tokenizer has no tokenizer.json, and cannot be converted to one.")
    return tokenizer


def size(count: int) -> str:
    """Format a number of bytes in decimal units, such as 5.2 MB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"

"""Exports an adapter for stock PEFT. Loads no model, and imports neither transformers nor PEFT, which takes seconds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from budwood.adapters.owner import start_owner
from budwood.adapters.store import CONFIG, WEIGHTS, SavedAdapter, read_adapter
from budwood.contract.calls import ask_owner
from budwood.contract.discovery import find, plugin_fault
from budwood.contract.loading import load_strategy
from budwood.errors import CorruptError, InputError
from budwood.untrusted.files import complete_directory


def export(directory: str | Path, out: str | Path, format: str = "peft") -> Path:
    """Write a folder that stock PEFT opens: config and weights only, without Budwood's own files.

    Args:
        directory: the adapter's folder.
        out: the new folder; it may not exist yet.
        format: peft: unchanged; or another adapter type to which its owner can convert it, such as lora.

    Raises:
        InputError: the adapter cannot be converted to `format`, PEFT does not know its type, or `out` exists.
        CorruptError: the adapter is damaged.
    """
    saved = read_adapter(directory)
    with complete_directory(Path(out)) as folder:
        write_peft(saved, folder, format)
    return Path(out)


def check_no_target(**options: Any) -> None:
    """Refuse options of `export --for` without `--for`.

    Raises:
        InputError: one is set; the message names it.
    """
    if given := next((name for name, value in options.items() if value not in (None, False)), None):
        raise InputError(f"--{given.replace('_', '-')}: needs --for peft, vllm, gguf, ollama or merged.")


def write_peft(saved: SavedAdapter, folder: Path, format: str = "peft") -> None:
    """Write config and weights into an existing folder; see `export`."""
    config, tensors = saved.config, saved.load_tensors()
    if format not in ("peft", saved.adapter_type):
        result = converted(saved, tensors, format)
        if result is None:
            nearest = format == "lora" and can_be_lora(saved)
            raise InputError(
                f"{saved.directory}: adapter type '{saved.adapter_type}' cannot be exported as '{format}': use peft"
                f"{', or --rank R for the nearest LoRA of that rank' if nearest else ''}."
            )
        config, tensors = result
    if config.get("peft_type") not in _peft_types():
        raise InputError(
            f"{saved.directory}: PEFT does not know the adapter type '{saved.adapter_type}': it cannot be exported."
        )
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if format != "peft" and (found := read_adapter(folder).adapter_type) != format:
        text = f"strategy '{saved.adapter_type}' returned an adapter of type '{found}' instead of '{format}'."
        raise plugin_fault(find(saved.adapter_type).owner, text)


def converted(
    saved: SavedAdapter, tensors: dict[str, Tensor], adapter_type: str
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return an adapter's config and tensors as another type, converted by its owner; None if it cannot be."""
    cls, _ = load_strategy(saved.adapter_type)
    if not hasattr(cls, "convert_adapter"):
        return None
    owner = start_owner(saved)
    try:
        result = ask_owner(owner, "convert_adapter", config=saved.config, tensors=tensors, adapter_type=adapter_type)
    except (InputError, CorruptError) as error:
        raise type(error)(f"{saved.directory}: {error}") from error
    if result is None:
        return None
    config, tensors = result
    return config, {key: tensor.contiguous() for key, tensor in tensors.items()}


def can_be_lora(saved: SavedAdapter) -> bool:
    """Return whether its files and its type allow an export as LoRA, exact or of a given rank."""
    cls, _ = load_strategy(saved.adapter_type)
    config = saved.config
    beyond = ("modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias")
    return (
        (hasattr(cls, "merge_adapter") or hasattr(cls, "convert_adapter"))
        and not cls.beyond_linears
        and not any(config.get(field) for field in beyond)
        and config.get("bias", "none") == "none"
        and not any(".lora_embedding_" in key for key in saved.infos)
    )


def _peft_types() -> set[str]:
    """Return the adapter types of the installed PEFT, from the file that lists them if it is where it used to be."""
    package = importlib.util.find_spec("peft")
    folders = (package.submodule_search_locations if package is not None else None) or ["."]
    path = Path(folders[0], "utils", "peft_types.py")
    spec = importlib.util.spec_from_file_location("budwood_peft_types", path) if path.is_file() else None
    if spec is not None and spec.loader is not None:
        module: Any = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            return {str(member.value) for member in module.PeftType}
        except (ImportError, AttributeError):  # it needs the rest of the package
            pass
    from peft import PeftType

    return {str(member.value) for member in PeftType}

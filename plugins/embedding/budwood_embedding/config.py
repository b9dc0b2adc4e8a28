"""The settings of sentence-transformers in a model's folder: read from a base, and written to a merged model.

modules.json lists what the model consists of; a folder such as 1_Pooling holds a module's config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from budwood import CorruptError, InputError

MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"
LARGEST = 1 << 20
"""Largest size of a file, in bytes."""
POOLING = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
"""Names of the poolings in sentence-transformers' files, and here."""
LEGACY = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
}
"""Flags in the files of versions before 6, which later ones read as well."""


def read_settings(folder: Path, pools: bool = True) -> dict[str, Any]:
    """Return the settings of a base of sentence-transformers as options of the task; {} for any other base.

    Args:
        pools: whether to read the pooling too; otherwise it may be one that the task does not compute.

    Raises:
        InputError: it has a module or a pooling that the task does not compute.
        CorruptError: a file is not JSON, or lacks what it must have.
    """
    if not (folder / MODULES).is_file():
        return {}
    modules = _read(folder / MODULES, list)
    options: dict[str, Any] = {"normalize": False}
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else ""
        if kind == "Pooling":
            name = str(module.get("path"))
            path = folder / name / "config.json"
            if not pools:
                continue
            if Path(name).name != name or not path.is_file():
                raise CorruptError(f"{path} is missing, but listed in {MODULES}.")
            options["pooling"] = _pooling(_read(path, dict), path)
        elif kind == "Normalize":
            options["normalize"] = True
        elif kind != "Transformer":
            raise InputError(
                f"{folder / MODULES}: the module '{kind[:64]}' is not supported: the task embedding computes "
                "Transformer, Pooling and Normalize. Take another base."
            )
    if (folder / SETTINGS).is_file():
        prompts = _read(folder / SETTINGS, dict).get("prompts") or {}
        for name, keys in (("query_prompt", ("query",)), ("document_prompt", ("document", "passage"))):
            text = next((prompts[key] for key in keys if isinstance(prompts.get(key), str)), "")
            options |= {name: text} if text else {}
    return options


def read_kind(folder: Path) -> SimpleNamespace:
    """Return `model_type` and `is_decoder` of a base's config.json."""
    config = _read(folder / "config.json", dict)
    return SimpleNamespace(model_type=config.get("model_type"), is_decoder=config.get("is_decoder", False))


def _pooling(config: dict[str, Any], path: Path) -> str:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [name for name, flag in LEGACY.items() if config.get(flag)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLING:
        found = ", ".join(map(str, modes))[:64] or "none"
        names = ", ".join(POOLING.values())
        raise InputError(
            f"{path}: the pooling '{found}' is not supported: set pooling in base.task_options to one of {names}."
        )
    if config.get("include_prompt", True) is not True:
        raise InputError(f"{path}: include_prompt: false is not supported: prompts are pooled too. Take another base.")
    return POOLING[modes[0]]


def _read(path: Path, kind: type) -> Any:
    try:
        if path.stat().st_size > LARGEST:
            raise CorruptError(f"{path}: is larger than 1 MiB.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: is not JSON ({error}).") from error
    if not isinstance(content, kind):
        raise CorruptError(f"{path}: must hold a JSON {'list' if kind is list else 'object'}.")
    return content


def settings_files(options: Any, dimensions: int, max_length: int | None) -> dict[str, bytes]:
    """Return the files with which sentence-transformers computes the task's vectors, by path.

    Args:
        options: the task's options.
        dimensions: length of a vector.
        max_length: tokens at which texts are truncated; None: as the tokenizer says.
    """
    package = "sentence_transformers.models"
    kinds = [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        *([("2_Normalize", "Normalize")] if options.normalize else []),
    ]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"{package}.{kind}"}
        for number, (path, kind) in enumerate(kinds)
    ]
    chosen = next(theirs for theirs, ours in POOLING.items() if ours == options.pooling)
    pooling: dict[str, Any] = {"word_embedding_dimension": dimensions}
    pooling |= {flag: name == chosen for name, flag in LEGACY.items()} | {"include_prompt": True}
    named = {"query": options.query_prompt, "document": options.document_prompt}
    settings = {
        "prompts": {k: v for k, v in named.items() if v},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    values: dict[str, Any] = {
        MODULES: modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        SETTINGS: settings,
    }
    return {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in values.items()}

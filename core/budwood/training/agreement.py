"""Checks before the base loads that all processes of a run do the same: recipe, data, versions, plugins, base."""

from __future__ import annotations

import hashlib
import inspect
import sys
from pathlib import Path
from typing import Any

from budwood.contract.types import Run
from budwood.errors import InputError, ResourceError
from budwood.model.base import fingerprint
from budwood.model.checkpoint import resolve
from budwood.training.durability.changes import Change, compare, setting

_REMEDIES = {
    "recipe": "start every machine with the same recipe, options and overrides",
    "data": "copy the same data to every machine",
    "versions": "install the same versions on every machine",
    "plugins": "install the same plugins on every machine",
    "base": "copy the same base to every machine",
    "adapter": "copy the same adapter to every machine",
    "device": "start the run on machines of one kind, or set base.device and train.precision",
}
"""What to do, by the first part of the field that differs."""
_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Files of a base beside its weights that say how it is used."""


def check_agreement(run: Run) -> None:
    """Compare this process's run, whose data is read, with those of all others.

    Raises:
        InputError: the recipe, the data or the base differs; the message names the process, its machine and the field.
        ResourceError: versions, plugins or devices differ.
    """
    if run.world.size == 1:
        return
    everyone = run.world.gather((run.world.host, _facts(run)))
    first_host, first = everyone[0]
    for rank, (host, facts) in enumerate(everyone):
        differences = compare(first, facts) or compare(facts, first)
        if not differences:
            continue
        differs = [f"{change.field} is {_shown(change, 1)} in the first process on {first_host} and "
                   f"{_shown(change, 2)} there" for change in differences[:3]]  # fmt: skip
        more = f", and {len(differences) - 3} more differ" if len(differences) > 3 else ""
        part = differences[0].field.partition(".")[0].partition("[")[0]
        environment = part in ("versions", "plugins", "device")
        raise (ResourceError if environment else InputError)(
            f"rank {rank} on {host} does not run the same: {'; '.join(differs)}{more}: {_REMEDIES[part]}."
        )


def _facts(run: Run) -> dict[str, Any]:
    now = setting(run)
    base = Path(resolve(run.recipe.base.model, weights=False))
    files = {name: _sha256((base / name).read_bytes()) for name in _FILES if (base / name).is_file()}
    local = Path(run.recipe.base.model).expanduser().is_dir()
    weights = fingerprint(run.recipe.base.model) if local and not run.hooks.implements("load_base") else base.name
    plugins: list[Any] = [*run.strategies, run.task]
    return {
        "versions": now["versions"],
        "plugins": {plugin.name: [now["strategies"].get(plugin.name, ""), _code(plugin)] for plugin in plugins},
        "recipe": now["recipe"],
        "base": {"weights": weights, "files": files},
        "data": now["data"],
        "adapter": now["adapter"],
        "device": {"kind": run.device.type, "precision": now["precision"]},
    }


def _code(plugin: Any) -> str:
    """Return the hash of the file that a plugin's class stands in."""
    file = getattr(sys.modules.get(type(plugin).__module__), "__file__", None) or inspect.getfile(type(plugin))
    return _sha256(Path(file).read_bytes())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _shown(change: Change, index: int) -> str:
    text = " ".join(str(change[index]).split()) if change[index] is not None else "absent"
    return f"{text[:12]}…" if len(text) == 64 and " " not in text else text if len(text) <= 60 else f"{text[:59]}…"

"""Runs an estimate in a process of its own, whose torch and memory stay apart from the caller's, and keeps the result.

The process reads one JSON object from stdin and writes one to stdout: an estimate, or an error with its class.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from dataclasses import asdict, replace
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from budwood import errors
from budwood.contract.discovery import PluginError
from budwood.data.sources import locate
from budwood.errors import BudwoodError, describe
from budwood.model.checkpoint import one_revision, read_config, resolve
from budwood.model.quiet import silence_libraries
from budwood.planning.devices import find_device
from budwood.planning.estimate import Estimate, estimate
from budwood.planning.options import Device
from budwood.planning.waiting import PlanningProcess
from budwood.recipe.device import check_device
from budwood.recipe.schema import Recipe

KEPT = 50
"""Estimates kept in the cache."""


def estimate_in_process(
    recipe: Recipe, device: Device, tokens: int | None = None, keep: bool = False, processes: int = 1,
    waiting: PlanningProcess | None = None,
) -> Estimate:  # fmt: skip
    """Return `estimate(recipe, device, tokens, processes)`, computed in another process.

    Args:
        keep: use an estimate of the same recipe, data, base, device and versions from the cache, and keep this one.
        waiting: the process to ask, which is ended; None: it is started here.

    Raises:
        BudwoodError: as `estimate`; a ResourceError if the process fails or takes too long.
    """
    check_device(recipe, device.kind)  # here, where the recipe knows its lines
    given = device
    if _depends_on_memory(recipe, processes) and (tokens is None or recipe.train.gradient_checkpointing == "auto"):
        device = replace(device, memory=_rounded(device.memory))
    path = _path(_key(recipe, device, tokens, processes)) if keep else None
    if path is not None and path.is_file():
        try:
            return Estimate.from_dict(json.loads(path.read_text(encoding="utf-8")), given)
        except (OSError, ValueError, KeyError, TypeError):  # damaged: made again
            pass
    plain = recipe.model_dump(mode="json", exclude_none=True)  # with secrets, unlike `to_dict`
    plain["strategies"] = [{choice.name: choice.options} for choice in recipe.strategies]
    request = {
        "recipe": plain, "allow_code": recipe.allows_code, "device": _packed(device), "tokens": tokens,
        "processes": processes, "path": [entry for entry in sys.path if entry],
    }  # fmt: skip
    values = _run(request, waiting)
    if path is not None:
        _write(path, values)
    return Estimate.from_dict(values, given)


def shared_device(device: Device, processes: int, link: float | None = None) -> Device:
    """Return the device of each of a run's processes: a card, or its part of this machine's memory.

    Args:
        link: bytes per second between the processes; None: the card's own.
    """
    if processes > 1 and device.kind == "cpu" and device.measured:  # and not of a size that was given for each
        device = replace(device, name=f"a share of {device.name}", memory=device.memory // processes)
    return device if link is None else replace(device, link=link)


def _depends_on_memory(recipe: Recipe, processes: int) -> bool:
    """Return whether the memory, which changes all the time, decides a setting of the run."""
    train = recipe.train
    shards = processes > 1 and train.parallel is None
    return shards or train.micro_tokens is None or train.gradient_checkpointing == "auto"


def _rounded(memory: int) -> int:
    """Return a size of memory rounded down to a multiple of 1/32 of its power of two, so that estimates are found."""
    unit = max(1 << max(memory.bit_length() - 1, 0) >> 5, 1)
    return memory // unit * unit


def _run(request: dict[str, Any], waiting: PlanningProcess | None) -> dict[str, Any]:
    with waiting or PlanningProcess() as process:
        answer = process.ask(request)
    if "error" in answer:
        kind = PluginError if answer["class"] == "PluginError" else getattr(errors, answer["class"], BudwoodError)
        raise kind(answer["error"])
    return answer


def main() -> None:
    """Read a request, and write the estimate or the error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print
    silence_libraries()
    gc.freeze()  # a collection before each rehearsed step passes over the libraries' objects
    answer: dict[str, Any]
    try:
        request = json.load(sys.stdin)
        sys.path += [entry for entry in request["path"] if entry not in sys.path]
        recipe = Recipe.from_dict(request["recipe"]).allowing_code(request["allow_code"])
        with one_revision(recipe.base.model, recipe.base.revision):
            answer = estimate(recipe, _unpacked(request["device"]), request["tokens"], request["processes"]).as_dict()
    except BudwoodError as error:
        answer = {"class": type(error).__name__, "error": str(error)}
    except Exception as error:  # any model class or plugin may fail on fake tensors
        if os.environ.get("BUDWOOD_DEBUG") == "1":
            raise
        answer = {"class": "ResourceError", "error": f"plan: {describe(error)}"}
    json.dump(answer, out)
    out.flush()
    os._exit(0)  # modules on fake tensors are slow to collect


def _packed(device: Device) -> dict[str, Any]:
    return {**asdict(device), "capability": list(device.capability)}


def _unpacked(values: dict[str, Any]) -> Device:
    return Device(**{**values, "capability": tuple(values["capability"])})


def _key(recipe: Recipe, device: Device, tokens: int | None, processes: int) -> str:
    """Return the hash of everything that an estimate depends on."""
    values = {key: value for key, value in recipe.to_dict().items() if key != "output"}
    files = [recipe.data.train, recipe.data.evaluated] if tokens is None else []
    stamps = []
    for data in files:
        for file in chain.from_iterable(locate(data).files) if data is not None else ():
            status = file.stat()
            stamps.append((str(file), status.st_size, status.st_mtime_ns))
    base = read_config(resolve(recipe.base.model, weights=False))
    versions = {name: metadata.version(name) for name in ("budwood", "torch", "transformers", "peft")}
    memory = device.memory if _depends_on_memory(recipe, processes) else None
    facts = [
        values,
        stamps,
        base,
        versions,
        device.name,
        device.kind,
        device.source,
        memory,
        tokens,
        processes,
        device.link,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _path(key: str) -> Path:
    root = os.environ.get("BUDWOOD_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "budwood") / "plans" / f"{key[:40]}.json"


def _write(path: Path, values: dict[str, Any]) -> None:
    """Keep an estimate; a folder that cannot be written only costs time."""
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(values), encoding="utf-8")
        partial.replace(path)
        for old in sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError:
        partial.unlink(missing_ok=True)


__all__ = ["estimate_in_process", "find_device", "main", "shared_device"]

"""The setting that determines a run, as recorded in manifests, and its changes when a run resumes."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import nn

from budwood.contract.types import Run
from budwood.errors import InputError
from budwood.recipe.schema import Recipe

PINNED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "tokenizers", "numpy")
"""Libraries whose versions a manifest records."""
FIXED = (
    "base.", "adapter.", "recipe.base.task", "recipe.base.quantization", "recipe.base.double_quantization",
    "parameters.",
)  # fmt: skip
"""Prefixes of the fields whose change makes it a different run, which cannot be accepted."""
NOTED = ("threads", "processes")
"""Fields whose change may affect the last digits and is only reported."""


class Change(NamedTuple):
    """A field that differs, with its value in the checkpoint and now."""

    field: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field}: {_short(self.before)} → {_short(self.now)}"


@functools.cache
def version(name: str) -> str:
    """Return the version of an installed distribution, whose metadata is read once."""
    return metadata.version(name)


def pinned_versions() -> dict[str, str]:
    """Return the versions of `PINNED`, by name."""
    return {name: version(name) for name in PINNED}


def setting(run: Run) -> dict[str, Any]:
    """Return the part of a run's setting that is known before the base loads."""
    return {
        "recipe": run.recipe.to_dict(run.strategies),
        "versions": {
            "budwood": version("budwood"),
            "python": platform.python_version(),
            **pinned_versions(),
        },
        "strategies": {s.name: s.distribution for s in run.strategies},
        "data": data_setting(run),
        "adapter": run.start_adapter.hashes.model_dump() if run.start_adapter is not None else None,
        "device": run.device.type,
        "precision": str(run.dtype).removeprefix("torch."),
        "processes": run.processes,
        "threads": torch.get_num_threads(),
    }


def chosen(given: Recipe, run: Run) -> list[str]:
    """Return the fields that a recipe left open and the run chose, such as recipe.train.epochs."""
    before, now = ({"recipe": recipe.to_dict(run.strategies)} for recipe in (given, run.recipe))
    return [change.field for change in compare(before, now) if is_open(change.before)]


def is_open(value: Any) -> bool:
    """Return whether a recipe leaves the value of a field to the run."""
    return value is None or value == "auto"


def data_setting(run: Run) -> dict[str, Any]:
    """Return the hashes of the run's data, and the rows that it holds out, if it does."""
    evaluated = run.eval_examples.sha256 if run.eval_examples else None
    held_out = {"held_out": run.held_out} if run.held_out else {}
    sets = {"train_files": run.examples, "eval_files": run.eval_examples}
    files = {name: examples.files for name, examples in sets.items() if examples and examples.files}
    return {"train": run.examples.sha256, "eval": evaluated, **held_out, **files}


def adapted(run: Run) -> dict[str, Any]:
    """Return the rest of the setting: the base, and the shape of each parameter before the first step."""
    shapes = {name: list(p.shape) for name, p in named_parameters(run).items()}
    return {"base": {"fingerprint": run.base.fingerprint}, "parameters": shapes}


def named_parameters(run: Run) -> dict[str, nn.Parameter]:
    """Return the trainable parameters, keyed "GROUP/NAME"."""
    return {f"{group.name}/{name}": p for group in run.groups for name, p in group.parameters.items()}


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the fields that differ, among those that `now` has."""
    old = dict(_flat({name: before.get(name) for name in now}))
    new = dict(_flat(now))
    return [Change(name, old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)]


def accept(changes: Sequence[Change], where: str, accepted: bool) -> list[Change]:
    """Return the changes if the user accepted them.

    Raises:
        InputError: there are changes without acceptance, or a change that cannot be accepted.
    """
    fixed = [change for change in changes if change.field.startswith(FIXED)]
    if fixed:
        raise InputError(
            f"{where} belongs to a different adapter or base: {_list(fixed)}. This cannot be accepted: undo the "
            "change, name another output folder, or start over with --overwrite."
        )
    if changes and not accepted:
        raise InputError(
            f"{where} has different settings: {_list(changes)}. Undo the change, or accept it with --accept-changes."
        )
    return list(changes)


def _list(changes: Sequence[Change], most: int = 12) -> str:
    more = f"; and {len(changes) - most} more" if len(changes) > most else ""
    return "; ".join(map(str, changes[:most])) + more


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{place}.{key}" if place else str(key))
    elif place == "recipe.strategies":
        yield f"{place}", [name for choice in value for name in choice]
        for choice in value:
            yield from _flat(choice, place)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{place}[{index}]")
    else:
        yield place, value


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = " ".join(str(value).split())
    return f"{text[:12]}…" if len(text) == 64 and " " not in text else text if len(text) <= 80 else f"{text[:79]}…"

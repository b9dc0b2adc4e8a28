"""An adapter that a run of another task continues: what lies below the head goes on, and the head is new."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from budwood.adapters.manifest import ParentRecord
from budwood.adapters.peft_config import PREFIX
from budwood.adapters.store import SavedAdapter
from budwood.adapters.weights import Weights
from budwood.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

_LISTS = ("target_modules", "feedforward_modules", "modules_to_save")
"""Fields of adapter_config.json with full names of modules; Budwood writes no other names."""
_PATTERNS = ("rank_pattern", "alpha_pattern")
SHOWN = 2


@dataclass(frozen=True, kw_only=True)
class CarriedAdapter(SavedAdapter):
    """An adapter with the names that its modules have in the model of another task.

    Attributes:
        origin: the adapter on disk.
        keys: key of each tensor that goes on, and its key in the file.
        left_out: names of the modules that do not go on, such as a head.
        new: tensors of the modules that train whole and are new, by key; empty until the base has been loaded.
    """

    origin: SavedAdapter
    keys: dict[str, str]
    left_out: tuple[str, ...]
    new: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def hashes(self) -> ParentRecord:
        """The hashes of the adapter on disk."""
        return self.origin.hashes

    def read(self) -> Weights:
        """Return the content of the file on disk; see `SavedAdapter.read`."""
        return self.origin.read()

    def load_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that go on, and those of new modules; see `SavedAdapter.load_tensors`."""
        stored = self.origin.load_tensors()
        return {**self.new, **{key: stored[old] for key, old in self.keys.items()}}

    def with_new(self, model: nn.Module, whole: Sequence[str]) -> CarriedAdapter:
        """Return the adapter on a loaded model: what trains whole starts with the model's values, if not with its own.

        Args:
            whole: full names of modules that train whole.
        """
        modules = list(dict.fromkeys([*(self.config.get("modules_to_save") or []), *whole]))
        new = {f"{PREFIX}{path}.{k}": v for path in modules for k, v in model.get_submodule(path).state_dict().items()}
        return replace(self, config={**self.config, "modules_to_save": modules or None}, new=new)

    def describe(self) -> str:
        """Return what goes on and what does not."""
        assert self.manifest is not None
        found = f"{len(self.keys)} tensors of {self.manifest.task} go on"
        if not self.left_out:
            return found
        more = f" and {len(self.left_out) - SHOWN} more" if len(self.left_out) > SHOWN else ""
        return f"{found}, without {', '.join(self.left_out[:SHOWN])}{more}"


def carry(saved: SavedAdapter, old: nn.Module, new: nn.Module, heads: Collection[str]) -> CarriedAdapter:
    """Rename an adapter's modules for the model of another task, and leave out those which that does not have.

    Args:
        saved: an adapter that Budwood wrote.
        old: the model of its task, with or without weights.
        new: the model of the other task.
        heads: names of the heads of `new`, which train whole.

    Raises:
        InputError: it has embeddings of new tokens, or nothing of it goes on.
    """
    assert saved.manifest is not None
    if saved.config.get("trainable_token_indices"):
        raise InputError(
            f"{saved.directory} has embeddings of new tokens, and goes on only within its task, {saved.manifest.task}: "
            "merge it into a base with `budwood adapter merge`, and train on that."
        )
    rename, known = _renaming(old, new), {name for name, _ in old.named_modules() if name}
    keys: dict[str, str] = {}
    left_out: dict[str, None] = {}
    for key in saved.infos:
        path = _module_of(key.removeprefix(PREFIX), known)
        name = rename(path)
        if name is None:
            left_out[path] = None
        else:
            keys[f"{PREFIX}{name}{key.removeprefix(PREFIX)[len(path) :]}" if path else key] = key
    config = dict(saved.config)
    for option in _LISTS:
        if isinstance(config.get(option), list):
            config[option] = [name for name in map(rename, config[option]) if name is not None]
    for option in _PATTERNS:
        if config.get(option):
            config[option] = _pattern(config[option], known, rename)
    if not config.get("target_modules"):
        raise InputError(f"{saved.directory} has nothing below the head of {saved.manifest.task}: train a new adapter.")
    whole = list(dict.fromkeys([*heads, *(config.get("modules_to_save") or [])]))
    config["modules_to_save"] = whole or None
    infos = {key: saved.infos[old_key] for key, old_key in keys.items()}
    return CarriedAdapter(
        saved.directory, saved.adapter_type, config, infos, saved.manifest, saved.notes, origin=saved, keys=keys,
        left_out=tuple(left_out),
    )  # fmt: skip


def _renaming(old: nn.Module, new: nn.Module) -> Callable[[str], str | None]:
    """Return a function from the name of a module of `old` to that in `new`; None for a head, or if there is none."""
    before, after = (_body_prefix(model) for model in (old, new))
    names = {name for name, _ in new.named_modules()}

    def rename(path: str) -> str | None:
        if not path.startswith(before):
            return None
        name = after + path.removeprefix(before)
        return name if name in names else None

    return rename


def _body_prefix(model: Any) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _module_of(key: str, known: Collection[str]) -> str:
    """Return the longest beginning of a tensor's key that names a module; empty if there is none."""
    parts = key.split(".")
    return next((name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in known), "")


def _pattern(values: dict[str, Any], known: Collection[str], rename: Callable[[str], str | None]) -> dict[str, Any]:
    """Rename the keys of a pattern, which begin with the full names of modules, perhaps escaped."""
    renamed = {}
    for key, value in values.items():
        plain = re.sub(r"\\(.)", r"\1", key)
        path = _module_of(plain, known)
        name = rename(path)
        if name is not None:
            changed = name + plain[len(path) :]
            renamed[changed if plain == key else re.escape(changed)] = value
    return renamed

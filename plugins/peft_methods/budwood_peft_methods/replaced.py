"""Methods that train parts of the base as they are: norms, and rows of the embeddings.

Core trains and serves such parts for every adapter (`modules_to_save`, `trainable_token_indices`); here they have the
layout of PEFT's LN tuning and trainable tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
from safetensors.torch import save_file
from torch import Tensor, nn

from budwood import (
    RUN_ADAPTER,
    CorruptError,
    InputError,
    LiveAdapter,
    ParameterGroup,
    Run,
    copy_adapter_tensors,
    match_modules,
)
from budwood.lowrank import (
    SavedLowRankConfig,
    fit_whole,
    is_tied,
    live_low_rank,
    merge_whole_parts,
    new_tokens,
    parse_saved_config,
    register_adapter,
    remove_adapter,
    saved_tokens,
    saved_whole_modules,
    select_adapters,
    whole_groups,
    whole_tensors,
    without_base_tensors,
    wrap_tokens,
    wrap_whole,
)
from budwood_peft_methods.saved import PREFIX, chosen_modules

if TYPE_CHECKING:
    from budwood_peft_methods.parts import LNTuning, Replacing, TrainableTokens

NORM = ".ln_tuning_layers."
ROWS = ".trainable_tokens_delta"
OWN_ROWS = ".token_adapter.trainable_tokens_delta"
"""PEFT's key for rows that train beside another method."""


@dataclass
class Parts:
    """What an adapter replaces: the method's own modules, others, and rows by module."""

    own: list[str]
    whole: list[str]
    tokens: dict[str, list[int]]

    @property
    def all_whole(self) -> list[str]:
        """Full names of the modules that it replaces whole."""
        return [*self.own, *self.whole]


def norms(model: nn.Module) -> list[str]:
    """Return the full names of the base's norms, also of those that adapters on the model replace."""
    found = [
        path.removesuffix(".original_module")
        for path, module in model.named_modules()
        if type(module).__name__.lower().endswith("norm") and ".modules_to_save." not in path
    ]
    if not found:
        raise InputError("targets: the model has no norms.")
    return found


def norm_targets(strategy: LNTuning, model: nn.Module) -> list[str]:
    """Return the full names of the norms that a new adapter trains.

    Raises:
        InputError: a target is no module, or holds a matrix.
    """
    if strategy.options.targets == "all-norms":
        return norms(model)
    found = match_modules(model, strategy.options.targets, "targets")
    for path in found:
        if any(parameter.ndim > 1 for parameter in model.get_submodule(path).parameters()):
            raise InputError(f"targets: '{path}' is no norm, since it holds a matrix: use modules_to_save for it.")
    return found


def token_targets(strategy: TrainableTokens, model: Any) -> dict[str, list[int]]:
    """Return the embeddings' name with the tokens of a new adapter.

    Raises:
        InputError: there are none, or one is beyond the embeddings.
    """
    ids, table = strategy.options.tokens, model.get_input_embeddings()
    if not ids:
        raise InputError("tokens: name at least one token id.")
    if not hasattr(table, "weight"):
        raise InputError(f"tokens: {type(model).__name__} reads no tokens, so it has no embeddings to train.")
    if max(ids) >= len(table.weight):
        raise InputError(f"tokens: {max(ids)} is beyond the embeddings, which have {len(table.weight)} rows.")
    path = next(path for path, module in model.named_modules() if module is table)
    return {path: list(ids)}


def _check_occurs(run: Run, model: nn.Module, parts: Parts) -> None:
    """Check that a row of the embeddings would get a gradient, where the examples say so and nothing else trains.

    A head that is tied to the embeddings gives every row one; masks and generated answers are not known beforehand.

    Raises:
        InputError: no token is in any training example.
    """
    ids = sorted({token for rows in parts.tokens.values() for token in rows})
    unknown = run.planning or run.task.varies() or run.hooks.implements("next_examples")
    if not ids or parts.all_whole or unknown or is_tied(model):
        return
    for example in run.examples:
        labels = example.labels if example.labels.dtype.kind in "iu" else []
        if np.isin(example.inputs.get("input_ids", []), ids).any() or np.isin(labels, ids).any():
            return
    named = ", ".join(map(str, ids[:6])) + (f" and {len(ids) - 6} more" if len(ids) > 6 else "")
    raise InputError(f"tokens: no training example has {named}, so nothing would train: name tokens of the data.")


def create(strategy: Replacing, run: Run, model: nn.Module) -> Parts:
    """Add the run's adapter to its model, new or continued, and activate it."""
    if run.start_adapter is not None:
        parts = attach(strategy, model, run.start_adapter.config, run.start_adapter.load_tensors(), RUN_ADAPTER)
    else:
        own, tokens = strategy.new_parts(model)
        whole = [path for path in strategy.whole(model, run.task, run.base) if path not in own]
        for path, ids in new_tokens(model, run.base, [*own, *whole]).items():
            tokens[path] = sorted({*tokens.get(path, ()), *ids})
        parts = Parts(own, whole, tokens)
        _check_occurs(run, model, parts)
        _place(strategy, model, parts, RUN_ADAPTER)
    select_adapters(model, strategy.name, [RUN_ADAPTER])
    return parts


def parameter_groups(strategy: Replacing, parts: Parts, model: nn.Module) -> list[ParameterGroup]:
    """Return what the adapter trains: norms without weight decay."""
    groups = []
    for group in whole_groups(model, RUN_ADAPTER):
        mine = {k: p for k, p in group.parameters.items() if k.rpartition(".")[0] in parts.own}
        rest = {k: p for k, p in group.parameters.items() if k not in mine}
        if mine:
            groups.append(ParameterGroup(strategy.name, mine, weight_decay=0.0))
        if rest:
            groups.append(ParameterGroup(group.name, rest, group.learning_rate_ratio, group.weight_decay))
    return groups


def write(strategy: Replacing, parts: Parts, model: nn.Module, run: Run, directory: Path) -> None:
    """Write the run's adapter in PEFT's format."""
    config = getattr(peft, strategy.peft_config)(
        **strategy.fields(parts),
        task_type=run.task.peft_task_type,
        base_model_name_or_path=run.recipe.base.model,
        inference_mode=True,
    )
    config.save_pretrained(str(directory))
    path = directory / "adapter_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["target_modules"] = sorted(saved["target_modules"])  # PEFT makes it an unordered set
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {}
    for key, value in whole_tensors(model, RUN_ADAPTER).items():
        module, _, last = key.removeprefix(PREFIX).rpartition(".")
        key = f"{PREFIX}{module}{NORM}{last}" if module in parts.own else key.replace(OWN_ROWS, ROWS)
        tensors[key] = value.detach().cpu().contiguous().clone()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def attach(
    strategy: Replacing, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], name: str
) -> Parts:
    """Attach a saved adapter to a model, inactive.

    Raises:
        CorruptError: config, tensors and model do not match.
        InputError: the adapter uses an unsupported variant.
    """
    parts, tensors, _ = _read(strategy, model, config, tensors)
    _place(strategy, model, parts, name)
    try:
        fit_whole(model, name, tensors)
        slots = whole_tensors(model, name)
        copy_adapter_tensors(slots, without_base_tensors(model, tensors, slots))
    except BaseException:
        remove_adapter(model, name)
        raise
    return parts


def live(strategy: Replacing, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> LiveAdapter:
    """Return a saved adapter as entries of the live table.

    Raises:
        CorruptError, InputError: see `attach`.
    """
    _, tensors, selection = _read(strategy, model, config, tensors)
    return live_low_rank(model, selection, tensors, [], {}, lambda path, checked: None)


def merge(model: nn.Module, name: str) -> None:
    """Write the adapter's parts into the base, and detach it."""
    merge_whole_parts(model, name)
    remove_adapter(model, name)


def check_continued(
    strategy: Replacing, model: nn.Module, config: Mapping[str, Any], keys: Sequence[str], whole: Sequence[str]
) -> None:
    """Check that a run trains exactly the parts of the adapter that it continues.

    Raises:
        InputError: the first part that only one of the two has.
    """
    own, tokens = strategy.new_parts(model)
    saved_own, saved_ids = strategy.saved_parts(model, config)
    ours = {*own, *whole, *map(str, next(iter(tokens.values()), ()))}
    selection = SavedLowRankConfig(target_modules=["-"], modules_to_save=config.get("modules_to_save"))
    theirs = {*saved_own, *saved_whole_modules(model, selection, keys), *map(str, saved_ids)}
    for part in sorted(ours ^ theirs):
        verb, other = ("select", "does not have") if part in ours else ("leave out", "has")
        raise InputError(f"the options {verb} '{part}', which the adapter that the run continues {other}.")


def saved_norms(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Return the full names of the norms that a saved adapter replaces.

    Raises:
        CorruptError: there are none.
    """
    targets, out = config.get("target_modules"), config.get("exclude_modules")
    left_out = chosen_modules(norms(model), out, "exclude_modules", whole_components=True)
    names = [path for path in norms(model) if path not in left_out]
    found = chosen_modules(names, targets, "target_modules", whole_components=True)
    if not found:
        raise CorruptError("adapter_config.json: target_modules: the model has none of these norms.")
    return found


def saved_token_ids(config: Mapping[str, Any]) -> list[int]:
    """Return the token ids of a saved adapter.

    Raises:
        CorruptError: they are not token ids.
    """
    ids = config.get("token_indices")
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise CorruptError("adapter_config.json: token_indices: must be a list of token ids.")
    return ids


def _read(
    strategy: Replacing, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[Parts, dict[str, Tensor], SavedLowRankConfig]:
    """Return a saved adapter's parts, its tensors by core's keys, and the config that core reads."""
    known = parse_saved_config(strategy.name, SavedLowRankConfig, {"target_modules": ["-"], **config}, strategy.FIELDS)
    own, ids = strategy.saved_parts(model, config)
    found = {}
    for key, value in tensors.items():
        key = key.replace(NORM, ".") if strategy.name == "ln_tuning" else key.replace(ROWS, OWN_ROWS)
        found[key] = value
    fields = {"target_modules": ["-"], "modules_to_save": [*own, *(known.modules_to_save or [])] or None}
    selection = SavedLowRankConfig(**fields, trainable_token_indices=ids or None)
    whole = saved_whole_modules(model, selection, found)
    tokens, found = saved_tokens(model, selection, found, whole)
    return Parts(own, [path for path in whole if path not in own], tokens), found, selection


def _place(strategy: Replacing, model: nn.Module, parts: Parts, name: str) -> None:
    try:
        wrap_whole(model, parts.all_whole, name)
        wrap_tokens(model, parts.tokens, name)
        register_adapter(model, strategy.name, name, _no_update)
    except BaseException:
        remove_adapter(model, name)
        raise


def _no_update(layer: Any, name: str) -> Any:
    raise AssertionError("these methods adapt no linear")

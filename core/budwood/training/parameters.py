"""The trainable parameters: the strategies' parameter groups, and their form for torch optimizers."""

from __future__ import annotations

from typing import Any

from budwood.contract.discovery import PluginError
from budwood.contract.registry import Composition
from budwood.contract.types import ParameterGroup, Run
from budwood.errors import InputError
from budwood.model.embeddings import head_of, table_of
from budwood.training.preflight import NOTHING_TRAINS


def trainable_groups(run: Run, hooks: Composition) -> list[ParameterGroup]:
    """Collect the trainable parameters and freeze all others.

    Raises:
        InputError: no parameter is trainable, or one that the checkpoint lacks is not.
        PluginError: two groups have the same name, or share a parameter or a parameter's name.
    """
    results = hooks.collect("trainable_parameters", run=run, model=run.model)
    collected = [(plugin, group) for plugin, plugin_groups in results for group in plugin_groups]
    if not any(group.parameters for _, group in collected):
        raise InputError(NOTHING_TRAINS)
    run.model.requires_grad_(False)
    groups: dict[str, ParameterGroup] = {}
    group_of: dict[int | str, str] = {}
    for plugin, group in collected:
        where = f"{plugin}, hook trainable_parameters"
        if group.name in groups:
            raise PluginError(f"{where}: two groups are called '{group.name}': rename one.")
        groups[group.name] = group
        for name, parameter in group.parameters.items():
            for key in (id(parameter), name):
                if key in group_of:
                    both = f"is in the groups '{group_of[key]}' and '{group.name}'"
                    raise PluginError(f"{where}: parameter '{name}' {both}: list it in one.")
                group_of[key] = group.name
            parameter.requires_grad_(True)
    _check_new(run)
    run.only_adapter_trains = all("adapter" in getattr(plugin, "slots", ()) for plugin, _ in collected)
    return list(groups.values())


def _check_new(run: Run) -> None:
    for path in dict.fromkeys(key.rpartition(".")[0] for key in run.base.new):
        if not any(parameter.requires_grad for parameter in run.model.get_submodule(path).parameters()):
            raise InputError(
                f"base '{run.base.name}': '{path}' is not in the checkpoint, and no strategy trains it, so it would "
                "stay random: add an adapter that trains it whole, such as lora."
            )
    for module in (table_of(run.model), head_of(run.model)) if run.base.added else ():
        if module is not None and not any(parameter.requires_grad for parameter in module.parameters()):
            raise InputError(
                f"base.resize_embeddings: no strategy trains the {len(run.base.added):,} new embeddings: add an "
                "adapter that does, such as lora, or resize the base with its own library and save it."
            )


def torch_groups(run: Run) -> list[dict[str, Any]]:
    """Return the run's groups as arguments for a torch optimizer, with learning rate and weight decay."""
    recipe = run.recipe.train
    assert recipe.learning_rate is not None  # chosen when the data was read
    return [
        {
            "params": list(group.parameters.values()),
            "name": group.name,
            "lr": recipe.learning_rate * group.learning_rate_ratio,
            "weight_decay": recipe.weight_decay if group.weight_decay is None else group.weight_decay,
        }
        for group in run.groups
        if group.parameters
    ]

"""What trains: the strategies' groups of parameters, and torch's groups made of them."""

from __future__ import annotations

from typing import Any

from budwood.contract.discovery import PluginError
from budwood.contract.registry import Composition
from budwood.contract.types import ParameterGroup, Run
from budwood.errors import InputError

NOTHING_TRAINS = "strategies: none of them trains anything: add an adapter such as lora."


def trainable_groups(run: Run, hooks: Composition) -> list[ParameterGroup]:
    """Collect what trains; freeze all the rest.

    Raises:
        InputError: nothing trains, or something that the checkpoint lacks does not.
        PluginError: two groups have one name, or share a parameter or a parameter's name.
    """
    named = hooks.collect("trainable_parameters", run=run, model=run.model)
    found = [(plugin, group) for plugin, groups in named for group in groups]
    if not any(group.parameters for _, group in found):
        raise InputError(NOTHING_TRAINS)
    run.model.requires_grad_(False)
    groups: dict[str, ParameterGroup] = {}
    seen: dict[int | str, str] = {}
    for plugin, group in found:
        where = f"{plugin}, hook trainable_parameters"
        if group.name in groups:
            raise PluginError(f"{where}: two groups are called '{group.name}': rename one.")
        groups[group.name] = group
        for name, parameter in group.parameters.items():
            for what in (id(parameter), name):
                if what in seen:
                    both = f"stands in the groups '{seen[what]}' and '{group.name}'"
                    raise PluginError(f"{where}: parameter '{name}' {both}: name each once.")
                seen[what] = group.name
            parameter.requires_grad_(True)
    _check_new(run)
    return list(groups.values())


def _check_new(run: Run) -> None:
    for path in dict.fromkeys(key.rpartition(".")[0] for key in run.base.new):
        if not any(parameter.requires_grad for parameter in run.model.get_submodule(path).parameters()):
            raise InputError(
                f"base '{run.base.name}': '{path}' is not in the checkpoint, and no strategy trains it, so it would "
                "stay random: add an adapter that trains it whole, such as lora."
            )


def torch_groups(run: Run) -> list[dict[str, Any]]:
    """The run's groups as an optimizer takes them, with the recipe's rate and decay."""
    recipe = run.recipe.train
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

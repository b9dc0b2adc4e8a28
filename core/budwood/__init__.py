"""Budwood fine-tunes large models on one small machine, by plugins. Importing it imports neither torch nor a plugin."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from budwood.contract.attack import Attack as Attack
    from budwood.contract.calls import ask_owner as ask_owner
    from budwood.contract.discovery import PluginError as PluginError
    from budwood.contract.strategy import RUN_ADAPTER as RUN_ADAPTER
    from budwood.contract.strategy import Options as Options
    from budwood.contract.strategy import Strategy as Strategy
    from budwood.contract.strategy import hookimpl as hookimpl
    from budwood.contract.types import Batch as Batch
    from budwood.contract.types import BestMetric as BestMetric
    from budwood.contract.types import Event as Event
    from budwood.contract.types import Example as Example
    from budwood.contract.types import Generator as Generator
    from budwood.contract.types import LossTerm as LossTerm
    from budwood.contract.types import Outputs as Outputs
    from budwood.contract.types import ParameterGroup as ParameterGroup
    from budwood.contract.types import Plan as Plan
    from budwood.contract.types import Run as Run
    from budwood.contract.types import Step as Step
    from budwood.errors import BudwoodError as BudwoodError
    from budwood.errors import CorruptError as CorruptError
    from budwood.errors import DivergedError as DivergedError
    from budwood.errors import InputError as InputError
    from budwood.errors import ResourceError as ResourceError
    from budwood.errors import did_you_mean as did_you_mean

__version__ = "0.1.0"

# name → module that defines it; the package's public names, loaded when they are first asked for.
_EXPORTS = {
    "Attack": "budwood.contract.attack",
    "ask_owner": "budwood.contract.calls",
    **dict.fromkeys(("RUN_ADAPTER", "Options", "Strategy", "hookimpl"), "budwood.contract.strategy"),
    **dict.fromkeys(
        (
            "Batch",
            "BestMetric",
            "Event",
            "Example",
            "Generator",
            "LossTerm",
            "Outputs",
            "ParameterGroup",
            "Plan",
            "Run",
            "Step",
        ),
        "budwood.contract.types",
    ),
    **dict.fromkeys(("PluginError", "installed"), "budwood.contract.discovery"),
    **dict.fromkeys(
        ("BudwoodError", "CorruptError", "DivergedError", "InputError", "ResourceError", "did_you_mean"),
        "budwood.errors",
    ),
    **dict.fromkeys(
        (
            "LowRankUpdate",
            "adapter_layers",
            "merge_whole_parts",
            "register_adapter",
            "remove_adapter",
            "select_adapters",
            "whole_groups",
            "whole_tensors",
        ),
        "budwood.adapters.peft_layers",
    ),
    **dict.fromkeys(
        ("TASK_TYPES", "SavedLowRankConfig", "parse_saved_config", "saved_pattern", "saved_targets"),
        "budwood.adapters.peft_config",
    ),
    **dict.fromkeys(
        ("Layers", "ModulesToSave", "Targets", "match_modules", "match_targets"), "budwood.adapters.targets"
    ),
    "AdapterPool": "budwood.adapters.pool",
    "load_recipe": "budwood.recipe.schema",
    "plan": "budwood.planning.composition",
    "tune": "budwood.training.loop",
    **dict.fromkeys(("frozen_linear", "low_rank_linear", "mixed_low_rank_linear"), "budwood.model.ops.linear"),
    **dict.fromkeys(("check_adapter_tensors", "copy_adapter_tensors", "read_adapter"), "budwood.adapters.store"),
    **dict.fromkeys(("check_base", "fingerprint", "load_base", "load_tokenizer", "skeleton"), "budwood.model.base"),
    "batches_of": "budwood.model.tasks",
    **dict.fromkeys(("adapter_off", "load_frozen"), "budwood.training.frozen"),
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'budwood' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

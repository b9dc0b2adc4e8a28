"""Fine-tunes large models on one small machine, with plugins. Importing the package loads neither torch nor plugins."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from budwood.contract.attack import Attack as Attack
    from budwood.contract.calls import ask_owner as ask_owner
    from budwood.contract.discovery import PluginError as PluginError
    from budwood.contract.examples import DESIRABLE as DESIRABLE
    from budwood.contract.examples import Batch as Batch
    from budwood.contract.examples import Column as Column
    from budwood.contract.examples import Example as Example
    from budwood.contract.loading import build_plugin as build_plugin
    from budwood.contract.reward import Reward as Reward
    from budwood.contract.samples import Sample as Sample
    from budwood.contract.strategy import RUN_ADAPTER as RUN_ADAPTER
    from budwood.contract.strategy import Options as Options
    from budwood.contract.strategy import Strategy as Strategy
    from budwood.contract.strategy import hookimpl as hookimpl
    from budwood.contract.types import BestMetric as BestMetric
    from budwood.contract.types import Event as Event
    from budwood.contract.types import Generator as Generator
    from budwood.contract.types import LossTerm as LossTerm
    from budwood.contract.types import Outputs as Outputs
    from budwood.contract.types import ParameterGroup as ParameterGroup
    from budwood.contract.types import Plan as Plan
    from budwood.contract.types import Reference as Reference
    from budwood.contract.types import Run as Run
    from budwood.contract.types import Step as Step
    from budwood.data.chunk import Encoded as Encoded
    from budwood.data.encoder import Encoder as Encoder
    from budwood.data.formats import DataFormat as DataFormat
    from budwood.data.formats import Dropped as Dropped
    from budwood.errors import BudwoodError as BudwoodError
    from budwood.errors import CorruptError as CorruptError
    from budwood.errors import DivergedError as DivergedError
    from budwood.errors import InputError as InputError
    from budwood.errors import ResourceError as ResourceError
    from budwood.errors import did_you_mean as did_you_mean
    from budwood.errors import plural as plural
    from budwood.model.quantizers import Quantizer as Quantizer
    from budwood.untrusted.files import complete_directory as complete_directory
    from budwood.untrusted.files import complete_file as complete_file

__version__ = "0.1.0"

# Public name → module that defines it; imported on first access.
_EXPORTS = {
    "Attack": "budwood.contract.attack",
    "ask_owner": "budwood.contract.calls",
    **dict.fromkeys(("RUN_ADAPTER", "Options", "Strategy", "hookimpl"), "budwood.contract.strategy"),
    **dict.fromkeys(("DESIRABLE", "Batch", "Column", "Example"), "budwood.contract.examples"),
    "Sample": "budwood.contract.samples",
    "Reward": "budwood.contract.reward",
    "build_plugin": "budwood.contract.loading",
    **dict.fromkeys(
        (
            "BestMetric",
            "Event",
            "Generator",
            "LossTerm",
            "Outputs",
            "ParameterGroup",
            "Plan",
            "Reference",
            "Run",
            "Step",
        ),
        "budwood.contract.types",
    ),
    "Encoded": "budwood.data.chunk",
    "Encoder": "budwood.data.encoder",
    **dict.fromkeys(("DataFormat", "Dropped"), "budwood.data.formats"),
    **dict.fromkeys(("collate_rows", "collate_tokens"), "budwood.data.packing"),
    **dict.fromkeys(("CausalLM", "SequenceClassification", "TextTask", "as_probe"), "budwood.model.text_tasks"),
    "Classification": "budwood.model.classification",
    "file_of": "budwood.data.rows",
    **dict.fromkeys(("is_causal", "takes_segments"), "budwood.model.encoders"),
    "pooled_logits": "budwood.model.heads",
    "EvalTotals": "budwood.model.evaluation",
    "device_type": "budwood.model.device",
    "Task": "budwood.model.task",
    **dict.fromkeys(("PluginError", "installed"), "budwood.contract.discovery"),
    **dict.fromkeys(
        ("BudwoodError", "CorruptError", "DivergedError", "InputError", "ResourceError", "did_you_mean", "plural"),
        "budwood.errors",
    ),
    **dict.fromkeys(
        ("Layers", "ModulesToSave", "Targets", "match_modules", "match_targets", "whole_modules"),
        "budwood.adapters.targets",
    ),
    "AdapterPool": "budwood.serving.pool",
    "use_adapters": "budwood.adapters.use",
    **dict.fromkeys(("LiveAdapter", "LiveUpdate"), "budwood.adapters.live_update"),
    "load_recipe": "budwood.recipe.schema",
    "plan": "budwood.planning.composition",
    "tune": "budwood.planning.run",
    **dict.fromkeys(("check_adapter_tensors", "copy_adapter_tensors"), "budwood.adapters.match"),
    "read_adapter": "budwood.adapters.store",
    **dict.fromkeys(("check_base", "fingerprint", "load_base", "load_tokenizer", "skeleton"), "budwood.model.base"),
    **dict.fromkeys(("Quantizer", "linear_shape", "linear_weight"), "budwood.model.quantizers"),
    "OriginalWeights": "budwood.model.originals",
    "ExpertLinear": "budwood.model.quantizers.experts",
    "MXFP4Experts": "budwood.model.quantizers.mxfp4",
    **dict.fromkeys(("autocast", "batches_of", "eval_results", "over_eval_batches"), "budwood.model.evaluation"),
    **dict.fromkeys(("complete_directory", "complete_file"), "budwood.untrusted.files"),
    "load_frozen": "budwood.training.frozen",
    **dict.fromkeys(("example_hidden", "example_log_probs"), "budwood.training.scoring"),
    **dict.fromkeys(
        ("adapter_off", "label_log_probs", "read_reference", "reference_log_probs"), "budwood.training.reference"
    ),
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        if name in importlib.import_module("budwood.lowrank").__all__:  # version 1 of the contract exported it here
            raise ImportError(f"'{name}' is in budwood.lowrank: write `from budwood.lowrank import {name}`")
        raise AttributeError(f"module 'budwood' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

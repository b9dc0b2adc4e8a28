"""Strict reading of adapter_config.json of PEFT's low-rank methods, and resolution of its targets to modules."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from budwood.adapters.peft_conversion import WEIGHT
from budwood.adapters.targets import (
    LAYER_INDEX,
    all_linear,
    base_modules,
    ends_with,
    expert_modules,
    match_targets,
    matches,
    reject_quantized,
    whole_modules,
)
from budwood.errors import CorruptError, InputError
from budwood.model.quantizers import linear_shape, quantizer_of
from budwood.untrusted.formats import invalid_field
from budwood.untrusted.redaction import shorten

if TYPE_CHECKING:
    from torch import nn

    from budwood.untrusted.formats import TensorInfo

PREFIX = "base_model.model."
"""What PEFT's file puts before the path of a module."""
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_ga_config", "megatron_config", "megatron_core", "merge_weights", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
"""Fields that do not affect what a trained adapter computes, such as its initialisation."""
MERGE = "merge it into its base with PEFT (merge_and_unload), and use the result as a base"
_PEFT = "use it with PEFT"
REFUSED = {
    "alora_invocation_tokens": _PEFT,
    "arrow_config": _PEFT,
    "enable_lora": "it is of a PEFT before 0.3: save it again with that PEFT, merged into its base",
    "ensure_weight_tying": MERGE,
    "kasa_config": MERGE,
    "layer_replication": MERGE,
    "lora_bias": MERGE,
    "monteclora_config": _PEFT,
    "target_parameters": MERGE,
    "use_bdlora": MERGE,
    "use_dora": MERGE,
    "use_qalora": _PEFT,
    "use_rslora": MERGE,
    "velora_config": _PEFT,
}
"""Fields that change what an adapter computes, with the remedy where a method does not support them: unset, they mean
nothing."""
PEFT_HEADS = ("classifier", "score")
"""What PEFT adds to the `modules_to_save` of every classifier, whether the model has it or not."""
INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base's weights as they are."""


class MisfitError(CorruptError):
    """An adapter does not fit its config and the model; on another base than its own, that is the user's input."""


class SavedLowRankConfig(BaseModel):
    """The fields common to all low-rank adapters. Types are strict; a method adds its own fields."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    lora_alpha: float = 8
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = Field(min_length=1)
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False  # ignored: like PEFT, the layout follows from each module's class
    bias: Literal["none", "lora_only", "all"] = "none"
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


class SavedExpertsConfig(SavedLowRankConfig):
    """The same of a method that also adapts the experts of a mixture, which `target_parameters` names."""

    target_modules: str | list[str] | None = None  # type: ignore[assignment]
    target_parameters: list[str] | None = None

    @model_validator(mode="after")
    def _has_targets(self) -> SavedExpertsConfig:
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules and target_parameters are empty")
        return self


Saved = TypeVar("Saved", bound=SavedLowRankConfig)
Value = TypeVar("Value", int, float)


def honoured(fields: type[SavedLowRankConfig], unused: Collection[str] = ()) -> set[str]:
    """Return the names of the fields that a method takes into account, or that change nothing of what it computes."""
    return {*fields.model_fields, *WITHOUT_EFFECT, *unused}


def parse_saved_config(
    adapter_type: str, fields: type[Saved], config: dict[str, Any], unused: Collection[str] = ()
) -> Saved:
    """Validate adapter_config.json. A field that nobody has looked at is refused, whatever its value.

    Args:
        adapter_type: name of the strategy that reads it, for messages.
        fields: model of the fields that the method uses.
        config: content of the file.
        unused: fields without effect on what the adapter computes, in addition to `WITHOUT_EFFECT`.

    Raises:
        CorruptError: a field has an invalid value.
        InputError: the adapter uses an unsupported variant or field; the message names it and the remedy.
    """
    fine = honoured(fields, unused) | {key for key in REFUSED if config.get(key) in (None, False, [], {})}
    for key, value in config.items():
        init = key == "init_lora_weights" and key not in unused
        if key in fine and not init:
            continue
        where = f"adapter_config.json: '{shorten(key)}: {shorten(json.dumps(value))}'"
        if init:
            _check_init(where, value)
        elif key in REFUSED:
            raise InputError(f"{where} is not supported by strategy '{adapter_type}': {REFUSED[key]}.")
        else:
            writer = shorten(str(config.get("peft_version") or "of another version"))
            raise InputError(
                f"{where} is not a field of PEFT {version('peft')} (PEFT {writer} wrote it), so what it changes is not "
                "known: delete it from the file if it changes nothing, or save the adapter again with that PEFT."
            )
    try:
        return fields.model_validate(config)
    except ValidationError as error:
        raise CorruptError(f"adapter_config.json: {invalid_field(error)}.") from error


def _check_init(where: str, value: Any) -> None:
    """Refuse an initialisation that changed the base's weights, and that PEFT repeats when it loads the adapter.

    Raises:
        InputError: with PEFT's conversion to plain LoRA, which the method's authors provide.
    """
    if value in INITS:
        return
    if str(value).startswith("loftq"):
        remedy = "save the base that LoftQ made as a model of its own, and the adapter with 'init_lora_weights: true'"
    else:
        remedy = "convert it with PEFT: save_pretrained(DIR, path_initial_model_for_weight_conversion=INITIAL_ADAPTER)"
    raise InputError(
        f"{where}: this initialisation changes the base's weights, which the file does not hold: {remedy}."
    )


def saved_pattern(patterns: Mapping[str, Value], names: Sequence[str]) -> dict[str, Value]:
    """Resolve a saved `rank_pattern` or `alpha_pattern`, whose keys match the ends of names, to complete names.

    The resulting keys are escaped plain names, since PEFT would match untrusted expressions without a time limit.

    Raises:
        CorruptError: a key is not a regular expression, or takes too long to match.
    """
    resolved = {}
    for name in names:
        try:
            key = next((key for key in patterns if matches(rf"(?:.*\.)?(?:{key})", name)), None)
        except InputError as error:
            raise CorruptError(f"adapter_config.json: {error}") from error
        if key is not None:
            resolved[re.escape(name)] = patterns[key]
    return resolved


def saved_targets(model: nn.Module, saved: SavedLowRankConfig) -> list[str]:
    """Return the full names of the modules that a saved adapter stands on, as PEFT finds them; experts come last.

    Raises:
        MisfitError: the model has none of them.
        InputError: one is not a linear module.
    """
    modules, fused = dict(base_modules(model)), dict.fromkeys(expert_modules(model))
    weights = set(_target_weights(modules, saved))
    if saved.target_modules == "all-linear":
        names = [*all_linear(model), *weights]
    else:
        try:
            names = [n for n in modules if n and n not in fused and (n in weights or _is_target(n, saved))]
        except InputError as error:
            raise CorruptError(f"adapter_config.json: {error}") from error
    if not names and saved.target_modules:
        targets = shorten(json.dumps(saved.target_modules))
        raise MisfitError(f"adapter_config.json: target_modules: the model has none of {targets}.")
    parameters = getattr(saved, "target_parameters", None) or []
    for end in parameters:
        if not any(ends_with(name, end) for name in (*fused, *(f"{linear}{WEIGHT}" for linear in weights))):
            where = f"adapter_config.json: target_parameters: '{shorten(end)}'"
            if any(ends_with(name, end) for name, _ in model.named_parameters()):
                raise InputError(f"{where} is not the experts of a mixture, which is not supported: {MERGE}.")
            raise MisfitError(f"{where}: the model has no such experts.")
    for name in names:
        if quantizer_of(modules[name]) is None:
            what = type(modules[name]).__name__
            raise InputError(
                f"adapter_config.json: target_modules: '{name}' is not a linear module ({what}), "
                f"which is not supported: {MERGE}."
            )
    return names + [name for name in fused if any(ends_with(name, end) for end in parameters)]


def _target_weights(modules: Mapping[str, nn.Module], saved: SavedLowRankConfig) -> list[str]:
    """Return the names of the linears whose weights are among the `target_parameters`; see `peft_conversion`."""
    ends = [end for end in getattr(saved, "target_parameters", None) or () if end.endswith(WEIGHT)]
    return [
        name
        for name, module in modules.items()
        if any(ends_with(f"{name}{WEIGHT}", end) for end in ends) and quantizer_of(module) is not None
    ]


def planned_targets(plan: Any, options: Any, saved: SavedLowRankConfig | None, experts: bool = False) -> list[str]:
    """Return the full names of the modules that a planned run adapts, in order.

    Args:
        plan: a `budwood.Plan` with a model.
        options: the strategy's, with `targets`, `layers` and `modules_to_save`.
        saved: the config of the adapter that the run starts from, if there is one.
        experts: whether fused experts can be adapted.

    Raises:
        InputError: the options match nothing or what cannot be adapted, or differ from the adapter's.
    """
    model, start = plan.model, plan.start_adapter
    if saved is not None:
        saved_targets(model, saved)  # what it cannot adapt is named before it is missed among the targets
    whole = whole_modules(model, options.modules_to_save, plan.task)
    targets = match_targets(model, options.targets, options.layers, whole, experts=experts)
    if saved is not None:
        _check_continued(model, saved, start.infos, targets, whole)
    return targets


def _check_continued(
    model: nn.Module,
    saved: SavedLowRankConfig,
    tensors: Mapping[str, TensorInfo],
    targets: Sequence[str],
    whole: Sequence[str],
) -> None:
    """Check that a run adapts and trains whole exactly the modules of the adapter that it continues, in their sizes.

    Args:
        tensors: shapes of the tensors in the adapter's file.
        targets: full names of the modules that the recipe's options adapt.
        whole: full names of those that they train whole.

    Raises:
        InputError: the first module that only one of the two has, or whose A or B is for one of another size.
    """
    adapted = saved_targets(model, saved)
    whole_saved, fused = saved_whole_modules(model, saved, tensors), set(expert_modules(model))
    for option, ours, theirs in (
        ("targets and layers", targets, adapted),
        ("modules_to_save", whole, whole_saved),
    ):
        for name in sorted(set(ours) ^ set(theirs)):
            if theirs is whole_saved and name.endswith(PEFT_HEADS) and name in theirs:
                continue  # see PEFT_HEADS; `pre_classifier` ends like it
            if theirs is not whole_saved and name in fused and _is_target(name, saved):
                continue  # its target_modules end like this name, but PEFT's select no experts
            verb = "select" if name in ours else "leave out"
            other = "does not have" if name in ours else "has"
            raise InputError(
                f"{option} {verb} '{name}', which the adapter that the run continues {other}: leave them out."
            )
    modules = dict(base_modules(model))
    for name in adapted:
        if name not in fused:
            _check_sizes(name, linear_shape(modules[name]), tensors)


def _check_sizes(path: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> None:
    outputs, inputs = shape
    for part, axis, size in ((".lora_A", 1, inputs), (".lora_B", 0, outputs)):
        for key in (f"{PREFIX}{path}{part}.weight", f"{PREFIX}{path}{part}"):
            if key in tensors and (len(found := tensors[key].shape) != 2 or found[axis] != size):
                raise InputError(
                    f"tensor '{key}' of the adapter that the run continues is {list(found)}, but the base's '{path}' "
                    f"has {inputs} inputs and {outputs} outputs: give the base that it was trained on."
                )


def continued_selection(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved adapter's modules as the options `targets`, `layers` and `modules_to_save`.

    Raises:
        InputError: the options cannot express them.
    """
    for key in ("exclude_modules", "layers_pattern"):
        if config.get(key):
            raise InputError(f"adapter_config.json: '{key}' cannot be continued: {MERGE}.")
    layers = config.get("layers_to_transform")
    return {
        "targets": _targets(config),
        "layers": [layers] if isinstance(layers, int) else layers or None,
        "modules_to_save": _named(config),
    }


def _named(config: Mapping[str, Any]) -> Any:
    """Return the `modules_to_save` of a saved adapter without the heads that PEFT adds for the task, even twice.

    Those that the model has train anyway.
    """
    named, task = config.get("modules_to_save") or [], config.get("task_type")
    if not isinstance(named, list) or task not in ("SEQ_CLS", "TOKEN_CLS"):
        return named
    return [name for name in dict.fromkeys(named) if name not in PEFT_HEADS]


def _targets(config: Mapping[str, Any]) -> Any:
    modules, parameters = config.get("target_modules"), config.get("target_parameters")
    if parameters and isinstance(modules, str):
        text = f"'target_modules: {shorten(modules)}' beside target_parameters cannot be continued"
        raise InputError(f"adapter_config.json: {text}: {MERGE}.")
    return [*(modules or []), *(str(name).removesuffix(WEIGHT) for name in parameters)] if parameters else modules


def _is_target(name: str, saved: SavedLowRankConfig) -> bool:
    out, targets, layers = saved.exclude_modules or [], saved.target_modules or [], saved.layers_to_transform
    if matches(out, name) if isinstance(out, str) else any(ends_with(name, end) for end in out):
        return False
    if any(f".{whole}." in f".{name}." for whole in saved.modules_to_save or []):
        return False
    if isinstance(targets, str):
        return matches(targets, name)
    if name in targets:
        return True
    if not any(ends_with(name, target) for target in targets):
        return False
    return layers in (None, []) or _layer(name, saved) in ([layers] if isinstance(layers, int) else layers or [])


def _layer(name: str, saved: SavedLowRankConfig) -> int | None:
    """Return the index of the layer that a module is in: the first one, or that after a component `layers_pattern`."""
    given = saved.layers_pattern or []
    patterns = [rf"(?:.*\.)?(?:{end})" for end in ([given] if isinstance(given, str) else given)] or [r".*\.[^.]*"]
    for pattern in patterns:
        for stop in (at for at, letter in enumerate(name) if letter == "."):
            index = LAYER_INDEX.match(name, stop)
            if index is not None and matches(pattern, name[:stop]):
                return int(index[1])
    return None


def saved_whole_modules(model: nn.Module, saved: SavedLowRankConfig, tensors: Collection[str]) -> list[str]:
    """Return the full names of the modules that a saved adapter replaces.

    PEFT goes by the ends of names, and so takes `input_layernorm` for `norm`; what it took is in the file. Like PEFT,
    this passes over names of which neither the model nor the file has a module.

    Args:
        tensors: the keys of the file.

    Raises:
        MisfitError: the file has a module that the model does not have.
        InputError: the model has it quantised.
    """
    wanted = saved.modules_to_save or []
    modules = {name: module for name, module in base_modules(model) if name}
    found = []
    for end in wanted:
        sure = [end] if end in modules else [name for name in modules if ends_with(name, end)]
        taken = [
            n
            for n in modules
            if n.endswith(end) and any(f"{PREFIX}{n}.{k}" in tensors for k in modules[n].state_dict())
        ]
        found += [name for name in (*sure, *taken) if name not in found]
        if not sure and not taken and any(f"{end}." in key for key in tensors):
            raise MisfitError(f"adapter_config.json: modules_to_save: the model has no '{shorten(end)}'.")
    for name in found:
        reject_quantized(name, modules[name])
    return found


def saved_whole_names(config: Mapping[str, Any], tensors: Collection[str]) -> list[str]:
    """Return the full names of what PEFT took for the `modules_to_save` of an adapter, from its file alone.

    See `saved_whole_modules`, which also knows the model.

    Args:
        config: content of adapter_config.json.
        tensors: the keys of the file.
    """
    ends = tuple(end for end in config.get("modules_to_save") or () if isinstance(end, str) and end)
    found: dict[str, None] = {}
    for key in tensors:
        parts = key.removeprefix(PREFIX).split(".")
        paths = (".".join(parts[:count]) for count in range(1, len(parts)))
        path = next((path for path in paths if path.endswith(ends)), None)
        if path is not None:
            found[path] = None
    return list(found)
